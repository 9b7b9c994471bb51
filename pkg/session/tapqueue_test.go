package session

import (
	"bytes"
	"fmt"
	"testing"

	"github.com/streamshim/streamshim/pkg/workload"
)

func TestTapQueue(t *testing.T) {
	overflows := 0
	q := NewTapQueue(3*eventCost+10, false, func() { overflows++ })
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
	one, two := NewTapQueue(1000, true, nil), NewTapQueue(1000, false, nil)
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
