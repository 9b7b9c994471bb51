package remotecommand

import (
	"testing"

	"github.com/streamshim/streamshim/pkg/rescue"
	"github.com/streamshim/streamshim/pkg/workload"
)

// TestNoticeThatPanics checks that a panic in a notice, whose caller belongs to no session, ends the session alone.
func TestNoticeThatPanics(t *testing.T) {
	var told *rescue.Panic
	c := &controls{tty: true, stdout: struct{ workload.Stream }{}, panicked: func(p *rescue.Panic) { told = p }} // without a stream
	if err := c.Notice("hello"); err == nil || told == nil {
		t.Errorf("the notice has returned %v, and the session was told of %v", err, told)
	}
}
