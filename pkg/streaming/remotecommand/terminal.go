package remotecommand

import (
	"encoding/json"
	"errors"
	"fmt"
	"sync"

	"github.com/streamshim/streamshim/pkg/workload"
)

// terminal carries the client's terminal sizes to the process, also those that came before it.
type terminal struct {
	known chan struct{} // closed with the first size

	sizes terminalSizes // belongs to who follows

	mu      sync.Mutex
	process Process
	size    workload.Size
	started bool // known has been closed
	// announced is the size that taps know. It is used with mu held.
	announced workload.Size
}

// follow applies the sizes of the resize stream until it ends.
func (t *terminal) follow(resize workload.Stream) {
	if _, err := resize.WriteTo(sizeWriter{t}); !isFrozen(err) { // sizes that cannot be read end the resizing, not the session
		resize.CloseRead()
	}
}

type sizeWriter struct{ terminal *terminal }

func (w sizeWriter) Write(b []byte) (int, error) {
	sizes, err := w.terminal.sizes.feed(b)
	for _, size := range sizes {
		w.terminal.resize(size)
	}
	if err != nil {
		return 0, err
	}
	return len(b), nil
}

func (t *terminal) resize(size workload.Size) {
	if !size.Known() {
		return // a client that does not know its size says 0x0
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	t.size = size
	if !t.started {
		t.started = true
		close(t.known)
	}
	if t.process != nil {
		t.process.Resize(t.size) //nolint:errcheck // a process that has ended has no terminal
	}
}

func (t *terminal) lastSize() workload.Size {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.size
}

// attach gives the terminal its process. A size that came in while the process started is applied.
func (t *terminal) attach(p Process) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.process = p
	if t.started {
		p.Resize(t.size) //nolint:errcheck // as in resize
	}
}

// maxTerminalSizeMessage bounds one JSON terminal size, in bytes; real ones have about 25.
const maxTerminalSizeMessage = 1024

// terminalSizes takes terminal sizes, each a JSON object with Width and Height, out of a byte stream that may split and join them in any
// way.
type terminalSizes struct {
	pending []byte
}

var errTerminalSize = errors.New("the resize stream carries something else than terminal sizes")

// feed adds bytes and returns the sizes that are complete now. The stream is of no more use after
// an error.
func (t *terminalSizes) feed(b []byte) ([]workload.Size, error) {
	var sizes []workload.Size
	for _, c := range b {
		if len(t.pending) == 0 && c != '{' {
			if c == ' ' || c == '\n' || c == '\r' || c == '\t' {
				continue
			}
			return sizes, errTerminalSize
		}
		if len(t.pending) == maxTerminalSizeMessage {
			return sizes, errTerminalSize
		}
		t.pending = append(t.pending, c)
		if c != '}' {
			continue
		}
		var size workload.Size
		if err := json.Unmarshal(t.pending, &size); err != nil {
			return sizes, fmt.Errorf("%w: %w", errTerminalSize, err)
		}
		t.pending = t.pending[:0]
		sizes = append(sizes, size)
	}
	return sizes, nil
}
