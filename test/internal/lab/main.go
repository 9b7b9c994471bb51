// Command lab lets one try streamshim: a private containerd with streamshim in front and one pod,
// all under one folder.
//
//	lab up      bring it up, or find it up; then a shell in the pod through streamshim or, without a
//	            terminal, a tour that checks exec, attach and port-forward and fails if one fails
//	lab down    remove every trace
//
// make lab builds what is needed and calls it.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"syscall"

	"golang.org/x/term"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/streamshim/streamshim/test/internal/images"
	"github.com/streamshim/streamshim/test/internal/node"
)

// podName is how the lab finds its pod again.
const podName = "lab"

func main() {
	dir := flag.String("dir", ".lab", "folder that the lab lies under")
	streamshim := flag.String("streamshim", "bin/streamshim", "the streamshim program")
	flag.Usage = func() {
		fmt.Fprintln(os.Stderr, "usage: lab [flags] up|down")
		flag.PrintDefaults()
	}
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	defer stop()

	var err error
	switch flag.Arg(0) {
	case "up":
		err = up(ctx, *dir, *streamshim)
	case "down":
		err = down(*dir)
	default:
		flag.Usage()
		os.Exit(2)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "lab:", err)
		os.Exit(1)
	}
}

func progress(format string, args ...any) { fmt.Printf("lab: "+format+"\n", args...) }

// pod is what the lab runs.
type pod struct {
	sandbox, container string // IDs
}

func up(ctx context.Context, dir, streamshim string) error {
	streamshim, err := filepath.Abs(streamshim)
	if err != nil {
		return err
	}
	if _, err := os.Stat(streamshim); err != nil {
		return fmt.Errorf("%w; please run make build, or simply make lab", err)
	}
	n, err := node.Open(ctx, dir, progress)
	switch {
	case errors.Is(err, node.ErrNotRunning):
		progress("starting an image server, containerd and streamshim in %s", dir)
		n, err = node.Start(ctx, node.Config{Dir: dir, Streamshim: streamshim, Logf: progress})
	case err == nil:
		progress("it is up already in %s", dir)
	}
	if err != nil {
		return err
	}
	p, err := ensurePod(ctx, n)
	if err == nil {
		err = writeScripts(n, streamshim)
	}
	if err != nil {
		return errors.Join(err, n.Close())
	}
	// From here on the lab stays up without this program, until "lab down".
	n.Detach()
	printHelp(dir, n, p)
	if term.IsTerminal(int(os.Stdin.Fd())) && term.IsTerminal(int(os.Stdout.Fd())) {
		return shell(dir, n, p)
	}
	return tour(ctx, n, p)
}

// down removes every trace of the lab, the logs too.
func down(dir string) error {
	progress("taking down what is in %s", dir)
	if err := node.Cleanup(dir, progress); err != nil {
		return err
	}
	if err := os.RemoveAll(dir); err != nil {
		return err
	}
	progress("gone")
	return nil
}

// ensurePod returns the lab's pod. It creates one if there is none or its container has ended.
func ensurePod(ctx context.Context, n *node.Node) (pod, error) {
	list, err := n.Runtime().ListContainers(ctx, &runtimeapi.ListContainersRequest{Filter: &runtimeapi.ContainerFilter{
		State:         &runtimeapi.ContainerStateValue{State: runtimeapi.ContainerState_CONTAINER_RUNNING},
		LabelSelector: map[string]string{"io.kubernetes.pod.name": podName},
	}})
	if err != nil {
		return pod{}, fmt.Errorf("look for the lab's pod: %w", err)
	}
	for _, container := range list.Containers {
		return pod{container.PodSandboxId, container.Id}, nil
	}
	progress("making a pod from the image %s, which was built here", node.Image(images.Lab))
	sandbox, err := n.RunPod(ctx, node.PodSpec{Name: podName})
	if err != nil {
		return pod{}, err
	}
	container, err := n.RunContainer(ctx, sandbox, node.ContainerSpec{Name: "web", Image: node.Image(images.Lab), Stdin: true})
	return pod{sandbox, container}, err
}

// writeScripts writes scripts into the lab's folder that run crictl and streamshim with the lab's sockets.
func writeScripts(n *node.Node, binary string) error {
	for name, script := range map[string]string{
		"crictl": fmt.Sprintf("exec '%s' --config '%s' \"$@\"\n", n.Program("crictl"), filepath.Join(n.Dir(), "crictl.yaml")),
		"streamshim": fmt.Sprintf(`case "$1" in
sessions | upgrade | support-bundle) command=$1; shift; exec '%[1]s' "$command" --admin 'unix://%[2]s' "$@" ;;
check) shift; exec '%[1]s' check --admin 'unix://%[2]s' --listen '%[3]s' --upstream '%[4]s' "$@" ;;
esac
exec '%[1]s' "$@"
`, binary, n.AdminSocket(), n.Socket(), n.ContainerdSocket()),
	} {
		if err := os.WriteFile(filepath.Join(n.Dir(), name), []byte("#!/bin/sh\n"+script), 0o755); err != nil {
			return err
		}
	}
	return nil
}

func printHelp(dir string, n *node.Node, p pod) {
	crictl, container, sandbox := filepath.Join(dir, "crictl"), p.container[:13], p.sandbox[:13]
	fmt.Printf(`
The lab is up. streamshim serves CRI on %s
and passes on to containerd on %s. Things to try:

  %[3]s ps                                    # what runs
  %[3]s exec -it %[4]s sh               # a shell in the pod
  %[3]s exec -s %[4]s date              # without streaming (ExecSync)
  %[3]s attach -i %[4]s                 # the main process: type a line, it answers
  %[3]s port-forward %[5]s 8080:80      # then: curl http://127.0.0.1:8080
  %[3]s exec -r websocket -it %[4]s sh  # over WebSocket, which containerd 2.4 refuses
  %[7]s sessions list                     # who is in which container right now
  %[7]s check                             # is this node ready for it? (it has no kubelet)

Logs are in %[6]s. To end it: make lab-down

`, n.Socket(), n.ContainerdSocket(), crictl, container, sandbox, filepath.Join(dir, "log"), filepath.Join(dir, "streamshim"))
}

// shell gives the user a shell in the pod.
func shell(dir string, n *node.Node, p pod) error {
	progress("you are now in the pod, by way of streamshim; exit or ctrl-D leaves")
	signal.Ignore(syscall.SIGINT, syscall.SIGQUIT) // the shell in the pod handles them
	command := n.Crictl("exec", "-it", p.container, "sh")
	command.Stdin, command.Stdout, command.Stderr = os.Stdin, os.Stdout, os.Stderr
	err := command.Run()
	if failed := new(exec.ExitError); err != nil && !errors.As(err, &failed) {
		return err
	}
	// crictl fails if the last command of the shell has failed, which is not a failure of the lab.
	progress("the lab stays up. Back in:  %s exec -it %s sh   The end:  make lab-down", filepath.Join(dir, "crictl"), p.container[:13])
	return nil
}
