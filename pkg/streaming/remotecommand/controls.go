package remotecommand

import (
	"io"

	"github.com/streamshim/streamshim/pkg/rescue"
	"github.com/streamshim/streamshim/pkg/session"
	"github.com/streamshim/streamshim/pkg/streaming/internal/bandwidth"
	"github.com/streamshim/streamshim/pkg/workload"
)

// beginOperating gives operators access to the session, whose process runs now. A session with a terminal can always be
// tapped, because terminals are slow. Another session can be tapped only if somebody listens from the start, because
// otherwise its output moves straight from pipe to socket.
func (s *Session) beginOperating(p Process) {
	if s.request.Command.TTY || s.session.Taps.Count() > 0 {
		s.session.Taps.Open()
	}
	if s.bandwidth == nil {
		s.bandwidth = bandwidth.New(s.terms.Bandwidth, s.client.Done(), s.freezer.frozen)
	}
	s.session.SetControls(&controls{Process: p, tty: s.request.Command.TTY, stdout: s.client.stdout, panicked: s.panicked})
}

// operatedOutput returns the client's stream for the output's copier, with taps and bandwidth limit.
func (s *Session) operatedOutput(from session.Output, to workload.Stream) workload.Stream {
	if to == nil {
		return nil
	}
	if s.session.Taps.Opened() {
		to = tappedStream{Stream: to, sent: func(p []byte) error {
			err := s.session.Taps.Output(from, p)
			if err != nil {
				s.withheld.Store(true)
			}
			return err
		}}
	}
	return s.bandwidth.Stream(to)
}

// operatedInput returns the client's stream for the input's copier, with taps and bandwidth limit. Taps have already seen
// the first *shown bytes.
func (s *Session) operatedInput(from workload.Stream, shown *int) workload.Stream {
	if s.session.Taps.Opened() {
		from = tappedStream{Stream: from, received: s.session.Taps.Input, shown: shown}
	}
	return s.bandwidth.Stream(from)
}

// controls implements session.Controls.
type controls struct {
	Process
	tty      bool
	stdout   workload.Stream
	panicked rescue.Report
}

// Notice implements session.Controls.
func (c *controls) Notice(text string) (err error) {
	if !c.tty || c.stdout == nil {
		return nil
	}
	rescue.Call(func(p *rescue.Panic) {
		c.panicked(p)
		err = p
	}, func() { _, err = io.WriteString(c.stdout, "\r\n[streamshim: "+text+"]\r\n") })
	return err
}
