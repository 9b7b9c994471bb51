package harness

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

	"github.com/streamshim/streamshim/internal/testutil"
	"github.com/streamshim/streamshim/test/internal/node"
)

// Streamshim is a running streamshim, seen from outside.
type Streamshim struct {
	Runtime runtimeapi.RuntimeServiceClient
	Socket  string // unix://...
	Log     string // its path
	PID     func() int

	// Only StartStreamshim and StartInstalled set these.
	Folder     string
	Program    string // the path of the program; it is the test's own if it is in Folder
	Command    *exec.Cmd
	Ended      chan struct{} // closed when it has ended
	connection *grpc.ClientConn
}

// StartStreamshim starts another streamshim in front of the shared node's containerd, with its own configuration.
func StartStreamshim(t *testing.T, configuration string) *Streamshim {
	t.Helper()
	return startStreamshim(t, configuration, "")
}

// StartInstalled is like StartStreamshim with the test's own copy of a program, which Install can replace.
func StartInstalled(t *testing.T, configuration, program string) *Streamshim {
	t.Helper()
	return startStreamshim(t, configuration, program)
}

func startStreamshim(t *testing.T, configuration, program string) *Streamshim {
	t.Helper()
	folder, err := os.MkdirTemp("", "shim")
	if err != nil {
		t.Fatal(err)
	}
	s := &Streamshim{
		Folder: folder, Socket: "unix://" + filepath.Join(folder, "cri.sock"), Log: filepath.Join(folder, "log"),
	}
	s.PID = func() int { return s.Command.Process.Pid }
	if program == "" {
		s.Program = node.Binary(t)
	} else {
		s.Program = filepath.Join(folder, "streamshim")
		s.Install(t, program)
	}
	if err := os.WriteFile(filepath.Join(folder, "config.toml"), []byte(patient(configuration)), 0o600); err != nil {
		t.Fatal(err)
	}
	if s.connection, err = node.Dial(s.Socket); err != nil {
		t.Fatal(err)
	}
	s.Runtime = runtimeapi.NewRuntimeServiceClient(s.connection)
	s.Start(t)
	t.Cleanup(func() {
		s.Stop(t, syscall.SIGTERM)
		s.connection.Close()
		if t.Failed() {
			text, _ := os.ReadFile(s.Log)
			lines := strings.Split(strings.TrimSpace(string(text)), "\n")
			t.Logf("streamshim's log ends with:\n%s", strings.Join(lines[max(0, len(lines)-30):], "\n"))
		}
		os.RemoveAll(folder)
	})
	return s
}

// Start runs it. It may be called again after Stop.
func (s *Streamshim) Start(t *testing.T) {
	t.Helper()
	log, err := os.OpenFile(s.Log, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	defer log.Close()
	s.Command = exec.Command(s.Program, "serve", "--listen", s.Socket, "--upstream", Shared.Node.ContainerdSocket(),
		"--state-dir", filepath.Join(s.Folder, "state"), "--config", filepath.Join(s.Folder, "config.toml"),
		"--admin", "unix://"+filepath.Join(s.Folder, "admin.sock"), "--log-level", "debug")
	s.Command.Stdout, s.Command.Stderr = log, log
	s.Command.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if err := s.Command.Start(); err != nil {
		t.Fatal(err)
	}
	command, ended := s.Command, make(chan struct{})
	s.Ended = ended
	go func() {
		command.Wait() //nolint:errcheck // how it ended is seen in its log
		close(ended)
	}()
	testutil.Eventually(t, "streamshim is ready", func() bool {
		select {
		case <-ended:
			text, _ := os.ReadFile(s.Log) //nolint:errcheck // then the end alone must do
			t.Fatalf("streamshim has ended at once:\n%s", text)
		default:
		}
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		_, err := s.Runtime.Version(ctx, &runtimeapi.VersionRequest{}, grpc.WaitForReady(true))
		return err == nil
	})
}

// Install replaces its program atomically, as a package does.
func (s *Streamshim) Install(t *testing.T, program string) {
	t.Helper()
	text, err := os.ReadFile(program)
	if err == nil {
		err = os.WriteFile(s.Program+".new", text, 0o755)
	}
	if err == nil {
		err = os.Rename(s.Program+".new", s.Program)
	}
	if err != nil {
		t.Fatal(err)
	}
}

// Upgrade runs "streamshim upgrade", so that the installed program takes over.
func (s *Streamshim) Upgrade(t *testing.T, args ...string) (output string, err error) {
	t.Helper()
	c := Command(t, node.Binary(t), append([]string{"upgrade", "--admin", "unix://" + filepath.Join(s.Folder, "admin.sock")}, args...)...)
	text, err := c.CombinedOutput()
	return string(text), err
}

// Stop ends it and waits until it has ended.
func (s *Streamshim) Stop(t *testing.T, signal syscall.Signal) {
	t.Helper()
	s.Command.Process.Signal(signal) //nolint:errcheck // it may have ended
	select {
	case <-s.Ended:
	case <-time.After(testutil.Patience):
		t.Errorf("streamshim still runs %v after %v", testutil.Patience, signal)
		s.Command.Process.Kill() //nolint:errcheck // as above
		<-s.Ended
	}
}

// ExecSync runs a command through ExecSync. A timeout of zero is none.
func (s *Streamshim) ExecSync(ctx context.Context, container string, timeout time.Duration, args ...string) (*runtimeapi.ExecSyncResponse, error) {
	return s.Runtime.ExecSync(ctx, &runtimeapi.ExecSyncRequest{
		ContainerId: container, Cmd: args, Timeout: int64(timeout / time.Second),
	})
}

// MustSync runs a shell command through ExecSync and returns its output. The command must succeed.
func (s *Streamshim) MustSync(t *testing.T, container, script string) string {
	t.Helper()
	response, err := s.ExecSync(t.Context(), container, 0, "sh", "-c", script)
	if err != nil || response.ExitCode != 0 {
		t.Fatalf("%s: %v, exit code %d, %s", script, err, response.GetExitCode(), response.GetStderr())
	}
	return string(response.Stdout)
}

// Command returns a command that is killed if it does not end.
func Command(t *testing.T, name string, args ...string) *exec.Cmd {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), testutil.Patience)
	t.Cleanup(cancel)
	c := exec.CommandContext(ctx, name, args...)
	c.Cancel = func() error {
		if ctx.Err() == context.DeadlineExceeded {
			t.Errorf("killed, because it did not end within %v: %s", testutil.Patience, c)
		}
		return c.Process.Kill()
	}
	c.WaitDelay = 10 * time.Second
	return c
}

// Crictl returns a crictl command for this streamshim.
func (s *Streamshim) Crictl(t *testing.T, args ...string) *exec.Cmd {
	t.Helper()
	return Command(t, Shared.Node.Program("crictl"),
		append([]string{"--runtime-endpoint", s.Socket, "--image-endpoint", s.Socket, "--timeout", "60s"}, args...)...)
}

// Descriptors returns the number of open files of a process.
func Descriptors(pid int) int {
	entries, _ := os.ReadDir(fmt.Sprintf("/proc/%d/fd", pid)) //nolint:errcheck // 0 will not do
	return len(entries)
}
