package remotecommand

import (
	"io"

	"github.com/streamshim/streamshim/pkg/session"
	"github.com/streamshim/streamshim/pkg/streaming/internal/bandwidth"
	"github.com/streamshim/streamshim/pkg/workload"
)

// beginOperating gives operators access to the session, whose process runs now. A terminal can always be
// listened to, because it is slow by itself; another session only if somebody listens from the start,
// because its output otherwise goes from pipe to socket without passing here.
func (s *Session) beginOperating(p Process) {
	if s.request.Command.TTY || s.session.Taps.Count() > 0 {
		s.session.Taps.Open()
	}
	if s.bandwidth == nil {
		s.bandwidth = bandwidth.New(s.terms.Bandwidth, s.client.Done(), s.freezer.frozen)
	}
	s.session.SetControls(&controls{Process: p, tty: s.request.Command.TTY, stdout: s.client.stdout})
}

// operatedOutput is the client's stream as the output's copier sees it.
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

// operatedInput is the client's stream as the input's copier sees it. Taps have seen the first bytes, as many as
// shown says.
func (s *Session) operatedInput(from workload.Stream, shown *int) workload.Stream {
	if s.session.Taps.Opened() {
		from = tappedStream{Stream: from, received: s.session.Taps.Input, shown: shown}
	}
	return s.bandwidth.Stream(from)
}

// controls implements session.Controls.
type controls struct {
	Process
	tty    bool
	stdout workload.Stream
}

// Notice implements session.Controls.
func (c *controls) Notice(text string) error {
	if !c.tty || c.stdout == nil {
		return nil
	}
	_, err := io.WriteString(c.stdout, "\r\n[streamshim: "+text+"]\r\n")
	return err
}
