package kubernetes

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"time"

	"github.com/streamshim/streamshim/test/internal/node"
)

// Protocol is what kubectl uses to the API server for exec, attach, cp and port-forward.
type Protocol string

const (
	// WebSocket is kubectl's default since 1.31.
	WebSocket Protocol = "WebSocket"
	// SPDY is what kubectl used before and still can.
	SPDY Protocol = "SPDY"
)

// Kubectl returns a kubectl command for the administrator. The caller runs it. It is killed when the context ends.
func (c *Cluster) Kubectl(ctx context.Context, protocol Protocol, args ...string) *exec.Cmd {
	command := exec.CommandContext(ctx, c.nodes[0].Program("kubectl"), args...)
	useWebSockets := fmt.Sprint(protocol != SPDY)
	command.Env = append(os.Environ(), "KUBECONFIG="+c.Kubeconfig(), "HOME="+c.path("home"),
		"KUBECTL_REMOTE_COMMAND_WEBSOCKETS="+useWebSockets, "KUBECTL_PORT_FORWARD_WEBSOCKETS="+useWebSockets)
	command.WaitDelay = 5 * time.Second
	return command
}

// Ready returns nil if a cluster can be started here. The error tells what to do.
func Ready() error {
	if err := node.Ready(""); err != nil {
		return err
	}
	for _, name := range []string{"etcd", "kube-apiserver", "kubelet", "kubectl"} {
		if _, err := os.Stat(filepath.Join(node.DefaultPrograms(), name)); err != nil {
			return errors.Join(err, errors.New("please run test/internal/peers/build.sh etcd kubernetes (make e2e does)"))
		}
	}
	return nil
}
