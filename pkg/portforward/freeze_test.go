package portforward

import (
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"reflect"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/streamshim/streamshim/internal/testutil"
	"github.com/streamshim/streamshim/internal/testutil/leak"
	"github.com/streamshim/streamshim/pkg/handover"
)

// All that a connection knows is in its state, and what goes on from the state knows it.
func TestStateOfAConnection(t *testing.T) {
	leak.Check(t)
	timer := func(n uint64) TimerState {
		return TimerState{Started: true, Still: time.Duration(n) * time.Hour, Acknowledged: n + 1, Taken: n + 2}
	}
	testutil.DropEachField(t, func(t *testing.T, change func(*ConnectionState)) error {
		files := handover.NewFiles()
		defer files.Close()
		begin := func(state ConnectionState) *connection {
			stream, client := newStream(t)
			t.Cleanup(func() {
				stream.conn.Close()
				client.Close()
			})
			pod, podEnd := newStream(t)
			t.Cleanup(func() {
				pod.conn.Close()
				podEnd.Close()
			})
			c := newConnection(pod.conn, stream, time.Hour)
			c.resume(state)
			t.Cleanup(func() {
				for _, timer := range []*halfClosedTimer{&c.idle, &c.late, &c.left} {
					timer.stop()
				}
			})
			return c
		}
		// The upload has ended with a fault, or with the client's FIN.
		for _, before := range []ConnectionState{{Fault: int(unix.EPIPE)}, {ClientFinished: true}} {
			before.Version, before.Sent, before.Received, before.Uploaded, before.PodFinished = connectionVersion, 1, 2, true, true
			before.Idle, before.Late, before.Left = timer(1), timer(2), timer(3)
			frozen, err := begin(before).state(files)
			if err != nil {
				t.Fatal(err)
			}
			frozen.Dialled = time.Second
			change(&frozen)
			encoded, err := handover.Encode(frozen)
			if err != nil {
				t.Fatal(err)
			}
			state, pod, err := takeConnection(encoded, files)
			if err != nil {
				return err
			}
			if pod == nil || state.Dialled != time.Second {
				return errors.New("the connection is lost, or the time of its dial")
			}
			pod.Close()
			after, err := begin(state).state(files)
			if err != nil {
				t.Fatal(err)
			}
			for _, timer := range []*TimerState{&after.Idle, &after.Late, &after.Left} {
				timer.Still = timer.Still.Truncate(time.Minute)
			}
			after.Pod = 0
			if !reflect.DeepEqual(after, before) {
				return fmt.Errorf("it was %+v and is %+v", before, after)
			}
		}
		return nil
	})
}

// A sandbox is watched over with the handles that were carried: its end is seen, nothing else at its path is taken for it.
func TestForwarderGoesOn(t *testing.T) {
	testutil.DropEachField(t, func(t *testing.T, change func(*ForwarderState)) error {
		leak.Check(t)
		watcher := newWatcher(t)
		pause := process(t)
		pod := newSandbox(t)
		port := pod.listen("127.0.0.1:0", func(conn *net.TCPConn) {
			defer conn.Close()
			io.Copy(conn, conn)
		})
		resume := func() (*Forwarder, error) {
			before := newForwarder(t, pod.path, Config{SandboxPID: pause.Process.Pid})
			before.Freeze()
			files := handover.NewFiles()
			defer files.Close()
			encoded, err := before.State(files)
			if err != nil {
				t.Fatal(err)
			}
			before.Close()
			var state ForwarderState
			if err := handover.Decode(encoded, &state); err != nil {
				t.Fatal(err)
			}
			change(&state)
			if encoded, err = handover.Encode(state); err != nil {
				t.Fatal(err)
			}
			f, err := ResumeForwarder(encoded, files, Config{Watcher: watcher})
			if err == nil {
				t.Cleanup(func() { f.Close() })
			}
			return f, err
		}
		f, err := resume()
		if err != nil {
			return err
		}
		conn, err := f.Dial(t.Context(), port)
		if err != nil {
			return err
		}
		conn.Close()
		pause.Process.Kill()
		limit := 2 * time.Second // for what does not come, because a field is missing
		if strings.HasSuffix(t.Name(), "/complete") {
			limit = patience
		}
		select {
		case <-f.Gone():
		case <-time.After(limit):
			return errors.New("the end of the sandbox's process is not seen")
		}
		// Of a sandbox that has gone nothing is carried but that.
		encoded, err := f.State(handover.NewFiles())
		if err != nil {
			return err
		}
		var state ForwarderState
		if err := handover.Decode(encoded, &state); err != nil {
			t.Fatal(err)
		}
		change(&state)
		if encoded, err = handover.Encode(state); err != nil {
			t.Fatal(err)
		}
		gone, err := ResumeForwarder(encoded, handover.NewFiles(), Config{Watcher: watcher})
		if err != nil {
			return err
		}
		defer gone.Close()
		if !is(gone.Gone()) {
			return errors.New("a sandbox that has gone is there")
		}
		return nil
	})
}

