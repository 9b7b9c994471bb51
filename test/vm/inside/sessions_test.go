package inside

import (
	"bufio"
	"bytes"
	"crypto/sha256"
	"fmt"
	"hash"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"sync"
	"testing"

	"github.com/creack/pty"
)

// sessions are live sessions of each kind.
type sessions struct {
	number  int
	lines   []*session
	console *os.File
	shell   *exec.Cmd
	attach  *exec.Cmd
	typed   io.Writer
	heard   *bufio.Reader
	forward *exec.Cmd
	conn    net.Conn
	mover   *mover
}

// startAll starts sessions of each kind, the commands of most of them in one container.
func startAll(t *testing.T, id string) *sessions {
	t.Helper()
	s := &sessions{}
	for _, transport := range []string{"spdy", "websocket"} {
		s.lines = append(s.lines, start(t, id, "-r", transport))
		s.number++
	}

	s.shell = exec.Command("crictl", "-r", streamshim, "exec", "-it", id, "sh")
	var err error
	if s.console, err = pty.StartWithSize(s.shell, &pty.Winsize{Rows: 24, Cols: 80}); err != nil {
		t.Fatal(err)
	}
	s.number++

	pod, attached := container{image: "lab:latest", stdin: true}.run(t, streamshim)
	s.attach = exec.Command("crictl", "-r", streamshim, "attach", "-i", attached)
	if s.typed, err = s.attach.StdinPipe(); err != nil {
		t.Fatal(err)
	}
	out, err := s.attach.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	s.heard = bufio.NewReader(out)
	if err := s.attach.Start(); err != nil {
		t.Fatal(err)
	}
	s.number++

	s.forward = exec.Command("crictl", "-r", streamshim, "port-forward", pod, "8081:80")
	if err := s.forward.Start(); err != nil {
		t.Fatal(err)
	}
	s.number++
	if err := await("the forwarded port", func() error {
		s.conn, err = net.Dial("tcp", "127.0.0.1:8081")
		return err
	}); err != nil {
		t.Fatal(err)
	}

	s.mover = move(t, id)
	s.number++
	s.answer(t)
	return s
}

// answer has each session answer.
func (s *sessions) answer(t *testing.T) {
	t.Helper()
	for _, each := range s.lines {
		each.answers(t)
	}

	s.compute(t)

	line := fmt.Sprint("hello ", s.mover.count())
	if _, err := fmt.Fprintln(s.typed, line); err != nil {
		t.Fatal(err)
	}
	for {
		got, err := s.heard.ReadString('\n')
		if err != nil {
			t.Fatalf("attach: %v after %q", err, got)
		}
		if got == "you said: "+line+"\n" {
			break
		}
	}

	// The same connection each time.
	if _, err := io.WriteString(s.conn, "GET / HTTP/1.1\r\nHost: vm\r\n\r\n"); err != nil {
		t.Fatal(err)
	}
	response, err := http.ReadResponse(bufio.NewReader(s.conn), nil)
	if err != nil {
		t.Fatalf("port-forward: %v", err)
	}
	if _, err := io.Copy(io.Discard, response.Body); err != nil || response.StatusCode != http.StatusOK {
		t.Fatalf("port-forward: %s, %v", response.Status, err)
	}
}

// compute types into the terminal and waits for what its shell computes of it, which the echo does not have.
func (s *sessions) compute(t *testing.T) {
	t.Helper()
	n := s.mover.count()
	if _, err := fmt.Fprintf(s.console, "echo sum-$((%d+1))\n", n); err != nil {
		t.Fatal(err)
	}
	want := fmt.Appendf(nil, "sum-%d", n+1)
	var got []byte
	for part := make([]byte, 4096); !bytes.Contains(got, want); {
		n, err := s.console.Read(part)
		if got = append(got, part[:n]...); err != nil {
			t.Fatalf("terminal: %v after %q", err, got)
		}
	}
}

// end ends all sessions in order, and returns how many bytes have gone through the one that moves data.
func (s *sessions) end(t *testing.T) int64 {
	t.Helper()
	for _, each := range s.lines {
		each.end(t)
	}
	if _, err := io.WriteString(s.console, "exit 3\n"); err != nil {
		t.Error(err)
	}
	rest, _ := io.ReadAll(s.console) // ends with EIO when the last process has closed it
	if err := s.shell.Wait(); err == nil || !bytes.Contains(rest, []byte("exit code 3")) {
		t.Errorf("terminal: %v: %q", err, rest)
	}
	_ = s.console.Close() // it was read to its end
	for _, command := range []*exec.Cmd{s.attach, s.forward} {
		_ = command.Process.Kill()
		_ = command.Wait()
	}
	_ = s.conn.Close()
	return s.mover.end(t)
}

// mover sends random bytes to a command that sends them back, and sums both.
type mover struct {
	command  *exec.Cmd
	stdin    io.WriteCloser
	stop     chan struct{}
	moving   sync.WaitGroup
	sent     hash.Hash
	received hash.Hash

	mu       sync.Mutex
	failures []error
	bytes    int64
}

func move(t *testing.T, id string) *mover {
	t.Helper()
	m := &mover{command: exec.Command("crictl", "-r", streamshim, "exec", "-i", id, "cat"), stop: make(chan struct{}), sent: sha256.New(), received: sha256.New()}
	var err error
	if m.stdin, err = m.command.StdinPipe(); err != nil {
		t.Fatal(err)
	}
	out, err := m.command.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	random, err := os.Open("/dev/urandom")
	if err != nil {
		t.Fatal(err)
	}
	if err := m.command.Start(); err != nil {
		t.Fatal(err)
	}
	m.moving.Go(func() {
		defer random.Close() //nolint:errcheck // was only read
		for {
			select {
			case <-m.stop:
				m.failed(m.stdin.Close())
				return
			default:
			}
			if _, err := io.CopyN(io.MultiWriter(m.stdin, m.sent), random, 64<<10); err != nil {
				m.failed(err)
				return
			}
		}
	})
	m.moving.Go(func() {
		_, err := io.Copy(io.MultiWriter(m.received, counted{m}), out)
		m.failed(err)
	})
	return m
}

// counted counts what the mover has received.
type counted struct{ *mover }

func (c counted) Write(p []byte) (int, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.bytes += int64(len(p))
	return len(p), nil
}

func (m *mover) count() int64 {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.bytes
}

func (m *mover) failed(err error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if err != nil {
		m.failures = append(m.failures, err)
	}
}

func (m *mover) end(t *testing.T) int64 {
	t.Helper()
	close(m.stop)
	m.moving.Wait()
	if err := m.command.Wait(); err != nil {
		t.Errorf("the command that moves data: %v", err)
	}
	for _, err := range m.failures {
		t.Errorf("moving data: %v", err)
	}
	if !bytes.Equal(m.sent.Sum(nil), m.received.Sum(nil)) {
		t.Errorf("what has come back of %d bytes has another sum", m.bytes)
	}
	return m.bytes
}
