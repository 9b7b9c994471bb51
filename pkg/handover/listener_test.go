package handover

import (
	"errors"
	"net"
	"testing"
	"time"

	"github.com/streamshim/streamshim/internal/testutil/leak"
)

func listen(t *testing.T) *Listener {
	t.Helper()
	inner, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	l, err := NewListener(inner)
	if err != nil {
		t.Fatal(err)
	}
	return l
}

// Who connects during a pause is served after it, and nobody is before.
func TestPause(t *testing.T) {
	leak.Check(t)
	l := listen(t)
	accepted := make(chan net.Conn)
	go func() {
		defer close(accepted)
		for {
			conn, err := l.Accept()
			if err != nil {
				if !errors.Is(err, net.ErrClosed) {
					t.Error(err)
				}
				return
			}
			accepted <- conn
		}
	}()
	dial := func() net.Conn {
		conn, err := net.Dial("tcp", l.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		return conn
	}
	for range 20 {
		before := dial()
		(<-accepted).Close()
		before.Close()
		l.Pause()
		during := dial()
		select {
		case <-accepted:
			t.Fatal("a connection was accepted during a pause")
		case <-time.After(time.Millisecond):
		}
		l.Resume()
		(<-accepted).Close()
		during.Close()
	}
	l.Pause()
	l.Close()
	<-accepted
}

// A pause waits until the one who accepts has come back, because what it was given before is to be served.
func TestPauseWaitsForTheOneWhoAccepts(t *testing.T) {
	l := listen(t)
	defer l.Close()
	soonest := time.Hour
	for attempts := 0; soonest >= pauseLimit && attempts < 10; attempts++ { // a busy machine may delay some of them
		begin := time.Now()
		l.Pause()
		soonest = min(soonest, time.Since(begin))
		l.Resume()
	}
	if soonest >= pauseLimit {
		t.Errorf("nobody has accepted yet, and the pause took %v", soonest)
	}
	conn, err := net.Dial("tcp", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	accepted, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer accepted.Close()
	begin := time.Now()
	l.Pause()
	if took := time.Since(begin); took < pauseLimit {
		t.Errorf("the one who accepts is still at work, and the pause took %v", took)
	}
}

// The queue of a paused listener goes on to the one who takes it over.
func TestListenerIsHandedOver(t *testing.T) {
	l := listen(t)
	l.Pause()
	waiting, err := net.Dial("tcp", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer waiting.Close()
	files := NewFiles()
	defer files.Close()
	kept, err := l.Keep(files)
	if err != nil {
		t.Fatal(err)
	}
	l.Close()
	next, err := files.TakeListener(kept)
	if err != nil {
		t.Fatal(err)
	}
	defer next.Close()
	conn, err := next.Accept()
	if err != nil {
		t.Fatal(err)
	}
	conn.Close()
}
