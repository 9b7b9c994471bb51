package stdio

import (
	"context"
	"io"
	"os"
	"time"
)

// Kept is a stream that stays open for a process whose client has gone, or did not want it.
type Kept struct {
	Stream Keepable
	Input  bool          // held open, not read
	Shared bool          // it is the process's own terminal and no duplicate
	Done   chan struct{} // closed when nobody works on it any more
}

// Keepable is an *os.File or a terminal.
type Keepable interface {
	Pollable
	SetReadDeadline(time.Time) error
}

// NewKept keeps a stream from now on: input open until the process ends, output read to its end.
func NewKept(stream Keepable, input, shared bool) *Kept {
	return &Kept{Stream: stream, Input: input, Shared: shared, Done: make(chan struct{})}
}

// Keep works on a stream until it ends or the context is done, and closes it; or until it is frozen, and leaves it open.
// It reports whether it was frozen.
func (k *Kept) Keep(ctx context.Context, exited, frozen <-chan struct{}) bool {
	if k.Input {
		select {
		case <-exited:
		case <-frozen:
		case <-ctx.Done():
		}
	} else {
		stop := context.AfterFunc(ctx, func() { k.Stream.Close() })
		_, _ = io.Copy(io.Discard, k.Stream)
		stop()
	}
	if closed(frozen) {
		return true
	}
	k.Stream.Close()
	return false
}

// Freeze ends the work on the stream, and leaves it open if it was open.
func (k *Kept) Freeze() {
	_ = k.Stream.SetReadDeadline(time.Unix(1, 0)) // one that is closed needs none
	<-k.Done
}

// File is the stream's, and whether it is a terminal.
func (k *Kept) File() (*os.File, bool) {
	switch stream := k.Stream.(type) {
	case *Terminal:
		return stream.File, true
	case *os.File:
		return stream, false
	}
	panic("execproc: a kept stream is a file or a terminal")
}
