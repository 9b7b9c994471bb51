// Package inbox sorts a client's messages into its channels and buffers their payload, within limits, until it is read.
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
	// MinBudget is how much one connection may always keep, even if all connections together keep too much.
	MinBudget = 64 << 10

	// softWait is how long the read loop waits for a channel at its soft limit, before it receives
	// softStep more. So a channel that nobody reads grows by at most 640 KiB a second, and the pings, resizes and
	// closes behind its payload still get through.
	softWait = 100 * time.Millisecond
	softStep = 64 << 10
)

// Inbox sorts received messages into the channels. The read loop calls Receive. Readers of the channels call Next and
// Taken.
//
// WebSocket has no flow control of its own, only TCP's for the whole connection. So there are two limits. At the limit of
// one channel the loop waits for a moment. At the limit of all channels together it waits until somebody reads.
type Inbox struct {
	format    Format
	softLimit int // bytes in one channel
	budget    int // bytes in all channels
	shared    memory.Room
	// Wait blocks until room is signalled, at most for atMost if that is not zero. An error ends the connection.
	Wait func(room <-chan struct{}, atMost time.Duration) error

	// Owned by the read loop.
	scratch [3]byte
	decoder *base64Reader // nil unless the protocol is base64
	// The message being received. A freeze may come between any two of its bytes.
	Receiving bool
	header    headerTape
	payload   bool // its header was read and names channel
	channel   int

	// room is signalled when payload was read, if waiting is set.
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
	discard    bool  // the payload is discarded
}

// New returns an Inbox for len(wanted) channels. The payload of channels that are not wanted is discarded. The caller sets
// Wait.
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

// Empty reports whether no payload is buffered.
func (in *Inbox) Empty() bool {
	in.mu.Lock()
	defer in.mu.Unlock()
	return in.used == 0
}

// Receive receives one message and returns the number of its payload bytes that were buffered. It leaves payload that is
// not wanted unread. The error is a *frames.Violation if the client is at fault. After the error of a freeze, another
// call continues in the message.
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

// receiveHeader reads the channel of a message, and sets in.payload if the channel exists.
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

// headerTape records what was read of a message's header, and replays it when reading starts again after a freeze.
type headerTape struct {
	source io.Reader
	seen   []byte // at most 3
	again  int    // how many of these were replayed
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

// reserve waits for room and returns where the next payload bytes of the channel go. Nil means that they are not wanted.
// Each slice must be followed by a commit.
func (in *Inbox) reserve(channel int) ([]byte, error) {
	box := &in.channels[channel]
	in.mu.Lock()
	defer in.mu.Unlock()
	var patience time.Time // when the wait at the soft limit ends, however often room is signalled
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
			atMost = softWait // room that another connection returns is not signalled here
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
		err := func() error {
			in.mu.Unlock()
			defer in.mu.Lock() // also after a panic: the caller unlocks
			return in.Wait(in.room, atMost)
		}()
		in.waiting = false
		if err != nil {
			return nil, err
		}
	}
}

// minReserve is the least room of a reservation: one decoded base64 quantum.
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

// Next waits for payload and returns a piece of it, and its chunk. The caller must then call Taken. At the end of the
// channel the error is io.EOF. Payload that arrived before the connection ended is returned first.
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

// Taken ends the use of the piece that Next returned, of which n bytes were consumed.
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

// trim releases the chunks that were read. Called with mu held.
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

// drop discards what is buffered. While the read loop reads into a chunk, drop does nothing and commit calls it again.
// Called with mu held and discard set.
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

// Discard discards what the channel holds and will receive.
func (in *Inbox) Discard(channel int) {
	in.mu.Lock()
	defer in.mu.Unlock()
	in.discardLocked(&in.channels[channel])
}

// DiscardAll calls Discard for all channels.
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

// Fail ends all channels that have not ended: readers get what is buffered, and then this error. Only the first call
// counts.
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

// Received returns the number of payload bytes that were ever received on a channel.
func (in *Inbox) Received(channel int) int64 {
	in.mu.Lock()
	defer in.mu.Unlock()
	return in.channels[channel].received
}

// HasEnded reports whether the client sends no more on a channel.
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