// A namespace that took the path of the one that was frozen is another pod's.
func TestReusedPathIsNotBelieved(t *testing.T) {
	leak.Check(t)
	pod, other := newSandbox(t), newSandbox(t)
	before := newForwarder(t, pod.path, Config{})
	files := handover.NewFiles()
	defer files.Close()
	encoded, err := before.State(files)
	if err != nil {
		t.Fatal(err)
	}
	before.Close()
	if err := errors.Join(unix.Unmount(pod.path, unix.MNT_DETACH), unix.Mount(other.path, pod.path, "", unix.MS_BIND, "")); err != nil {
		t.Fatal(err)
	}
	f, err := ResumeForwarder(encoded, files, Config{})
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if !is(f.Gone()) {
		t.Error("another namespace is taken for the sandbox's")
	}
	if _, err := f.Dial(t.Context(), 1); !errors.Is(err, ErrSandboxGone) {
		t.Errorf("dialled: %v", err)
	}
}

// A dial under way at the freeze is begun again with the rest of its time.
func TestDialGoesOnForTheRestOfItsTime(t *testing.T) {
	leak.Check(t)
	pod := newSandbox(t)
	port := pod.listenFull()
	const limit = time.Minute
	config := Config{Dialer: Dialer{TryTimeout: limit, TotalTimeout: limit}}
	f := newForwarder(t, pod.path, config)
	_, _, done := start(t, func(stream *tcpStream) (int64, int64, error) { return f.Forward(t.Context(), port, stream) })
	time.Sleep(100 * time.Millisecond)
	f.Freeze()
	var frozen *FrozenError
	if got := within(t, "the frozen dial", done); !errors.As(got.err, &frozen) || !errors.Is(got.err, handover.ErrFrozen) {
		t.Fatalf("it ended with %v", got.err)
	}
	if frozen.dialled < 100*time.Millisecond || frozen.dialled > limit {
		t.Errorf("dialled for %v", frozen.dialled)
	}
	frozen.dialled = limit - 100*time.Millisecond
	encoded, err := frozen.State(handover.NewFiles())
	if err != nil {
		t.Fatal(err)
	}
	next := newForwarder(t, pod.path, config)
	_, _, done = start(t, func(stream *tcpStream) (int64, int64, error) {
		return next.Continue(encoded, handover.NewFiles(), port, stream)(t.Context())
	})
	checkOutcome(t, done, 0, 0, os.ErrDeadlineExceeded)
}

func FuzzConnectionState(f *testing.F) {
	encoded, err := handover.Encode(ConnectionState{Version: connectionVersion, Sent: 1, Idle: TimerState{Started: true}})
	if err != nil {
		f.Fatal(err)
	}
	f.Add(encoded)
	f.Fuzz(func(_ *testing.T, encoded []byte) { takeConnection(encoded, handover.NewFiles()) })
}

func FuzzForwarderState(f *testing.F) {
	encoded, err := handover.Encode(ForwarderState{Version: forwarderVersion})
	if err != nil {
		f.Fatal(err)
	}
	f.Add(encoded)
	f.Fuzz(func(_ *testing.T, encoded []byte) {
		if f, err := ResumeForwarder(encoded, handover.NewFiles(), Config{}); err == nil {
			f.Close()
		}
	})
}
