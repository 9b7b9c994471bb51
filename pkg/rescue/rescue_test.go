package rescue

import (
	"bytes"
	"testing"
)

func TestPanicIsReportedAndGoesNoFurther(t *testing.T) {
	reported := make(chan *Panic, 3)
	report := func(p *Panic) { reported <- p }
	group := Group{Report: report}
	ran := false
	group.Go(func() { ran = true })
	group.Go(func() { panic("a") })
	group.Wait()
	if p := <-reported; !ran || p.Value != "a" || p.Error() != "panic: a" || !bytes.Contains(p.Stack, []byte("rescue_test.go")) {
		t.Errorf("ran %v, reported %v\n%s", ran, p, p.Stack)
	}
	Go(report, func() { panic("b") })
	if p := <-reported; p.Value != "b" {
		t.Errorf("reported %v", p)
	}
	Call(report, func() {})
	if len(reported) > 0 {
		t.Error("a panic was reported that there was not")
	}
}

// A panic that is raised again in another goroutine stays the one that it was, with the stack of where it came from.
func TestCaughtAgain(t *testing.T) {
	var first, second *Panic
	Call(func(p *Panic) { first = p }, func() { panic("a fault of the test") })
	Call(func(p *Panic) { second = p }, func() { panic(first) })
	if first == nil || first != second {
		t.Errorf("%v was raised, %v was caught", first, second)
	}
}
