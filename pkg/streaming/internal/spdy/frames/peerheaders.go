package frames

import (
	"net/http"
	"sync"
)

// PeerHeaders reads the header blocks of a connection's peer until it refuses them. It takes the memory for that with the
// first block. All methods may be called from any goroutine.
type PeerHeaders struct {
	Limits HeaderLimits // set before the first block

	mu      sync.Mutex
	refuses bool
	reader  *HeaderReader // nil before the first block and after Refuse
}

// Read reads a block. After Refuse it does nothing: no later block will be read, so the inflater may fall behind. A
// HeaderFault ends the stream, any other error the connection.
func (p *PeerHeaders) Read(block []byte) (header http.Header, refused bool, err error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.refuses {
		return nil, true, nil
	}
	if p.reader == nil {
		p.reader = TakeHeaderReader()
	}
	header, err = p.reader.Read(block, p.Limits)
	return header, false, err
}

// Refuse refuses all further blocks and releases the memory.
func (p *PeerHeaders) Refuse() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.refuses = true
	if p.reader != nil {
		p.reader.Release()
		p.reader = nil
	}
}

// Refuses reports whether Refuse was called.
func (p *PeerHeaders) Refuses() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.refuses
}

// History returns what Resume needs in another process, or nil if there was no block or blocks are refused. No block can be
// read after it.
func (p *PeerHeaders) History() ([]byte, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.reader == nil {
		return nil, nil
	}
	return p.reader.History()
}

// Resume continues after the last block of the history.
func (p *PeerHeaders) Resume(history []byte) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.reader = ResumeHeaderReader(history)
}
