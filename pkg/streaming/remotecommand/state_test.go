package remotecommand

import (
	"context"
	"io"
	"log/slog"
	"net"
	"os"
	"reflect"
	"syscall"
	"testing"
	"time"

	"github.com/opencontainers/runtime-spec/specs-go"

	"github.com/streamshim/streamshim/internal/testutil"
	"github.com/streamshim/streamshim/internal/testutil/leak"
	"github.com/streamshim/streamshim/pkg/handover"
	"github.com/streamshim/streamshim/pkg/session"
	"github.com/streamshim/streamshim/pkg/streaming/buffers"
	"github.com/streamshim/streamshim/pkg/streaming/event"
	"github.com/streamshim/streamshim/pkg/streaming/internal/bandwidth"
	"github.com/streamshim/streamshim/pkg/streaming/internal/holdback"
	"github.com/streamshim/streamshim/pkg/streaming/internal/lifetime"
	"github.com/streamshim/streamshim/pkg/streaming/internal/spdy"
	"github.com/streamshim/streamshim/pkg/streaming/internal/status"
	"github.com/streamshim/streamshim/pkg/streaming/internal/transport"
	"github.com/streamshim/streamshim/pkg/streaming/remotecommand/internal/drain"
	"github.com/streamshim/streamshim/pkg/streaming/remotecommand/internal/stdin"
	"github.com/streamshim/streamshim/pkg/streaming/remotecommand/internal/terminal"
	"github.com/streamshim/streamshim/pkg/workload"
)

// idle is a process that does nothing, and its runtime.
type idle struct{ state []byte }

func (i *idle) Start(context.Context, workload.Container, workload.Command) (Process, error) {
	return i, nil
}
func (i *idle) Resume(_ context.Context, state []byte, _ *handover.Files) (Process, error) {
	i.state = state
	return i, nil
}
func (i *idle) StreamingURL(context.Context, session.Kind, []byte, map[string]string) (string, error) {
	return "", io.EOF
}
func (i *idle) EndReason(context.Context, workload.Target) string { return "" }
func (i *idle) Stdin() io.WriteCloser                             { return nil }
func (i *idle) Stdout() io.ReadCloser                             { return nil }
func (i *idle) Stderr() io.ReadCloser                             { return nil }
func (i *idle) Resize(workload.Size) error                        { return nil }
func (i *idle) Exited() <-chan struct{}                           { return nil }
func (i *idle) ExitCode() int                                     { return 0 }
func (i *idle) ContainerExited() <-chan struct{}                  { return nil }
func (i *idle) ContainerEnding() bool                             { return false }
func (i *idle) PID() int                                          { return 0 }
func (i *idle) StandIn() string                                   { return "" }
func (i *idle) Signal(syscall.Signal) error                       { return nil }
func (i *idle) Disconnect()                                       {}
func (i *idle) Kill()                                             {}
func (i *idle) Close() error                                      { return nil }
func (i *idle) Discard()                                          {}
func (i *idle) Freeze(*handover.Files) ([]byte, error)            { return i.state, nil }

// frozenConn returns the state of a connection that was not used yet.
func frozenConn(t testing.TB, files *handover.Files, make func(net.Conn) *spdy.Conn) transport.State {
	t.Helper()
	_, network := testutil.TCPPair(t)
	conn := transport.Streams{Conn: make(network)}
	conn.Freeze()
	state, err := conn.State(files)
	if err != nil {
		t.Fatal(err)
	}
	return state
}

func keptPipe(t testing.TB, files *handover.Files) handover.Descriptor {
	t.Helper()
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	defer w.Close()
	kept, err := files.Keep(r)
	if err != nil {
		t.Fatal(err)
	}
	return kept
}

func newServerConn(c net.Conn) *spdy.Conn { return spdy.NewServer(c, nil, spdy.Config{}) }

