package streaming

import (
	"context"
	"fmt"
	"io"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"k8s.io/client-go/tools/remotecommand"

	"github.com/streamshim/streamshim/pkg/session"
	"github.com/streamshim/streamshim/pkg/streaming/event"
	"github.com/streamshim/streamshim/pkg/workload"
)

// faulty is a process one of whose methods panics.
type faulty struct {
	*hostProcess
	in   string
	gate chan struct{} // what the fault waits for; nil for nothing
}

func (f *faulty) fault(method string) {
	if f.in == method {
		if f.gate != nil {
			<-f.gate
		}
		panic("a fault of the test in " + method)
	}
}

type faultyReader struct {
	io.ReadCloser
	fault func()
}

func (r faultyReader) Read([]byte) (int, error) { r.fault(); return 0, io.EOF }

type faultyWriter struct {
	io.WriteCloser
	fault func()
}

func (w faultyWriter) Write([]byte) (int, error) { w.fault(); return 0, io.EOF }

func (f *faulty) Stdout() io.ReadCloser {
	if f.in != "Read" {
		return f.hostProcess.Stdout()
	}
	return faultyReader{f.hostProcess.Stdout(), func() { f.fault("Read") }}
}

func (f *faulty) Stdin() io.WriteCloser {
	if f.in != "Write" {
		return f.hostProcess.Stdin()
	}
	return faultyWriter{f.hostProcess.Stdin(), func() { f.fault("Write") }}
}

func (f *faulty) PID() int                   { return 1 }
func (f *faulty) ExitCode() int              { f.fault("ExitCode"); return f.hostProcess.ExitCode() }
func (f *faulty) StandIn() string            { f.fault("StandIn"); return "" }
func (f *faulty) Resize(workload.Size) error { f.fault("Resize"); return nil }

// TestPanicEndsOneSession checks that a panic in a goroutine of one session ends that session and tells its client. All
// else goes on.
func TestPanicEndsOneSession(t *testing.T) {
	runTogether(t, func(t *testing.T) {
		forEachTransport(t, func(t *testing.T, transport string) {
			for _, in := range []string{"Start", "StandIn", "Read", "Write", "Resize", "ExitCode"} {
				t.Run(in, func(t *testing.T) {
					t.Parallel()
					var panics atomic.Int32
					s := startServer(t, Config{Observe: func(e event.Event) {
						if e == event.Panicked {
							panics.Add(1)
						}
					}})
					executor := &hostExecutor{t: t}
					input, typed := io.Pipe()
					defer typed.Close()
					var echoed syncBuffer
					neighbour := remotecommand.StreamOptions{Stdin: input, Stdout: &echoed}
					neighbourURL, neighbourEnded := s.execURL(executor, neighbour, "cat"), make(chan error, 1)
					go func() { neighbourEnded <- stream(t.Context(), t, transport, neighbourURL, neighbour) }()
					eventually(t, "the neighbour's start", func() bool { return executor.count() == 1 })

					command := []string{"sh", "-c", "read line; exit 0"}
					options := remotecommand.StreamOptions{Stdin: strings.NewReader("line\n"), Stdout: io.Discard, Tty: in == "Resize"}
					if options.Tty {
						queue := make(sizes, 1)
						queue <- remotecommand.TerminalSize{Width: 1, Height: 1}
						defer close(queue)
						options.TerminalSizeQueue = queue
					}
					u := s.execURL(executorFunc(func(c workload.Command) (remoteProcess, error) {
						if in == "Start" {
							panic("a fault of the test in Start")
						}
						p, err := executor.Start(context.Background(), c)
						if err != nil {
							return nil, err
						}
						return &faulty{p.(*hostProcess), in, nil}, nil
					}), options, command...)
					if err := stream(t.Context(), t, transport, u, options); err == nil || !strings.Contains(err.Error(), "Internal error") {
						t.Errorf("the client got %v", err)
					}
					eventually(t, "the end of one session", func() bool { return len(s.config.Sessions.List()) == 1 })
					if in != "Start" {
						receive(t, executor.last().disconnected, "the process to be told")
					}
					if panics.Load() == 0 {
						t.Error("nobody was told of the panic")
					}
					fmt.Fprintln(typed, "still here")
					eventually(t, "the neighbour's echo", func() bool { return strings.Contains(echoed.String(), "still here") })
					typed.Close()
					if err := receive(t, neighbourEnded, "the neighbour's end"); err != nil {
						t.Errorf("the neighbour ended with %v", err)
					}
				})
			}
		})
	})
}

