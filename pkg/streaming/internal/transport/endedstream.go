package transport

import (
	"cmp"
	"errors"
	"io"

	"github.com/streamshim/streamshim/pkg/rescue"
)

var errStreamEnded = errors.New("the stream has ended")

// EndedStream is a workload.Stream that had ended in both directions before its connection was handed over.
type EndedStream struct {
	Number uint32   // see StreamID
	Moved  [2]int64 // bytes received and sent
	Cause  error    // why the stream was cut; nil after an orderly end
}

func (e *EndedStream) over() error { return cmp.Or(e.Cause, errStreamEnded) }

// Read implements workload.Stream, as the methods below do.
func (e *EndedStream) Read([]byte) (int, error) { return 0, e.over() }

// Write fails.
func (e *EndedStream) Write([]byte) (int, error) { return 0, e.over() }

// ReadFrom fails.
func (e *EndedStream) ReadFrom(io.Reader) (int64, error) { return 0, e.over() }

// WriteTo fails.
func (e *EndedStream) WriteTo(io.Writer) (int64, error) { return 0, e.over() }

// InputEnded is true.
func (e *EndedStream) InputEnded() bool { return true }

// CloseWrite does nothing.
func (e *EndedStream) CloseWrite() error { return nil }

// CloseRead does nothing.
func (e *EndedStream) CloseRead() {}

// Reset does nothing.
func (e *EndedStream) Reset() error { return nil }

// Err returns why the stream was cut.
func (e *EndedStream) Err() error { return e.Cause }

// AfterReset calls f at once if the stream was cut.
func (e *EndedStream) AfterReset(f func()) {
	if e.Cause != nil {
		rescue.Go(rescue.Die, f)
	}
}

// Received returns the number of bytes received.
func (e *EndedStream) Received() int64 { return e.Moved[0] }

// Sent returns the number of bytes sent.
func (e *EndedStream) Sent() int64 { return e.Moved[1] }

// ID returns the stream's number.
func (e *EndedStream) ID() uint32 { return e.Number }