// wholeState returns a state with something in each field.
func wholeState(t testing.TB, files *handover.Files) State {
	at := time.Now().Add(time.Hour)
	streams := map[string]StreamState{}
	for i, name := range []string{transport.StreamError, transport.StreamStdin, transport.StreamStdout, transport.StreamStderr} {
		streams[name] = StreamState{uint32(2*i + 1), int64(i + 10), int64(i + 20)} // ended long ago
	}
	return State{
		Envelope: Envelope{
			Version: stateVersion,
			Client: ClientState{
				Conn: frozenConn(t, files, newServerConn), Protocol: "v4.channel.k8s.io", Resize: true, JSONStatus: true, Ready: true,
				Streams: streams, AnswersItself: true, SendsSize: true, Holdback: &holdback.State{At: at, Level: 1, Rate: 2, Unanswered: 3, Asked: true, Ever: true},
			},
			Process: &ProcessState{Local: []byte("process")},
		},
		Phase: draining, Deadline: at,
		Request: Request{
			Container: workload.Container{Target: workload.Target{ContainerID: "c"}, Runtime: "runc", Process: &specs.Process{Cwd: "/"}},
			Command:   workload.Command{Args: []string{"sh"}, Stdin: true, Stdout: true, Stderr: true}, Trace: map[string]string{"a": "b"}, Call: []byte("call"),
		},
		Ending: EndingState{
			Reason: "exited", ExitCode: 3, Error: "why", Status: status.Exit(3, ""), Line: "line", Said: true, Hold: true, Holding: at,
			Stopped: true, Unopened: true, WatchesStop: true, HeldInput: keptPipe(t, files),
		},
		CutAt:    at,
		Terminal: terminal.State{Size: workload.Size{Width: 1, Height: 2}, Announced: workload.Size{Width: 3, Height: 4}, Pending: []byte(`{"W`)},
		Input: &stdin.State{
			Ended: true, Cut: true, Stopped: true, Left: true, Failed: true, Moved: 5, Shown: 6, Unread: keptPipe(t, files), Since: at,
			Last: stdin.Progress{Moved: 7, Received: 8, Pending: 9}, EndSeen: true,
		},
		Drain: drain.State{Until: at, Stopped: true, Outputs: []drain.OutputState{
			{Name: session.Stdout, Ended: true, Discarded: true, Looks: 1, Looked: true, LookUntil: at, Pending: 2},
			{Name: session.Stderr, Ended: true, Discarded: true, Looks: 2, Looked: true, LookUntil: at, Pending: 3},
		}},
		Timeouts:  &lifetime.TimeoutsState{Last: at, Moved: 10, Warned: true, WarnedOfLife: true, Own: 11},
		Bandwidth: bandwidth.State{Sent: at, Received: at},
		Withheld:  true, Warnings: []string{"soon"},
	}
}

// allTerms returns the terms of a session that has all limits.
func allTerms() lifetime.Terms {
	return lifetime.Terms{
		Limits:    lifetime.Limits{Idle: time.Hour, Max: 24 * time.Hour, Warning: time.Minute},
		Bandwidth: 1 << 20, Buffers: buffers.New(1 << 20).Share(), Observe: func(event.Event) {},
	}
}

func liveSession(t testing.TB) *session.Session {
	t.Helper()
	live, err := session.NewRegistry(slog.New(slog.DiscardHandler)).Begin(t.Context(), session.Info{Kind: session.Exec, TTY: true})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { live.End(session.Outcome{}) })
	return live
}

// leaves calls f with each value below v that is not a struct, and its path.
func leaves(path string, v reflect.Value, f func(path string, v reflect.Value)) {
	if _, ok := v.Interface().(time.Time); ok {
		f(path, v)
		return
	}
	switch v.Kind() {
	case reflect.Struct:
		for i := range v.NumField() {
			if v.Type().Field(i).IsExported() {
				leaves(path+"."+v.Type().Field(i).Name, v.Field(i), f)
			}
		}
	case reflect.Pointer:
		if !v.IsNil() {
			leaves(path, v.Elem(), f)
			return
		}
		f(path, v)
	default:
		f(path, v)
	}
}

