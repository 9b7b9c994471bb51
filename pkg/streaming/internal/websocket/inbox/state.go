package inbox

import (
	"io"
	"slices"
)

// State is what a frozen Inbox holds.
type State struct {
	Err error // the argument of Fail

	Receiving bool   // a message is being received
	Header    []byte // the bytes of its header that have arrived
	Payload   bool   // its header is complete, and names Channel
	Channel   int
	Encoded   []byte // base64 payload that is not decoded yet, at most MaxEncoded bytes
	Padded    bool   // the base64 payload had its padding, so that nothing may follow

	Channels []ChannelState
}

// ChannelState is a channel of a State.
type ChannelState struct {
	Received int64
	Unread   []byte
	Ended    bool // the client sends no more
	Discard  bool // what the client sends is discarded
}

// MaxEncoded bounds the bytes of a base64 payload that are decoded at once.
const MaxEncoded = 4 << 10

// State returns the state and empties the Inbox, which cannot be used after it.
func (in *Inbox) State() State {
	in.mu.Lock()
	defer in.mu.Unlock()
	s := State{Err: in.err, Receiving: in.Receiving, Header: in.header.seen, Payload: in.payload, Channel: in.channel}
	if in.decoder != nil && in.payload {
		s.Encoded, s.Padded = in.decoder.encoded[:in.decoder.pending], in.decoder.padded
	}
	for i := range in.channels {
		box := &in.channels[i]
		state := ChannelState{Received: box.received, Ended: box.ended, Discard: box.discard}
		for chunk := box.head; chunk != nil; chunk = chunk.next {
			state.Unread = append(state.Unread, chunk.data[chunk.read:chunk.written]...)
		}
		in.discardLocked(box)
		s.Channels = append(s.Channels, state)
	}
	return s
}

// Resume sets the state of a new Inbox, which has as many channels. message is the one that is being received.
func (in *Inbox) Resume(s State, message io.Reader) {
	in.mu.Lock()
	defer in.mu.Unlock()
	in.err = s.Err
	in.Receiving, in.header.seen, in.payload, in.channel = s.Receiving, slices.Clone(s.Header), s.Payload, s.Channel
	if in.decoder != nil {
		in.decoder.reset(message)
		in.decoder.pending, in.decoder.padded = copy(in.decoder.encoded[:], s.Encoded), s.Padded
	}
	for i := range s.Channels {
		state, box := &s.Channels[i], &in.channels[i]
		if !state.Discard {
			in.putLocked(box, state.Unread)
		}
		box.received, box.ended, box.discard = state.Received, state.Ended, state.Discard
	}
}

// putLocked adds payload that was received before. It counts against the limits, but may exceed them.
func (in *Inbox) putLocked(box *inbox, p []byte) {
	in.used += len(p)
	in.shared.Take(len(p))
	box.size += len(p)
	for len(p) > 0 {
		c := getChunk()
		c.written = copy(c.data[:], p)
		p = p[c.written:]
		if box.tail == nil {
			box.head = c
		} else {
			box.tail.next = c
		}
		box.tail = c
	}
}
