// Package bandwidth limits the streams of a session to a number of bytes a second.
package bandwidth

import (
	"io"
	"time"

	"github.com/streamshim/streamshim/pkg/workload"
)

// Limit limits the streams of one session to a number of bytes a second in each direction. A nil Limit limits
// nothing.
type Limit struct {
	sent, received *tokenBucket
}

// New returns a limit for the streams of one session, or nil if bytesPerSecond is 0. Waits end when end or frozen is
// closed. Bytes that move after that still count.
func New(bytesPerSecond int64, end, frozen <-chan struct{}) *Limit {
	if bytesPerSecond <= 0 {
		return nil
	}
	return &Limit{sent: newTokenBucket(bytesPerSecond, end, frozen), received: newTokenBucket(bytesPerSecond, end, frozen)}
}

// State is when the token bucket of each direction will be full again.
type State struct{ Sent, Received time.Time }

// State returns the zero State where there is no limit.
func (b *Limit) State() State {
	if b == nil {
		return State{}
	}
	return State{Sent: b.sent.state(), Received: b.received.state()}
}

// Resume continues from the state of another limit.
func (b *Limit) Resume(from State) {
	if b != nil {
		b.sent.resume(from.Sent)
		b.received.resume(from.Received)
	}
}

// Stream returns the stream with the limit applied.
func (b *Limit) Stream(s workload.Stream) workload.Stream {
	if b == nil {
		return s
	}
	return limitedStream{s, b}
}

// limitedStream limits ReadFrom and WriteTo, the two ways by which sessions move bytes in bulk.
type limitedStream struct {
	workload.Stream
	limit *Limit
}

func (l limitedStream) ReadFrom(r io.Reader) (int64, error) {
	return l.Stream.ReadFrom(limitedReader{r, l.limit.sent})
}

func (l limitedStream) WriteTo(w io.Writer) (int64, error) {
	return l.Stream.WriteTo(limitedWriter{w, l.limit.received})
}

type limitedReader struct {
	io.Reader
	bucket *tokenBucket
}

func (l limitedReader) Read(p []byte) (int, error) {
	n, err := l.Reader.Read(p[:min(len(p), l.bucket.burst)])
	l.bucket.take(n)
	return n, err
}

type limitedWriter struct {
	io.Writer
	bucket *tokenBucket
}

func (l limitedWriter) Write(p []byte) (int, error) {
	written := 0
	for written < len(p) {
		n, err := l.Writer.Write(p[written:min(len(p), written+l.bucket.burst)])
		l.bucket.take(n)
		written += n
		if err != nil {
			return written, err
		}
	}
	return written, nil
}
