package remotecommand

import (
	"io"

	"github.com/streamshim/streamshim/pkg/workload"
)

// tappedStream shows taps what moves.
type tappedStream struct {
	workload.Stream
	sent, received func([]byte) error // nil if there is no tap
	shown          *int               // for received: how many of the next bytes were already shown
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
	return t.Stream.WriteTo(tappedWriter{w, t.received, t.shown})
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
	show  func([]byte) error
	shown *int
}

// Write shows each byte once, even if it is written again because the session was frozen before it was accepted.
func (t tappedWriter) Write(p []byte) (int, error) {
	if *t.shown < len(p) {
		if err := t.show(p[*t.shown:]); err != nil {
			return 0, err
		}
		*t.shown = len(p)
	}
	n, err := t.Writer.Write(p)
	*t.shown -= n
	return n, err
}
