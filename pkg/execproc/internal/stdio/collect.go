package stdio

import (
	"io"
	"sync"
	"time"
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
	Full chan struct{} // closed when the shared room was exhausted

	mu             sync.Mutex
	left           int // of the limit
	own            int // of ownOutput
	shared         Room
	taken          int // of shared
	refused        bool
	Stdout, Stderr []byte // valid once Done is closed
	last           time.Time
}

// Collect reads both streams to their ends. It keeps up to limit bytes of both together; all but the first
// ownOutput need shared room.
func Collect(stdout, stderr io.Reader, limit int, shared Room) *Collector {
	c := &Collector{Done: make(chan struct{}), Full: make(chan struct{}), left: limit, own: ownOutput, shared: shared}
	var streams sync.WaitGroup
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
	streams.Go(func() { read(stderr, &c.Stderr) })
	go func() {
		defer close(c.Done)
		read(stdout, &c.Stdout)
		streams.Wait()
	}()
	return c
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
		if c.refused = !c.shared.Take(n - own); c.refused {
			close(c.Full)
		} else {
			c.taken += n - own
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
