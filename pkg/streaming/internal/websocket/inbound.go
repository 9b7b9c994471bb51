package websocket

import (
	"errors"
	"fmt"
	"io"
	"sync"
	"time"

	"github.com/streamshim/streamshim/pkg/streaming/internal/memory"
)

// Direction says which way payload may go on a channel. What a client sends on a channel that is
// not for reading, or that does not exist, is ignored, as the stock server does.
type Direction int

// The directions.
const (
	Ignore Direction = iota
	Read
	Write
	ReadWrite
)

func (d Direction) readable() bool { return d == Read || d == ReadWrite }
func (d Direction) writable() bool { return d == Write || d == ReadWrite }

const (
	// softWait is how long the read loop waits for a channel that holds its soft limit before it
	// takes in more all the same, and softStep how much more. A channel that nobody reads so grows
	// by 640 KiB a second at most, while pings, resizes and closes behind its payload get through.
	softWait = 100 * time.Millisecond
	softStep = 64 << 10
)

// inbound sorts received messages into the channels. The read loop calls receive; readers of the
// channels take the payload out.
//
// WebSocket has no flow control of its own, only TCP's for the whole connection. So there are two
// limits: one for a channel, at which the loop waits, but not for long, and one for all channels
// together, at which it waits until somebody reads.
type inbound struct {
	protocol  Protocol
	softLimit int // bytes in one channel
	budget    int // bytes in all channels
	shared    memory.Room
	// wait blocks until room is signalled, or for atMost if that is not zero. An error ends the
	// connection.
	wait func(room <-chan struct{}, atMost time.Duration) error

	// Owned by the read loop.
	scratch [3]byte
	decoder *base64Reader // nil unless the protocol is base64

	// room is signalled, while waiting is set, when payload was taken out.
	room chan struct{}

	mu       sync.Mutex // protects what follows and all inboxes
	used     int        // bytes in all inboxes
	waiting  bool
	err      error // the connection is over
	channels []inbox
}

// inbox is the received payload of one channel.
type inbox struct {
	arrived sync.Cond // payload, the end, or an error

	head, tail *chunk
	size       int
	softLimit  int   // grows while nobody reads
	received   int64 // payload bytes of the channel's whole life
	filling    bool  // the read loop reads into tail
	ended      bool  // the client sends no more
	discard    bool  // nobody wants the payload
}

func newInbound(protocol Protocol, directions []Direction, softLimit, budget int, shared memory.Room) *inbound {
	in := &inbound{
		protocol:  protocol,
		softLimit: softLimit,
		budget:    budget,
		shared:    shared,
		room:      make(chan struct{}, 1),
		channels:  make([]inbox, len(directions)),
	}
	if protocol.Base64() {
		in.decoder = new(base64Reader)
	}
	for i := range in.channels {
		box := &in.channels[i]
		box.arrived.L = &in.mu
		box.softLimit = softLimit
		box.discard = !directions[i].readable()
	}
	return in
}

// empty tells whether everything that was kept has been read.
func (in *inbound) empty() bool {
	in.mu.Lock()
	defer in.mu.Unlock()
	return in.used == 0
}

// receive takes in one message and returns the number of its payload bytes that were kept. It
// leaves unread what nobody wants. A *protocolError is the client's fault.
func (in *inbound) receive(message io.Reader) (int, error) {
	header, err := readHeader(in.protocol, message, in.scratch[:])
	if errors.Is(err, errEmptyMessage) {
		return 0, nil
	}
	if err != nil {
		return 0, err
	}
	known := header.channel >= 0 && header.channel < len(in.channels)
	if header.close {
		if !known {
			return 0, &protocolError{closeProtocolError, fmt.Sprintf("half-close of channel %d, which does not exist", header.channel)}
		}
		in.end(header.channel)
		return 0, nil
	}
	if !known {
		return 0, nil
	}
	payload := message
	if in.decoder != nil {
		in.decoder.reset(message)
		payload = in.decoder
	}
	total := 0
	for {
		free, err := in.reserve(header.channel)
		if err != nil || free == nil {
			return total, err
		}
		n, err := payload.Read(free)
		in.commit(header.channel, n)
		total += n
		if err == io.EOF {
			return total, nil
		}
		if err != nil {
			return total, err
		}
	}
}

// reserve returns where the next payload bytes of the channel go, waiting for room. Nil means that
// the channel wants no more. Each slice is followed by a commit.
func (in *inbound) reserve(channel int) ([]byte, error) {
	box := &in.channels[channel]
	in.mu.Lock()
	defer in.mu.Unlock()
	var patience time.Time // until when the soft limit is waited for, however often room is signalled
	for {
		if in.err != nil {
			return nil, in.err
		}
		if box.discard || box.ended {
			return nil, nil
		}
		var atMost time.Duration
		switch {
		case in.budget-in.used < minReserve: // until there is room
		case in.used >= minBudget && in.shared.Full():
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
		err := in.wait(in.room, atMost)
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
func (in *inbound) free(box *inbox) []byte {
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
func (in *inbound) commit(channel, n int) {
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

// next waits for payload and returns a piece of it, and the chunk it is in, which taken must be
// called for. At the end of the channel the error is io.EOF. What arrived before the connection
// ended is given out first.
func (in *inbound) next(channel int) (*chunk, []byte, error) {
	box := &in.channels[channel]
	in.mu.Lock()
	defer in.mu.Unlock()
	for {
		switch {
		case box.discard:
			return nil, nil, errReadClosed
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

// taken says that n bytes of the piece that next returned are done with.
func (in *inbound) taken(channel int, c *chunk, n int) {
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
func (in *inbound) trim(box *inbox) {
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
func (in *inbound) drop(box *inbox) {
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

// end marks the channel as half-closed by the client.
func (in *inbound) end(channel int) {
	in.mu.Lock()
	defer in.mu.Unlock()
	box := &in.channels[channel]
	box.ended = true
	box.arrived.Broadcast()
}

// endAll marks all channels as ended by the client.
func (in *inbound) endAll() {
	for channel := range in.channels {
		in.end(channel)
	}
}

// discardChannel throws away what the channel holds and will receive.
func (in *inbound) discardChannel(channel int) {
	in.mu.Lock()
	defer in.mu.Unlock()
	in.discardLocked(&in.channels[channel])
}

// discardAll does so for all channels.
func (in *inbound) discardAll() {
	in.mu.Lock()
	defer in.mu.Unlock()
	for i := range in.channels {
		in.discardLocked(&in.channels[i])
	}
}

func (in *inbound) discardLocked(box *inbox) {
	box.discard = true
	in.drop(box)
	in.signalRoom()
	box.arrived.Broadcast()
}

// fail ends all channels that have not ended: readers get what is buffered and then this error, the first
// that fail is called with.
func (in *inbound) fail(err error) {
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

func (in *inbound) receivedBytes(channel int) int64 {
	in.mu.Lock()
	defer in.mu.Unlock()
	return in.channels[channel].received
}

func (in *inbound) hasEnded(channel int) bool {
	in.mu.Lock()
	defer in.mu.Unlock()
	return in.channels[channel].ended
}

// signalRoom wakes the read loop if it waits. Called with mu held.
func (in *inbound) signalRoom() {
	if !in.waiting {
		return
	}
	select {
	case in.room <- struct{}{}:
	default:
	}
}
