package handover

import (
	"errors"
	"fmt"
	"net"
	"os"
	"sync"
	"syscall"
	"time"
)

// Listener is a net.Listener that can pause: clients that connect meanwhile wait in the kernel's queue, for this
// program or its successor.
type Listener struct {
	inner listening

	mu        sync.Mutex
	changed   *sync.Cond
	paused    bool
	closed    bool
	accepting int // calls of the inner Accept
	parked    int // calls of Accept that wait for Resume
	served    bool
}

// listening is implemented by TCP and Unix listeners.
type listening interface {
	net.Listener
	syscall.Conn
	SetDeadline(time.Time) error
}

// NewListener returns a Listener that owns a TCP or Unix listener. For any other kind it returns an error.
func NewListener(inner net.Listener) (*Listener, error) {
	l, ok := inner.(listening)
	if !ok {
		return nil, fmt.Errorf("listener on %s: a %T cannot be handed over", inner.Addr(), inner)
	}
	listener := &Listener{inner: l}
	listener.changed = sync.NewCond(&listener.mu)
	return listener, nil
}

// Accept implements net.Listener. It waits while the listener is paused.
func (l *Listener) Accept() (net.Conn, error) {
	for {
		if err := l.enter(); err != nil {
			return nil, err
		}
		conn, err := l.inner.Accept()
		if l.leave() && errors.Is(err, os.ErrDeadlineExceeded) {
			continue
		}
		return conn, err
	}
}

func (l *Listener) enter() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.served = true
	for l.paused && !l.closed {
		l.parked++
		l.changed.Broadcast()
		l.changed.Wait()
		l.parked--
	}
	if l.closed {
		return fmt.Errorf("accept on %s: %w", l.inner.Addr(), net.ErrClosed)
	}
	l.accepting++
	return nil
}

// leave reports whether an exceeded deadline was set by Pause. The pause may be over by now.
func (l *Listener) leave() bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.accepting--
	l.changed.Broadcast()
	return !l.closed
}

// pauseLimit bounds how long Pause waits for the accepting goroutines.
const pauseLimit = time.Second

// Pause stops accepting. It returns when the goroutines that accept have registered every connection they were given and
// wait in Accept again, or after a second; the listener is paused in either case.
func (l *Listener) Pause() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.paused = true
	late := false
	timer := time.AfterFunc(pauseLimit, func() {
		l.mu.Lock()
		defer l.mu.Unlock()
		late = true
		l.changed.Broadcast()
	})
	defer timer.Stop()
	l.inner.SetDeadline(time.Unix(1, 0)) //nolint:errcheck // fails when it is closed
	for l.served && !l.closed && !late && (l.accepting > 0 || l.parked == 0) {
		l.changed.Wait()
	}
}

// Resume goes on accepting.
func (l *Listener) Resume() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.paused = false
	l.inner.SetDeadline(time.Time{}) //nolint:errcheck // fails when it is closed, which Accept reports
	l.changed.Broadcast()
}

// Close implements net.Listener.
func (l *Listener) Close() error {
	l.mu.Lock()
	l.closed = true
	l.changed.Broadcast()
	l.mu.Unlock()
	return l.inner.Close()
}

// Addr implements net.Listener.
func (l *Listener) Addr() net.Addr { return l.inner.Addr() }

// SyscallConn implements syscall.Conn.
func (l *Listener) SyscallConn() (syscall.RawConn, error) { return l.inner.SyscallConn() }

// Keep adds the listener to the files for the next program.
func (l *Listener) Keep(files *Files) (Descriptor, error) { return files.Keep(l.inner) }
