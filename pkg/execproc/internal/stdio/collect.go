package stdio

import (
	"io"
	"sync"
	"time"

	"github.com/streamshim/streamshim/pkg/rescue"
)

// Room bounds the output that several RunSyncs keep.
type Room interface {
	// Take reserves n bytes, all or none, and reports whether there was room.
	Take(n int) bool
	// Return releases n bytes.
	Return(n int)
}

// ownOutput is how many bytes of output each RunSync keeps without needing room. It exceeds a probe's output, of
// which the kubelet reads 10 KiB.
const ownOutput = 64 << 10

// Collector collects a process's output up to a limit and drops the rest.
type Collector struct {
	Done chan struct{} // closed when both streams have ended
	Full chan struct{} // closed when the shared room was exhausted, or reading has panicked

	mu             sync.Mutex
	left           int // of the limit
	own            int // of ownOutput
	shared         Room
	taken          int // of shared
	refused        bool
	Stdout, Stderr []byte // valid once Done is closed
	last           time.Time
	panic          *rescue.Panic
}

// Collect reads both streams to their ends. It keeps up to limit bytes of both together; all but the first
// ownOutput need shared room.
func Collect(stdout, stderr io.Reader, limit int, shared Room) *Collector {
	c := &Collector{Done: make(chan struct{}), Full: make(chan struct{}), left: limit, own: ownOutput, shared: shared}
	stderrRead := rescue.Group{Report: c.panicked}
	read := func(from io.Reader, to *[]byte) {
		buffer := make([]byte, 32<<10)
		for {
			n, err := from.Read(buffer)
			c.add(to, buffer[:n])
			if err != nil {
				return
			}
		}
	}
	stderrRead.Go(func() { read(stderr, &c.Stderr) })
	rescue.Go(rescue.Die, func() {
		rescue.Call(c.panicked, func() { read(stdout, &c.Stdout) })
		stderrRead.Wait()
		close(c.Done)
	})
	return c
}

// panicked has nothing more kept: who waits learns that something is missing.
func (c *Collector) panicked(fault *rescue.Panic) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.panic = fault
	c.refuseLocked()
}

func (c *Collector) refuseLocked() {
	if !c.refused {
		c.refused = true
		close(c.Full)
	}
}

// Panic returns the panic with which reading has ended, once Done is closed; nil when there was none.
func (c *Collector) Panic() *rescue.Panic {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.panic
}

func (c *Collector) add(to *[]byte, data []byte) {
	if len(data) == 0 {
		return
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.last = time.Now()
	if data = data[:min(len(data), c.left)]; !c.takeLocked(len(data)) {
		return
	}
	c.left -= len(data)
	*to = append(*to, data...)
}

// takeLocked reserves room for n bytes. After a refusal nothing more is kept, so that the output has no gap.
func (c *Collector) takeLocked(n int) bool {
	own := min(n, c.own)
	if n > own && c.shared != nil && !c.refused {
		if c.shared.Take(n - own) {
			c.taken += n - own
		} else {
			c.refuseLocked()
		}
	}
	c.own -= own
	return !c.refused
}

// Leave releases the shared room. The output now belongs to the caller.
func (c *Collector) Leave() {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.taken > 0 {
		c.shared.Return(c.taken)
		c.taken = 0
	}
}

// LastData returns when output last came, but no earlier than notBefore.
func (c *Collector) LastData(notBefore time.Time) time.Time {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.last.Before(notBefore) {
		return notBefore
	}
	return c.last
}
