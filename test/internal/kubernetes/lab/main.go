// Command lab runs a Kubernetes cluster of one node to try things in. "lab up" starts it in place of an earlier one, with
// streamshim between kubelet and containerd and a pod to exec into, and leaves it running. On a terminal it ends in a shell
// in the pod. "lab down" removes the cluster.
package main

import (
	"context"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"
	"golang.org/x/term"

	"github.com/streamshim/streamshim/test/internal/kubernetes"
)

// startTimeout bounds the time until the pod runs.
const startTimeout = 5 * time.Minute

func main() {
	dir := flag.String("dir", ".lab-k8s", "folder that everything lies under")
	streamshim := flag.String("streamshim", "bin/streamshim", "streamshim program; empty for a kubelet that talks to containerd itself")
	flag.Parse()
	var err error
	switch flag.Arg(0) {
	case "up":
		err = up(*dir, *streamshim)
	case "down":
		err = kubernetes.Cleanup(*dir, logf)
	default:
		err = fmt.Errorf("usage: %s [flags] up|down", os.Args[0])
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "lab:", err)
		os.Exit(1)
	}
}

func logf(format string, args ...any) { fmt.Fprintf(os.Stderr, format+"\n", args...) }

func up(dir, streamshim string) error {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, unix.SIGTERM)
	defer stop()
	ctx, cancel := context.WithTimeout(ctx, startTimeout)
	defer cancel()
	if streamshim != "" {
		var err error
		if streamshim, err = filepath.Abs(streamshim); err != nil {
			return err
		}
	}
	cluster, err := kubernetes.Start(ctx, kubernetes.Config{
		Dir: dir, Nodes: []kubernetes.NodeConfig{{Name: "lab", Streamshim: streamshim}}, Logf: logf,
	})
	if err != nil {
		return err
	}
	if err := runPod(ctx, cluster); err != nil {
		_ = cluster.Close() // the failure is what matters
		return err
	}
	n := cluster.Node("lab")
	fmt.Printf(`A cluster runs in %[1]s, with a pod "lab" on the node %[2]s. Try:

  export KUBECONFIG=%[3]s
  alias kubectl=%[4]s
  kubectl exec -it lab -- sh
  kubectl exec lab -- seq 1 3000000 | (sleep 2; tail -n 1)
  kubectl attach -i lab
  kubectl port-forward lab 8080:80 8081:9999     # nobody listens on 9999
  kubectl logs -f lab
  less %[5]s

"make lab-k8s-down" removes it.
`, dir, n.Address, cluster.Kubeconfig(), n.Program("kubectl"), n.LogPath("streamshim"))
	kubectl, kubeconfig := n.Program("kubectl"), cluster.Kubeconfig()
	cluster.Detach()
	if !term.IsTerminal(int(os.Stdin.Fd())) || !term.IsTerminal(int(os.Stdout.Fd())) {
		return nil
	}
	fmt.Println("\nThis is kubectl exec -it lab -- sh:")
	shell := exec.Command(kubectl, "exec", "-it", "lab", "--", "sh")
	shell.Env = append(os.Environ(), "KUBECONFIG="+kubeconfig)
	shell.Stdin, shell.Stdout, shell.Stderr = os.Stdin, os.Stdout, os.Stderr
	_ = shell.Run() // its exit code is that of the last command in the shell
	return nil
}

func runPod(ctx context.Context, cluster *kubernetes.Cluster) error {
	manifest := kubernetes.LabPod(cluster.Node("lab").Address)
	for _, step := range []struct {
		input string
		args  []string
	}{
		{manifest, []string{"apply", "-f", "-"}},
		{"", []string{"wait", "--for=condition=Ready", "--timeout=90s", "pod/lab"}},
	} {
		command := cluster.Kubectl(ctx, kubernetes.WebSocket, step.args...)
		command.Stdin = strings.NewReader(step.input)
		if output, err := command.CombinedOutput(); err != nil {
			return fmt.Errorf("kubectl %s: %w: %s", strings.Join(step.args, " "), err, output)
		}
	}
	return nil
}
