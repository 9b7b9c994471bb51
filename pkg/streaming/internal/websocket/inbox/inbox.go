// Package inbox sorts a client's messages into its channels, and keeps their payload, within limits, until it is read.
package inbox

import (
	"errors"
	"fmt"
	"io"
	"sync"
	"time"

	"github.com/streamshim/streamshim/pkg/handover"
	"github.com/streamshim/streamshim/pkg/streaming/internal/memory"
	"github.com/streamshim/streamshim/pkg/streaming/internal/websocket/frames"
)

// ErrReadClosed is returned for reads from a channel that is discarded.
var ErrReadClosed = errors.New("websocket: read after CloseRead or Reset")

const (
	// MinBudget is what one connection may keep also when all together keep too much.
	MinBudget = 64 << 10

	// softWait is how long the read loop waits for a channel that holds its soft limit before it
	// takes in more all the same, and softStep how much more. A channel that nobody reads so grows
	// by 640 KiB a second at most, while pings, resizes and closes behind its payload get through.
	softWait = 100 * time.Millisecond
	softStep = 64 << 10
)

// Inbox sorts received messages into the channels. The read loop calls receive; readers of the
// channels take the payload out.
//
// WebSocket has no flow control of its own, only TCP's for the whole connection. So there are two
// limits: one for a channel, at which the loop waits, but not for long, and one for all channels
// together, at which it waits until somebody reads.
type Inbox struct {
	format    Format
	softLimit int // bytes in one channel
	budget    int // bytes in all channels
	shared    memory.Room
	// Wait blocks until room is signalled, or for atMost if that is not zero. An error ends the
	// connection.
	Wait func(room <-chan struct{}, atMost time.Duration) error

	// Owned by the read loop.
	scratch [3]byte
	decoder *base64Reader // nil unless the protocol is base64
	// The message being received: a freeze may come between any two of its bytes.
	Receiving bool
	header    headerTape
	payload   bool // its header has been read, and says:
	channel   int

	// room is signalled, while waiting is set, when payload was taken out.
	room chan struct{}

	mu       sync.Mutex // protects what follows and all inboxes
	used     int        // bytes in all inboxes
	waiting  bool
	frozen   bool
	err      error // the connection is over
	channels []inbox
}

// inbox is the received payload of one channel.
type inbox struct {
	arrived sync.Cond // payload, the end, or an error

	head, tail *Chunk
	size       int
	softLimit  int   // grows while nobody reads
	received   int64 // payload bytes of the channel's whole life
	filling    bool  // the read loop reads into tail
	ended      bool  // the client sends no more
	discard    bool  // nobody wants the payload
}

// New returns one for channels that are read if they are wanted. Wait is to be set.
func New(format Format, wanted []bool, softLimit, budget int, shared memory.Room) *Inbox {
	in := &Inbox{
		format:    format,
		softLimit: softLimit,
		budget:    budget,
		shared:    shared,
		room:      make(chan struct{}, 1),
		channels:  make([]inbox, len(wanted)),
	}
	if format.Base64 {
		in.decoder = new(base64Reader)
	}
	for i := range in.channels {
		box := &in.channels[i]
		box.arrived.L = &in.mu
		box.softLimit = softLimit
		box.discard = !wanted[i]
	}
	return in
}

// Empty tells whether everything that was kept has been read.
func (in *Inbox) Empty() bool {
	in.mu.Lock()
	defer in.mu.Unlock()
	return in.used == 0
}

// Receive takes in one message and returns the number of its payload bytes that were kept. It
// leaves unread what nobody wants. A *frames.Violation is the client's fault. After another error, that of a freeze, it
// goes on in the message when it is called again.
func (in *Inbox) Receive(message io.Reader) (int, error) {
	in.Receiving = true
	if !in.payload {
		if err := in.receiveHeader(message); err != nil || !in.payload {
			in.Receiving = err != nil
			return 0, err
		}
	}
	payload := message
	if in.decoder != nil {
		in.decoder.source = message
		payload = in.decoder
	}
	total := 0
	for {
		free, err := in.reserve(in.channel)
		if free != nil {
			var n int
			n, err = payload.Read(free)
			in.commit(in.channel, n)
			total += n
		}
		if err == nil && free != nil {
			continue
		}
		if err == nil || err == io.EOF {
			in.Receiving, in.payload = false, false
			return total, nil
		}
		return total, err
	}
}

