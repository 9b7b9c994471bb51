// Package terminal passes the sizes of the client's terminal to the process.
package terminal

import (
	"encoding/json"
	"errors"
	"fmt"
	"sync"

	"github.com/streamshim/streamshim/pkg/handover"
	"github.com/streamshim/streamshim/pkg/workload"
)

// Resizer is a process with a terminal. It ignores an unknown size.
type Resizer interface {
	Resize(workload.Size) error
}

// Sizes handles the sizes of one terminal, including those that arrive before there is a process.
type Sizes struct {
	known    chan struct{} // closed with the first size
	announce func(workload.Size)

	parser parser // belongs to Follow

	mu        sync.Mutex
	process   Resizer
	size      workload.Size
	started   bool          // known was closed
	announced workload.Size // the last one
}

// State is the state of Sizes for a hand-over.
type State struct {
	Size      workload.Size // the last one asked for
	Announced workload.Size
	Pending   []byte // of a message that is not complete
}

// New returns Sizes without a size. It announces each size that a process gets once, with a lock held, even if the process
// gets it again after a hand-over or from a client that repeats it.
func New(announce func(workload.Size)) *Sizes {
	return &Sizes{known: make(chan struct{}), announce: announce}
}

// Resume continues from a state. It is called before anything else.
func (s *Sizes) Resume(state State) {
	s.size, s.announced, s.parser.pending = state.Size, state.Announced, state.Pending
	if s.size.Known() {
		s.started = true
		close(s.known)
	}
}

// State returns the state for Resume, once Follow has returned.
func (s *Sizes) State() State { return State{s.size, s.announced, s.parser.pending} }

// Known is closed with the first size.
func (s *Sizes) Known() <-chan struct{} { return s.known }

// Follow applies the sizes of the resize stream until it ends. A size that cannot be parsed ends the resizing, not the
// session.
func (s *Sizes) Follow(resize workload.Stream) {
	if _, err := resize.WriteTo(writer{s}); !errors.Is(err, handover.ErrFrozen) {
		resize.CloseRead()
	}
}

type writer struct{ sizes *Sizes }

func (w writer) Write(b []byte) (int, error) {
	sizes, err := w.sizes.parser.feed(b)
	for _, size := range sizes {
		w.sizes.resize(size)
	}
	if err != nil {
		return 0, err
	}
	return len(b), nil
}

func (s *Sizes) resize(size workload.Size) {
	if !size.Known() {
		return // a client that does not know its size says 0x0
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.size = size
	if !s.started {
		s.started = true
		close(s.known)
	}
	s.applyLocked()
}

// Last returns the last size, or an unknown one before the first.
func (s *Sizes) Last() workload.Size {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.size
}

// Attach passes the last size to the process, and all that follow.
func (s *Sizes) Attach(process Resizer) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.process = process
	if s.started {
		s.applyLocked()
	}
}

func (s *Sizes) applyLocked() {
	if s.process == nil {
		return
	}
	if s.announced != s.size {
		s.announced = s.size
		s.announce(s.size)
	}
	s.process.Resize(s.size) //nolint:errcheck // a process that has ended has no terminal
}

// maxMessage bounds one JSON terminal size, in bytes; real ones have about 25.
const maxMessage = 1024

// parser parses terminal sizes from a byte stream that may split and join them in any way. Each is a JSON object with Width and
// Height.
type parser struct {
	pending []byte
}

var errNoSize = errors.New("the resize stream carries something else than terminal sizes")

// feed adds bytes and returns the sizes that are complete now. After an error the parser cannot be used.
func (p *parser) feed(b []byte) ([]workload.Size, error) {
	var sizes []workload.Size
	for _, c := range b {
		if len(p.pending) == 0 && c != '{' {
			if c == ' ' || c == '\n' || c == '\r' || c == '\t' {
				continue
			}
			return sizes, errNoSize
		}
		if len(p.pending) == maxMessage {
			return sizes, errNoSize
		}
		p.pending = append(p.pending, c)
		if c != '}' {
			continue
		}
		var size workload.Size
		if err := json.Unmarshal(p.pending, &size); err != nil {
			return sizes, fmt.Errorf("%w: %w", errNoSize, err)
		}
		p.pending = p.pending[:0]
		sizes = append(sizes, size)
	}
	return sizes, nil
}
