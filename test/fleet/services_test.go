package fleet

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/streamshim/streamshim/test/internal/kubernetes"
)

// services supervises the kubelet and streamshim of one node of a test cluster as systemd would: this
// machine's process 1 is none. It reads the unit that was installed, starts its ExecStart and waits for
// READY=1 (sd_notify(3)). What it does not have: everything else that a unit says.
type services struct {
	t    *testing.T
	node *kubernetes.Node
	// units is the folder of the units that were installed, program the path of the systemctl.
	units, program string

	mu          sync.Mutex
	kubelet     []string // the command line that the cluster gave it
	crashOnMove bool     // end streamshim for good when the kubelet is restarted
	log         []string // the verbs that were asked for
}

const stopGrace = 15 * time.Second

func newServices(t *testing.T, node *kubernetes.Node, dir string) *services {
	t.Helper()
	s := &services{t: t, node: node, units: filepath.Join(dir, "units"), program: filepath.Join(dir, "systemctl")}
	if err := os.MkdirAll(s.units, 0o755); err != nil {
		t.Fatal(err)
	}
	build := exec.Command("go", "build", "-buildvcs=false", "-o", s.program, "./systemctl")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", node.PID("kubelet")))
	if err != nil {
		t.Fatal(err)
	}
	s.kubelet = strings.Split(strings.TrimSuffix(string(text), "\x00"), "\x00")
	listener, err := net.Listen("unix", filepath.Join(dir, "services.sock"))
	if err != nil {
		t.Fatal(err)
	}
	server := &http.Server{Handler: s}
	served := make(chan error, 1)
	go func() { served <- server.Serve(listener) }()
	t.Cleanup(func() {
		server.Close()
		<-served
	})
	return s
}

func (s *services) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	var args []string
	err := json.NewDecoder(r.Body).Decode(&args)
	if err == nil {
		err = s.do(r.Context(), args)
	}
	if err != nil {
		http.Error(w, err.Error(), http.StatusInternalServerError)
	}
}

func (s *services) do(ctx context.Context, args []string) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	verb, unit := args[0], args[len(args)-1]
	if verb != "is-active" {
		s.log = append(s.log, strings.Join(args, " "))
	}
	switch {
	case verb == "daemon-reload":
		return nil
	case unit == "kubelet.service" && verb == "restart":
		if s.crashOnMove {
			if err := s.node.StopCompanion("fleet-streamshim", 0); err != nil {
				return err
			}
		}
		if err := s.node.StopKubelet(); err != nil {
			return err
		}
		return s.node.StartCompanion("kubelet", s.kubelet[0], s.kubelet[1:]...)
	case unit == "streamshim.service" && verb == "restart":
		return s.restartStreamshim(ctx)
	case unit == "streamshim.service" && verb == "enable":
		_, err := os.Stat(filepath.Join(s.units, unit))
		return err
	case unit == "streamshim.service" && verb == "disable" && slices.Contains(args, "--now"):
		if _, err := os.Stat(filepath.Join(s.units, unit)); err != nil {
			return err
		}
		return s.node.StopCompanion("fleet-streamshim", stopGrace)
	case verb == "is-active" && unit == "streamshim.service" && s.node.PID("fleet-streamshim") != 0:
		return nil
	case verb == "is-active":
		return errors.New("inactive")
	}
	return fmt.Errorf("%v: not known here", args)
}

func (s *services) restartStreamshim(ctx context.Context) error {
	if err := s.node.StopCompanion("fleet-streamshim", stopGrace); err != nil {
		return err
	}
	text, err := os.ReadFile(filepath.Join(s.units, "streamshim.service"))
	if err != nil {
		return err
	}
	var command []string
	for line := range strings.Lines(string(text)) {
		if value, ok := strings.CutPrefix(line, "ExecStart="); ok {
			command = strings.Fields(value)
		}
	}
	if len(command) == 0 {
		return errors.New("the unit has no ExecStart")
	}
	path := filepath.Join(filepath.Dir(s.program), "notify.sock")
	os.Remove(path)
	socket, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: path, Net: "unixgram"})
	if err != nil {
		return err
	}
	defer socket.Close()
	os.Setenv("NOTIFY_SOCKET", path)
	err = s.node.StartCompanion("fleet-streamshim", command[0], command[1:]...)
	os.Unsetenv("NOTIFY_SOCKET")
	if err != nil {
		return err
	}
	buffer := make([]byte, 4096)
	for deadline := time.Now().Add(time.Minute); time.Now().Before(deadline) && ctx.Err() == nil; {
		socket.SetReadDeadline(time.Now().Add(200 * time.Millisecond))
		n, err := socket.Read(buffer)
		if err == nil && bytes.Contains(buffer[:n], []byte("READY=1")) {
			return nil
		}
		if s.node.PID("fleet-streamshim") == 0 {
			return errors.New("streamshim.service failed; see its log " + s.node.LogPath("fleet-streamshim"))
		}
	}
	return errors.New("streamshim.service has not said that it is ready within a minute")
}

// asked returns the verbs since the last call.
func (s *services) asked() []string {
	s.mu.Lock()
	defer s.mu.Unlock()
	log := s.log
	s.log = nil
	return log
}

func (s *services) setCrashOnMove(on bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.crashOnMove = on
}

// safeBuffer is a buffer that a process writes while the test reads.
type safeBuffer struct {
	mu   sync.Mutex
	text bytes.Buffer
}

func (b *safeBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.text.Write(p)
}

func (b *safeBuffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.text.String()
}
