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
