// Command streamshim serves kubectl's exec, attach and port-forward in front of a container runtime.
package main

import (
	"context"
	"fmt"
	"os"
	"os/signal"
	"syscall"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/streamshim/streamshim/pkg/helper"
)

// SIGTERM and SIGINT end the process at once, whatever it waits for, except where a command has something to
// end in order: see untilSignal.
func main() {
	if len(os.Args) > 1 && os.Args[1] == helper.Command {
		unix.Close(helper.Program) //nolint:errcheck // nobody needs it any more
		os.Exit(helper.Main(os.Args[2:], os.Stdin, os.Stdout, os.Stderr))
	}
	if err := newCommand().Execute(); err != nil {
		fmt.Fprintln(os.Stderr, "streamshim:", err)
		os.Exit(1)
	}
}

// untilSignal returns a context that ends at SIGTERM or SIGINT. The second signal ends the process.
func untilSignal(ctx context.Context) (context.Context, context.CancelFunc) {
	ctx, stop := signal.NotifyContext(ctx, syscall.SIGTERM, syscall.SIGINT)
	context.AfterFunc(ctx, stop)
	return ctx, stop
}

func newCommand() *cobra.Command {
	root := &cobra.Command{
		Use:   "streamshim",
		Short: "exec, attach and port-forward for Kubernetes nodes, in front of containerd or CRI-O",
		Long: `streamshim sits between the kubelet (or crictl) and the container runtime. It serves exec, attach,
port-forward and ExecSync itself, and passes every other CRI call on untouched.

Start it with "streamshim serve" and point the kubelet's containerRuntimeEndpoint, or crictl's
--runtime-endpoint, at its socket. "streamshim check" tells whether this node is ready for it.`,
		Version:       version,
		SilenceUsage:  true,
		SilenceErrors: true,
	}
	root.SetVersionTemplate(versionLine())
	root.AddCommand(newServeCommand(), newSessionsCommand(), newCheckCommand(), newNodeCommand(), newSupportCommand(), newVersionCommand())
	return root
}
