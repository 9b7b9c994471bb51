package stdio

import (
	"context"
	"io"
	"os"
	"time"
)

// Kept is a stream held open for a process whose client has gone, or did not ask for it.
type Kept struct {
	Stream Keepable
	Input  bool          // hold it open without reading
	Shared bool          // the process's own terminal, not a duplicate
	Done   chan struct{} // closed when work on the stream has ended
}

// Keepable is an *os.File or a *Terminal.
type Keepable interface {
	Pollable
	SetReadDeadline(time.Time) error
}

// NewKept returns a Kept for a stream: input is held open until the process ends, output is read to its end.
func NewKept(stream Keepable, input, shared bool) *Kept {
	return &Kept{Stream: stream, Input: input, Shared: shared, Done: make(chan struct{})}
}

// Keep serves the stream until it ends, or ctx is done, and closes it. If it is frozen first, Keep leaves it open.
// If it was not frozen it calls ended, also after a panic. Then it closes Done.
func (k *Kept) Keep(ctx context.Context, exited, frozen <-chan struct{}, ended func()) {
	defer close(k.Done)
	stays := false
	defer func() { // also after a panic
		if !stays {
			k.Stream.Close()
			ended()
		}
	}()
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
	stays = closed(frozen)
}

// Freeze stops Keep, which then leaves the stream open.
func (k *Kept) Freeze() {
	_ = k.Stream.SetReadDeadline(time.Unix(1, 0)) // fails only if it is closed
	<-k.Done
}

// File returns the stream's file, and whether it is a terminal.
func (k *Kept) File() (*os.File, bool) {
	switch stream := k.Stream.(type) {
	case *Terminal:
		return stream.File, true
	case *os.File:
		return stream, false
	}
	panic("execproc: a kept stream is a file or a terminal")
}
