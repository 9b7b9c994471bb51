// Command streamshim serves kubectl's exec, attach and port-forward in front of a container runtime.
package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"runtime"
	"syscall"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/streamshim/streamshim/pkg/helper"
)

// The main goroutine keeps the main thread, because only that thread may execute the program that takes over (see
// handover.Check.Exec). The main thread is the parent of all commands. If another thread executed, the kernel would treat
// the main thread as ended, and would kill the commands that end with their parent (PR_SET_PDEATHSIG).
func init() { runtime.LockOSThread() }

// SIGTERM and SIGINT end the process at once, except in commands that have to clean up: see untilSignal.
func main() {
	if len(os.Args) > 1 && os.Args[1] == helper.Command {
		unix.Close(helper.Program) //nolint:errcheck // not needed any more
		os.Exit(helper.Main(os.Args[2:], os.Stdin, os.Stdout, os.Stderr))
	}
	if err := newCommand().Execute(); err != nil {
		fmt.Fprintln(os.Stderr, "streamshim:", err)
		var exit *exitError
		if errors.As(err, &exit) {
			os.Exit(exit.code)
		}
		os.Exit(1)
	}
}

// untilSignal returns a context that ends at SIGTERM or SIGINT. A second signal ends the process.
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
port-forward and ExecSync itself, and forwards every other CRI call unchanged.

Start it with "streamshim serve" and point the kubelet's containerRuntimeEndpoint, or crictl's
--runtime-endpoint, at its socket. "streamshim check" checks whether this node is ready for it.`,
		Version:       version,
		SilenceUsage:  true,
		SilenceErrors: true,
	}
	root.SetVersionTemplate(versionLine())
	root.AddCommand(newServeCommand(), newSessionsCommand(), newUICommand(), newCheckCommand(), newUpgradeCommand(), newNodeCommand(), newSupportCommand(), newVersionCommand())
	return root
}