// receiveHeader reads the channel of a message and sets payload if its payload is wanted.
func (in *Inbox) receiveHeader(message io.Reader) error {
	header, err := readHeader(in.format, in.header.from(message), in.scratch[:])
	if errors.Is(err, errEmptyMessage) {
		return nil
	}
	if err != nil {
		return err
	}
	in.header.seen = in.header.seen[:0]
	known := header.channel >= 0 && header.channel < len(in.channels)
	switch {
	case header.close && !known:
		return &frames.Violation{Code: frames.CloseProtocolError, Reason: fmt.Sprintf("half-close of channel %d, which does not exist", header.channel)}
	case header.close:
		in.End(header.channel)
	case known:
		in.payload, in.channel = true, header.channel
		if in.decoder != nil {
			in.decoder.reset(message)
		}
	}
	return nil
}

// headerTape remembers what was read of a message's header, and gives it once more when the reading begins anew.
type headerTape struct {
	source io.Reader
	seen   []byte // at most 3
	again  int    // of these, how many have been given once more
}

func (h *headerTape) from(source io.Reader) io.Reader {
	h.source, h.again = source, 0
	return h
}

// Read implements io.Reader.
func (h *headerTape) Read(p []byte) (int, error) {
	if h.again < len(h.seen) {
		n := copy(p, h.seen[h.again:])
		h.again += n
		return n, nil
	}
	n, err := h.source.Read(p)
	h.seen = append(h.seen, p[:n]...)
	h.again += n
	return n, err
}

// reserve returns where the next payload bytes of the channel go, waiting for room. Nil means that
// the channel wants no more. Each slice is followed by a commit.
func (in *Inbox) reserve(channel int) ([]byte, error) {
	box := &in.channels[channel]
	in.mu.Lock()
	defer in.mu.Unlock()
	var patience time.Time // until when the soft limit is waited for, however often room is signalled
	for {
		if in.err != nil {
			return nil, in.err
		}
		if in.frozen {
			return nil, handover.ErrFrozen
		}
		if box.discard || box.ended {
			return nil, nil
		}
		var atMost time.Duration
		switch {
		case in.budget-in.used < minReserve: // until there is room
		case in.used >= MinBudget && in.shared.Full():
			atMost = softWait // room that another connection gives back is not signalled here
		case box.size < box.softLimit:
			return in.free(box), nil
		default:
			if patience.IsZero() {
				patience = time.Now().Add(softWait)
			}
			if atMost = time.Until(patience); atMost <= 0 {
				box.softLimit = box.size + softStep
				continue
			}
		}
		in.waiting = true
		in.mu.Unlock()
		err := in.Wait(in.room, atMost)
		in.mu.Lock()
		in.waiting = false
		if err != nil {
			return nil, err
		}
	}
}

// minReserve is the least room a reservation has; the base64 decoder needs that of one quantum.
const minReserve = 3

// free returns free space in the channel's last chunk, within the budget. Called with mu held.
func (in *Inbox) free(box *inbox) []byte {
	if box.tail == nil || chunkSize-box.tail.written < minReserve {
		c := getChunk()
		if box.tail == nil {
			box.head = c
		} else {
			box.tail.next = c
		}
		box.tail = c
	}
	box.filling = true
	box.tail.users++
	free := box.tail.data[box.tail.written:]
	return free[:min(len(free), in.budget-in.used)]
}

// commit ends a reservation in which n bytes were filled.
func (in *Inbox) commit(channel, n int) {
	box := &in.channels[channel]
	in.mu.Lock()
	defer in.mu.Unlock()
	box.filling = false
	box.received += int64(n)
	box.tail.written += n
	box.tail.users--
	box.size += n
	in.used += n
	in.shared.Take(n)
	if box.discard {
		in.drop(box)
		return
	}
	in.trim(box)
	if n > 0 {
		box.arrived.Signal()
	}
}

