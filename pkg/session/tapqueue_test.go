package session

import (
	"bytes"
	"fmt"
	"testing"

	"github.com/streamshim/streamshim/pkg/workload"
)

func TestTapQueue(t *testing.T) {
	overflows := 0
	q := NewTapQueue(3*eventCost+10, nil, false, func() { overflows++ })
	q.Output(Stdout, []byte("abc"))
	q.Input([]byte("not wanted"))
	q.Resize(workload.Size{Width: 80, Height: 25})
	q.Output(Stderr, []byte("12345678")) // too much
	q.Output(Stderr, []byte("123"))      // fits
	<-q.Ready()
	events, more := q.Take()
	if got := describe(events); got != "out 1 abc|size 80x25|gap 8|out 2 123" || !more {
		t.Errorf("events %s, %v", got, more)
	}
	if overflows != 1 {
		t.Errorf("%d overflows", overflows)
	}
	q.Output(Stdout, []byte("next"))
	q.Output(Stdout, bytes.Repeat([]byte("x"), 1000))
	q.Close()
	q.Output(Stdout, []byte("too late"))
	<-q.Ready()
	events, more = q.Take()
	if got := describe(events); got != "out 1 next|gap 1000" || !more {
		t.Errorf("events %s, %v", got, more)
	}
	<-q.Ready()
	if events, more = q.Take(); len(events) != 0 || more {
		t.Errorf("after the end: %v, %v", events, more)
	}
}

// room is a TapRoom.
type room struct{ left int }

func (r *room) Take(n int) bool {
	if n > r.left {
		return false
	}
	r.left -= n
	return true
}

func (r *room) Return(n int) { r.left += n }

// What queues hold together is bounded, but each has some for itself; what is taken of the room comes back.
func TestTapQueueRoom(t *testing.T) {
	const shared = 100 << 10
	all := &room{shared}
	greedy, modest := NewTapQueue(1<<20, all, false, nil), NewTapQueue(1<<20, all, false, nil)
	for range 20 {
		greedy.Output(Stdout, make([]byte, 10<<10))
	}
	if all.left > 10<<10 {
		t.Errorf("%d bytes are free", all.left)
	}
	modest.Output(Stdout, make([]byte, 10<<10))
	if events, _ := modest.Take(); describe(events) != "out 1 "+string(make([]byte, 10<<10)) {
		t.Errorf("a queue that holds little misses something: %d events", len(events))
	}
	events, _ := greedy.Take()
	kept := 0
	for _, e := range events {
		kept += len(e.Data)
	}
	if kept > shared+ownTapBytes || kept < shared {
		t.Errorf("%d bytes were kept", kept)
	}
	greedy.Output(Stdout, make([]byte, 10<<10)) // its own: the room is still with what was taken
	events, _ = greedy.Take()
	if all.left != shared || len(events) != 2 || events[0].Kind != TapGap || events[0].Lost == 0 {
		t.Errorf("%d bytes are free, %d events", all.left, len(events))
	}
	greedy.Output(Stdout, make([]byte, 50<<10))
	if all.left == shared {
		t.Error("nothing was taken of the room")
	}
	greedy.Close()
	greedy.Release()
	if all.left != shared {
		t.Errorf("%d bytes are free after the end", all.left)
	}
}

func describe(events []TapEvent) string {
	text := ""
	for _, e := range events {
		if text != "" {
			text += "|"
		}
		switch e.Kind {
		case TapOutput:
			text += fmt.Sprintf("out %d %s", e.From, e.Data)
		case TapInput:
			text += fmt.Sprintf("in %s", e.Data)
		case TapResize:
			text += fmt.Sprintf("size %dx%d", e.Size.Width, e.Size.Height)
		case TapGap:
			text += fmt.Sprintf("gap %d", e.Lost)
		}
	}
	return text
}

func TestTaps(t *testing.T) {
	var taps Taps
	taps.Output(Stdout, []byte("nobody listens"))
	taps.Resize(workload.Size{Width: 1, Height: 2})
	one, two := NewTapQueue(1000, nil, true, nil), NewTapQueue(1000, nil, false, nil)
	removeOne := taps.Add(one)
	taps.Output(Stdout, []byte("a"))
	removeTwo := taps.Add(two)
	taps.Output(Stdout, []byte("b"))
	taps.Input([]byte("i"))
	removeOne()
	removeOne()
	taps.Output(Stdout, []byte("c"))
	removeTwo()
	taps.Output(Stdout, []byte("d"))
	for q, want := range map[*TapQueue]string{one: "out 1 a|out 1 b|in i", two: "out 1 b|out 1 c"} {
		events, _ := q.Take()
		if got := describe(events); got != want {
			t.Errorf("%s, want %s", got, want)
		}
	}
	if size := taps.Size(); size != (workload.Size{Width: 1, Height: 2}) || taps.Count() != 0 || taps.Opened() {
		t.Errorf("%+v, %d taps", size, taps.Count())
	}
}

func TestAuditID(t *testing.T) {
	for want, env := range map[string][]string{
		"":  nil,
		"b": {"KUBERNETES_EXEC_AUDIT_ID=a", "X=1", "KUBERNETES_EXEC_AUDIT_ID=b", "KUBERNETES_EXEC_AUDIT_ID2=c"},
	} {
		if got := AuditID(env); got != want {
			t.Errorf("%q, want %q", got, want)
		}
	}
}