// stuck is a process whose session never ends, because a panic has left what it waits for.
type stuck struct {
	*faulty
	released chan struct{}
}

func (s *stuck) Disconnect() {
	<-s.released
	s.faulty.Disconnect()
}

// TestPanicThatLeavesALock checks a session that has panicked and left something, such as a lock, for which the rest of it
// waits for ever. It is given up: its client loses the connection, it no longer counts as a session, and a hand-over
// neither waits for it nor carries it.
func TestPanicThatLeavesALock(t *testing.T) {
	for _, in := range []string{"Read", "StandIn", "ExitCode"} {
		t.Run(in, func(t *testing.T) {
			t.Run("hand-over", func(t *testing.T) { giveUp(t, in, true, false) })
			t.Run("grace", func(t *testing.T) { giveUp(t, in, false, false) })
		})
	}
	t.Run("told to end before", func(t *testing.T) {
		t.Run("hand-over", func(t *testing.T) { giveUp(t, "Read", true, true) })
		t.Run("grace", func(t *testing.T) { giveUp(t, "Read", false, true) })
	})
}

func giveUp(t *testing.T, in string, handOver, told bool) {
	s := startCarried(t, Config{})
	port := pod(t, answer)
	neighbour := s.portForward(t, "SPDY", port)
	executor, released := &hostExecutor{t: t}, make(chan struct{})
	var gate chan struct{}
	if told {
		gate = make(chan struct{})
	}
	release := sync.OnceFunc(func() { close(released) })
	t.Cleanup(release)
	options := remotecommand.StreamOptions{Stdin: strings.NewReader("line\n"), Stdout: io.Discard}
	u := s.execURL(executorFunc(func(c workload.Command) (remoteProcess, error) {
		p, err := executor.Start(context.Background(), c)
		if err != nil {
			return nil, err
		}
		return &stuck{&faulty{p.(*hostProcess), in, gate}, released}, nil
	}), options, "sh", "-c", "read line; exit 0")
	ended := make(chan error, 1)
	go func() { ended <- stream(context.Background(), t, "SPDY", u, options) }()
	live := func() *session.Session { // the session with the command
		for _, each := range s.started.Sessions.List() {
			if each.Kind == session.Exec {
				return each
			}
		}
		return nil
	}
	if told {
		eventually(t, "the command's start", func() bool { return executor.count() == 1 && live() != nil })
		live().Stop(&session.EndError{Reason: "test", Message: "the test says so"})
		close(gate)
	}
	eventually(t, "the panic", func() bool {
		return slices.ContainsFunc(s.all(), func(each *served) bool { return each.terms.Fault.Happened() })
	})
	if handOver {
		began := time.Now()
		if carried, ended := s.upgrade(func(*State) {}); carried != 1 || ended != 0 {
			t.Errorf("%d sessions were carried, %d ended", carried, ended)
		}
		if took := time.Since(began); took > testTimeout/2 { // waiting for it would take all of testTimeout
			t.Errorf("the hand-over has waited for it: %v", took)
		}
	}
	eventually(t, "the end of the session", func() bool { return live() == nil })
	if err := receive(t, ended, "the end of its client"); err == nil {
		t.Error("its client takes the end for success")
	}
	neighbour.mustAnswer(port)
	release()
}
