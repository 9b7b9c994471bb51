package inbox

import (
	"io"
	"slices"
)

// State is what a frozen Inbox holds.
type State struct {
	Err error // that Fail was called with

	// Receiving says that a message is being taken in. Of its header these bytes have come, or, with Payload, all, and
	// this is its channel.
	Receiving bool
	Header    []byte
	Payload   bool
	Channel   int
	// Of a base64 payload these bytes, at most MaxEncoded, are not decoded yet, and nothing may follow them when it is padded.
	Encoded []byte
	Padded  bool

	Channels []ChannelState
}

// ChannelState is a channel of a State.
type ChannelState struct {
	Received int64
	Unread   []byte
	Ended    bool // the client sends no more
	Discard  bool // nobody wants what it sends
}

// MaxEncoded is how many bytes of a base64 payload are decoded at once.
const MaxEncoded = 4 << 10

// State takes everything out. Nobody may read or receive any more.
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

// Resume puts it into a new Inbox, which has as many channels. message is the one being taken in.
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

// putLocked adds what has come in before; it counts against the limits, but is not held up by them.
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
