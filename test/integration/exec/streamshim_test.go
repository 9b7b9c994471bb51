package exec

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"google.golang.org/grpc"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/streamshim/streamshim/test/internal/node"
)

// streamshim is a running streamshim, seen from outside.
type streamshim struct {
	runtime runtimeapi.RuntimeServiceClient
	socket  string // unix://...
	log     string // path
	pid     func() int

	folder     string
	upstream   string // CRI socket
	connection *grpc.ClientConn
	command    *exec.Cmd
	ended      chan struct{}
}

// startStreamshim starts another streamshim before the shared node's containerd, with a
// configuration of its own.
func startStreamshim(t *testing.T, configuration string) *streamshim {
	t.Helper()
	folder, err := os.MkdirTemp("", "shim")
	if err != nil {
		t.Fatal(err)
	}
	s := &streamshim{
		folder: folder, socket: "unix://" + filepath.Join(folder, "cri.sock"), log: filepath.Join(folder, "log"),
		upstream: shared.node.ContainerdSocket(),
	}
	s.pid = func() int { return s.command.Process.Pid }
	if err := os.WriteFile(filepath.Join(folder, "config.toml"), []byte(configuration), 0o600); err != nil {
		t.Fatal(err)
	}
	if s.connection, err = node.Dial(s.socket); err != nil {
		t.Fatal(err)
	}
	s.runtime = runtimeapi.NewRuntimeServiceClient(s.connection)
	s.start(t)
	t.Cleanup(func() {
		s.stop(t, syscall.SIGTERM)
		s.connection.Close()
		if t.Failed() {
			text, _ := os.ReadFile(s.log)
			lines := strings.Split(strings.TrimSpace(string(text)), "\n")
			t.Logf("streamshim's log ends with:\n%s", strings.Join(lines[max(0, len(lines)-30):], "\n"))
		}
		os.RemoveAll(folder)
	})
	return s
}

func (s *streamshim) start(t *testing.T) {
	t.Helper()
	log, err := os.OpenFile(s.log, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	defer log.Close()
	s.command = exec.Command("../../../bin/streamshim", "serve", "--listen", s.socket, "--upstream", s.upstream,
		"--state-dir", filepath.Join(s.folder, "state"), "--config", filepath.Join(s.folder, "config.toml"),
		"--admin", "unix://"+filepath.Join(s.folder, "admin.sock"), "--log-level", "debug")
	s.command.Stdout, s.command.Stderr = log, log
	s.command.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if err := s.command.Start(); err != nil {
		t.Fatal(err)
	}
	command, ended := s.command, make(chan struct{})
	s.ended = ended
	go func() {
		command.Wait() //nolint:errcheck // how it ended is seen in its log
		close(ended)
	}()
	eventually(t, testTimeout, "streamshim is ready", func() bool {
		select {
		case <-ended:
			text, _ := os.ReadFile(s.log) //nolint:errcheck // then the end alone must do
			t.Fatalf("streamshim has ended at once:\n%s", text)
		default:
		}
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		_, err := s.runtime.Version(ctx, &runtimeapi.VersionRequest{}, grpc.WaitForReady(true))
		return err == nil
	})
}

// stop ends it and waits for that.
func (s *streamshim) stop(t *testing.T, signal syscall.Signal) {
	t.Helper()
	s.command.Process.Signal(signal) //nolint:errcheck // it may have ended
	select {
	case <-s.ended:
	case <-time.After(testTimeout):
		t.Errorf("streamshim still runs %v after %v", testTimeout, signal)
		s.command.Process.Kill() //nolint:errcheck // as above
		<-s.ended
	}
}

// execSync runs a command through ExecSync. A timeout of zero is none.
func (s *streamshim) execSync(ctx context.Context, container string, timeout time.Duration, args ...string) (*runtimeapi.ExecSyncResponse, error) {
	return s.runtime.ExecSync(ctx, &runtimeapi.ExecSyncRequest{
		ContainerId: container, Cmd: args, Timeout: int64(timeout / time.Second),
	})
}

// mustSync is execSync of a shell command that must succeed; it returns its output.
func (s *streamshim) mustSync(t *testing.T, container, script string) string {
	t.Helper()
	response, err := s.execSync(t.Context(), container, 0, "sh", "-c", script)
	if err != nil || response.ExitCode != 0 {
		t.Fatalf("%s: %v, exit code %d, %s", script, err, response.GetExitCode(), response.GetStderr())
	}
	return string(response.Stdout)
}

// command is a program that is killed if it does not end.
func command(t *testing.T, name string, args ...string) *exec.Cmd {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), testTimeout)
	t.Cleanup(cancel)
	c := exec.CommandContext(ctx, name, args...)
	c.Cancel = func() error {
		if ctx.Err() == context.DeadlineExceeded {
			t.Errorf("killed, because it did not end within %v: %s", testTimeout, c)
		}
		return c.Process.Kill()
	}
	c.WaitDelay = 10 * time.Second
	return c
}

// crictl is a crictl command that speaks to this streamshim.
func (s *streamshim) crictl(t *testing.T, args ...string) *exec.Cmd {
	t.Helper()
	return command(t, shared.node.Program("crictl"),
		append([]string{"--runtime-endpoint", s.socket, "--image-endpoint", s.socket, "--timeout", "60s"}, args...)...)
}

// descriptors counts the open files of a process.
func descriptors(pid int) int {
	entries, _ := os.ReadDir(fmt.Sprintf("/proc/%d/fd", pid)) //nolint:errcheck // 0 will not do
	return len(entries)
}
