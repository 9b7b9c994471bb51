// Command kubectl-streamshim is a kubectl plugin. It lists who is in which pod of a cluster, and watches, ends and replays
// sessions. It runs kubectl to ask the DaemonSet's pods (deploy/helm), so it uses kubectl's contexts, credentials and
// proxies. The cluster's RBAC decides who may use it: it needs the right to exec into those pods.
package main

import (
	"context"
	"fmt"
	"os"
	"os/signal"
	"syscall"

	"github.com/spf13/cobra"
)

var version = "devel"

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, syscall.SIGINT)
	err := newCommand().ExecuteContext(ctx)
	stop()
	if err != nil {
		fmt.Fprintln(os.Stderr, "kubectl streamshim:", err)
		os.Exit(1)
	}
}

func newCommand() *cobra.Command {
	root := &cobra.Command{
		Use:   "kubectl-streamshim",
		Short: "Who is in which pod: live exec, attach and port-forward sessions of a cluster",
		Long: `kubectl streamshim lists the live exec, attach and port-forward sessions of all nodes that have streamshim's DaemonSet,
and watches, ends and replays them. It needs the right to list the DaemonSet's pods and to exec into them ("create" on
pods/exec in their namespace). Whoever has that right can see and end every session.`,
		Version:       version,
		SilenceUsage:  true,
		SilenceErrors: true,
	}
	// Use must be the plugin's own name, by which kubectl looks for completions. The help shows this name.
	root.Annotations = map[string]string{cobra.CommandDisplayNameAnnotation: "kubectl streamshim"}
	c := &cluster{}
	flags := root.PersistentFlags()
	flags.StringVar(&c.kubectl, "kubectl", "kubectl", "`program` to call")
	flags.StringVar(&c.context, "context", "", "kubeconfig `context`")
	flags.StringVar(&c.kubeconfig, "kubeconfig", "", "kubeconfig `file`")
	flags.StringVar(&c.agents, "agents", "streamshim-system", "`namespace` of the DaemonSet")
	flags.DurationVar(&c.timeout, "node-timeout", defaultNodeTimeout, "`time` for each node to answer")
	root.AddCommand(newListCommand(c), newShowCommand(c), newWatchCommand(c), newEndCommand(c), newRecordingsCommand(c), newReplayCommand(c))
	return root
}
