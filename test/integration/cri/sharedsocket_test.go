package cri

import (
	"context"
	"io"
	"net"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/streamshim/streamshim/internal/testutil/criosocket"
	"github.com/streamshim/streamshim/test/internal/harness"
	"github.com/streamshim/streamshim/test/internal/node"
)

// relayTo passes what a shared socket takes for gRPC to a real runtime.
func relayTo(t *testing.T, socket *criosocket.Socket, runtime string) {
	t.Helper()
	var group sync.WaitGroup
	group.Go(func() {
		for {
			conn, err := socket.GRPC().Accept()
			if err != nil {
				return
			}
			upstream, err := net.Dial("unix", runtime)
			if err != nil {
				t.Error(err)
				conn.Close()
				return
			}
			for _, ends := range [][2]net.Conn{{conn, upstream}, {upstream, conn}} {
				group.Go(func() {
					io.Copy(ends[0], ends[1])
					ends[0].Close()
				})
			}
		}
	})
	t.Cleanup(func() {
		socket.Close()
		group.Wait()
	})
}

// TestSharedSocket checks, with containerd behind a socket as strict as CRI-O's, that all that is forwarded, asked or
// relayed works.
func TestSharedSocket(t *testing.T) {
	binary := node.Binary(t)
	n := harness.Shared.Node
	dir := t.TempDir()
	socket, err := criosocket.Listen(filepath.Join(dir, "crio.sock"))
	if err != nil {
		t.Fatal(err)
	}
	relayTo(t, socket, strings.TrimPrefix(n.ContainerdSocket(), "unix://"))
	front := "unix://" + filepath.Join(dir, "front.sock")
	if err := n.StartCompanion("behind", binary, "serve", "--config", "/dev/null", "--listen", front,
		"--upstream", "unix://"+filepath.Join(dir, "crio.sock"), "--stream-address", "127.0.0.1:0", "--admin", "",
		"--state-dir", filepath.Join(dir, "state")); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { n.StopCompanion("behind", 5*time.Second) }) // before the relay ends
	conn, err := grpc.NewClient(front, grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithDefaultCallOptions(grpc.WaitForReady(true))) // until it listens
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	ctx, cancel := context.WithTimeout(t.Context(), waitTimeout)
	defer cancel()
	client := runtimeapi.NewRuntimeServiceClient(conn)
	if version, err := client.Version(ctx, &runtimeapi.VersionRequest{}); err != nil || version.GetRuntimeName() != "containerd" {
		t.Fatalf("Version: %v, %v", version, err)
	}
	_, container := runLab(t, n, node.PodSpec{}, node.ContainerSpec{})
	list, err := client.ListContainers(ctx, &runtimeapi.ListContainersRequest{})
	if err != nil || len(list.GetContainers()) != 1 {
		t.Errorf("ListContainers: %v, %v", list, err)
	}
	events, err := client.GetContainerEvents(ctx, &runtimeapi.GetEventsRequest{})
	if err != nil {
		t.Fatal(err)
	}
	removed, err := n.RunContainer(ctx, list.GetContainers()[0].GetPodSandboxId(), node.ContainerSpec{Name: "other"})
	if err != nil {
		t.Fatal(err)
	}
	for {
		event, err := events.Recv()
		if err != nil {
			t.Fatalf("GetContainerEvents: %v", err)
		}
		if event.GetContainerId() == removed {
			break
		}
	}
	crictl := func(args ...string) *exec.Cmd {
		return exec.Command(n.Program("crictl"), append([]string{"-r", front, "-i", front}, args...)...)
	}
	for _, args := range [][]string{{"exec", container, "hostname"}, {"exec", "-s", container, "hostname"}} {
		if stdout, stderr, code := run(t, crictl(args...)); strings.TrimSpace(stdout) != "pod" || code != 0 {
			t.Errorf("crictl %s: %q, %q, %d", args, stdout, stderr, code)
		}
	}
	if stdout, stderr, code := run(t, crictl("images")); code != 0 || !strings.Contains(stdout, "IMAGE") {
		t.Errorf("crictl images: %q, %q, %d", stdout, stderr, code)
	}
	check := exec.Command(binary, "check", "--config", "/dev/null", "--upstream", "unix://"+filepath.Join(dir, "crio.sock"))
	if stdout, _, _ := run(t, check); !strings.Contains(stdout, "containerd v") {
		t.Errorf("check: %s", stdout)
	}
}