// Next waits for payload and returns a piece of it, and the chunk it is in, which taken must be
// called for. At the end of the channel the error is io.EOF. What arrived before the connection
// ended is given out first.
func (in *Inbox) Next(channel int) (*Chunk, []byte, error) {
	box := &in.channels[channel]
	in.mu.Lock()
	defer in.mu.Unlock()
	for {
		switch {
		case box.discard:
			return nil, nil, ErrReadClosed
		case in.frozen && (box.size > 0 || !box.ended && in.err == nil):
			return nil, nil, handover.ErrFrozen
		case box.size > 0:
			in.trim(box)
			box.head.users++
			return box.head, box.head.data[box.head.read:box.head.written], nil
		case box.ended:
			return nil, nil, io.EOF
		case in.err != nil:
			return nil, nil, in.err
		}
		box.arrived.Wait()
	}
}

// Taken says that n bytes of the piece that next returned are done with.
func (in *Inbox) Taken(channel int, c *Chunk, n int) {
	box := &in.channels[channel]
	in.mu.Lock()
	defer in.mu.Unlock()
	if !box.discard {
		c.read += n
		box.size -= n
		in.used -= n
		in.shared.Return(n)
		in.trim(box)
		if box.size < in.softLimit {
			box.softLimit = in.softLimit
		}
		in.signalRoom()
	}
	c.letGo()
}

// trim gives back the chunks that are read. Called with mu held.
func (in *Inbox) trim(box *inbox) {
	for c := box.head; c != nil && c.read == c.written; c = box.head {
		if c == box.tail {
			if box.filling {
				return
			}
			box.tail = nil
		}
		box.head = c.next
		c.letGo()
	}
}

// drop throws away what is buffered, except the chunk the read loop is reading into, which commit
// drops. Called with mu held and discard set.
func (in *Inbox) drop(box *inbox) {
	if box.filling {
		return
	}
	in.used -= box.size
	in.shared.Return(box.size)
	box.size = 0
	for c := box.head; c != nil; {
		following := c.next
		c.letGo()
		c = following
	}
	box.head, box.tail = nil, nil
	in.signalRoom()
}

// End marks the channel as half-closed by the client.
func (in *Inbox) End(channel int) {
	in.mu.Lock()
	defer in.mu.Unlock()
	box := &in.channels[channel]
	box.ended = true
	box.arrived.Broadcast()
}

// EndAll marks all channels as ended by the client.
func (in *Inbox) EndAll() {
	for channel := range in.channels {
		in.End(channel)
	}
}

// Discard throws away what the channel holds and will receive.
func (in *Inbox) Discard(channel int) {
	in.mu.Lock()
	defer in.mu.Unlock()
	in.discardLocked(&in.channels[channel])
}

// DiscardAll does so for all channels.
func (in *Inbox) DiscardAll() {
	in.mu.Lock()
	defer in.mu.Unlock()
	for i := range in.channels {
		in.discardLocked(&in.channels[i])
	}
}

func (in *Inbox) discardLocked(box *inbox) {
	box.discard = true
	in.drop(box)
	in.signalRoom()
	box.arrived.Broadcast()
}

// Fail ends all channels that have not ended: readers get what is buffered and then this error, the first
// that fail is called with.
func (in *Inbox) Fail(err error) {
	in.mu.Lock()
	defer in.mu.Unlock()
	if in.err != nil {
		return
	}
	in.err = err
	in.signalRoom()
	for i := range in.channels {
		in.channels[i].arrived.Broadcast()
	}
}

// Freeze makes readers and the read loop return.
func (in *Inbox) Freeze() {
	in.mu.Lock()
	defer in.mu.Unlock()
	in.frozen = true
	for i := range in.channels {
		in.channels[i].arrived.Broadcast()
	}
}

// Received is how much payload of a channel has come in its life.
func (in *Inbox) Received(channel int) int64 {
	in.mu.Lock()
	defer in.mu.Unlock()
	return in.channels[channel].received
}

// HasEnded says that the client sends no more on a channel.
func (in *Inbox) HasEnded(channel int) bool {
	in.mu.Lock()
	defer in.mu.Unlock()
	return in.channels[channel].ended
}

// signalRoom wakes the read loop if it waits. Called with mu held.
func (in *Inbox) signalRoom() {
	if !in.waiting {
		return
	}
	select {
	case in.room <- struct{}{}:
	default:
	}
}
