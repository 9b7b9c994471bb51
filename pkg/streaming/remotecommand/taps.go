package remotecommand

import (
	"io"

	"github.com/streamshim/streamshim/pkg/session"
	"github.com/streamshim/streamshim/pkg/workload"
)

// announcingSizes is the process with taps that hear of its terminal's sizes.
func (s *Session) announcingSizes(p Process) Process {
	return sizeAnnouncer{Process: p, taps: &s.session.Taps}
}

type sizeAnnouncer struct {
	Process
	taps *session.Taps
}

func (a sizeAnnouncer) Resize(size workload.Size) error {
	a.taps.Resize(size)
	return a.Process.Resize(size)
}

// tappedStream shows what is moved to taps.
type tappedStream struct {
	workload.Stream
	sent, received func([]byte) error // nil when nobody wants it
}

func (t tappedStream) ReadFrom(r io.Reader) (int64, error) {
	if t.sent == nil {
		return t.Stream.ReadFrom(r)
	}
	return t.Stream.ReadFrom(tappedReader{r, t.sent})
}

func (t tappedStream) WriteTo(w io.Writer) (int64, error) {
	if t.received == nil {
		return t.Stream.WriteTo(w)
	}
	return t.Stream.WriteTo(tappedWriter{w, t.received})
}

type tappedReader struct {
	io.Reader
	show func([]byte) error
}

func (t tappedReader) Read(p []byte) (int, error) {
	n, err := t.Reader.Read(p)
	if n > 0 {
		if showErr := t.show(p[:n]); showErr != nil {
			return 0, showErr
		}
	}
	return n, err
}

type tappedWriter struct {
	io.Writer
	show func([]byte) error
}

func (t tappedWriter) Write(p []byte) (int, error) {
	if err := t.show(p); err != nil {
		return 0, err
	}
	return t.Writer.Write(p)
}