// TestEachFieldOfAState checks that what is in a state is there again when the session resumed from it is frozen. It finds
// a field that is missing in wholeState, or that Resume or Freeze forgets.
func TestEachFieldOfAState(t *testing.T) {
	leak.Check(t)
	files := handover.NewFiles()
	defer files.Close()
	state := wholeState(t, files)
	elsewhere := map[string]bool{ // what belongs to others, or to an alternative
		".Envelope.Process.Relay": true, ".Envelope.Client.Conn": true, ".Request.Container": true, ".Request.Command": true, ".Ending.Status": true,
	}
	under := func(path string) bool {
		for other := range elsewhere {
			if len(path) >= len(other) && path[:len(other)] == other {
				return true
			}
		}
		return false
	}
	leaves("", reflect.ValueOf(state), func(path string, v reflect.Value) {
		if v.IsZero() && !under(path) {
			t.Errorf("%s is empty in the state of the test", path)
		}
	})
	encoded, err := handover.Encode(state)
	if err != nil {
		t.Fatal(err)
	}
	s, err := Resume(t.Context(), encoded, files, liveSession(t), Config{Runtime: &idle{}}, allTerms())
	if err != nil {
		t.Fatal(err)
	}
	s.client.Freeze()
	s.limits.Stop()
	if encoded, err = s.collect(files); err != nil {
		t.Fatal(err)
	}
	var again State
	if err := handover.Decode(encoded, &again); err != nil {
		t.Fatal(err)
	}
	// The part for starting is not carried any further, and descriptors have other numbers.
	state.Request.Call, state.Request.Container.Process, state.Request.Command.Args = nil, nil, nil
	for _, d := range []*handover.Descriptor{&again.Ending.HeldInput, &again.Input.Unread, &again.Client.Conn.Descriptor} {
		if *d == 0 {
			t.Error("a descriptor is missing")
		}
	}
	again.Ending.HeldInput, again.Input.Unread, again.Client.Conn.Descriptor = state.Ending.HeldInput, state.Input.Unread, state.Client.Conn.Descriptor
	values := map[string]reflect.Value{}
	leaves("", reflect.ValueOf(again), func(path string, v reflect.Value) { values[path] = v })
	leaves("", reflect.ValueOf(state), func(path string, v reflect.Value) {
		if !same(v, values[path]) {
			t.Errorf("%s: was %v and is %v", path, v, values[path])
		}
	})
}

// same compares times, but ignores what reading a wall clock costs.
func same(a, b reflect.Value) bool {
	if !b.IsValid() || a.Type() != b.Type() {
		return false
	}
	if at, ok := a.Interface().(time.Time); ok {
		return b.Interface().(time.Time).Sub(at).Abs() < time.Millisecond
	}
	if outputs, ok := a.Interface().([]drain.OutputState); ok {
		others := b.Interface().([]drain.OutputState)
		for i := range outputs {
			if i >= len(others) || !same(reflect.ValueOf(outputs[i].LookUntil), reflect.ValueOf(others[i].LookUntil)) {
				return false
			}
			others[i].LookUntil = outputs[i].LookUntil
		}
	}
	return reflect.DeepEqual(a.Interface(), b.Interface())
}

// TestStatesThatAreRefused checks that a session which this program cannot continue still tells its client.
func TestStatesThatAreRefused(t *testing.T) {
	for name, spoil := range map[string]func(*State){
		"another version":      func(s *State) { s.Version++ },
		"an unknown phase":     func(s *State) { s.Phase = "dancing" },
		"no status":            func(s *State) { s.Ending.Status = nil },
		"no process":           func(s *State) { s.Process = nil },
		"two processes":        func(s *State) { s.Process.Relay = []byte{1} },
		"an unreadable relay":  func(s *State) { s.Process = &ProcessState{Relay: []byte{1}} },
		"one output":           func(s *State) { s.Drain.Outputs = s.Drain.Outputs[:1] },
		"an impossible output": func(s *State) { s.Drain.Outputs[0].Pending = -2 },
		"impossible input":     func(s *State) { s.Input.Shown = -1 },
		"no input to finish":   func(s *State) { s.Phase, s.Input = finishing, nil },
	} {
		t.Run(name, func(t *testing.T) {
			leak.Check(t)
			files := handover.NewFiles()
			defer files.Close()
			state := wholeState(t, files)
			state.Ending.Unopened = false
			spoil(&state)
			encoded, err := handover.Encode(state)
			if err != nil {
				t.Fatal(err)
			}
			if err := CheckState(encoded); err == nil && name != "an unreadable relay" {
				t.Error("the check finds nothing")
			}
			s, err := Resume(t.Context(), encoded, files, liveSession(t), Config{Runtime: &idle{}}, allTerms())
			if err != nil {
				t.Fatal(err)
			}
			defer func() {
				s.client.Freeze()
				s.client.Discard()
			}()
			if s.at != telling || s.process != nil || s.ending.outcome.Reason != reasonNotCarried || s.ending.status.Status != "Failure" {
				t.Errorf("phase %s, %+v, %+v", s.at, s.ending.outcome, s.ending.status)
			}
		})
	}
}

func FuzzState(f *testing.F) {
	files := handover.NewFiles()
	defer files.Close()
	encoded, err := handover.Encode(wholeState(f, files))
	if err != nil {
		f.Fatal(err)
	}
	f.Add(encoded)
	live := liveSession(f)
	f.Fuzz(func(t *testing.T, encoded []byte) {
		CheckState(encoded)
		files := handover.NewFiles()
		defer files.Close()
		s, err := Resume(context.Background(), encoded, files, live, Config{Runtime: &idle{}}, allTerms())
		if err == nil {
			s.client.Freeze()
			s.client.Discard()
		}
	})
}
