package websocket

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"time"

	"github.com/streamshim/streamshim/pkg/handover"
	"github.com/streamshim/streamshim/pkg/rescue"
	"github.com/streamshim/streamshim/pkg/streaming/internal/memory"
	"github.com/streamshim/streamshim/pkg/streaming/internal/websocket/frames"
	"github.com/streamshim/streamshim/pkg/streaming/internal/websocket/inbox"
)

const (
	// maxChannels leaves the byte 255 to the half-close.
	maxChannels = 255

	defaultMaxMessage    = 32 << 20 // as the stock server
	defaultChannelBuffer = 256 << 10
	defaultBudget        = 16 << 20

	// blockedPoll is how often a read loop without room asks whether the client is still there, and
	// blockedPong how often it sends a Pong nobody asked for (RFC 6455 section 5.5.3). The Pong
	// makes the kernel of a killed client answer with RST, where its FIN waits behind data that we
	// do not take in; and it keeps a client-go client, whose pings we cannot see, from giving up
	// after 61 seconds.
	//
	// The first Pong comes when nothing has moved for Config.Patience.
	blockedPoll = 250 * time.Millisecond
	blockedPong = time.Second

	defaultPatience = 30 * time.Second
	// halfClosePatience is as in package spdy.
	halfClosePatience = 5 * time.Second
)

// Channels of exec and attach.
const (
	Stdin  byte = 0
	Stdout byte = 1
	Stderr byte = 2
	Error  byte = 3
	Resize byte = 4
)

// RemoteCommandChannels returns the channels of an exec or attach with these streams, for Config.
func RemoteCommandChannels(stdin, stdout, stderr bool) []Direction {
	channels := []Direction{Stdin: Ignore, Stdout: Ignore, Stderr: Ignore, Error: Write, Resize: Read}
	if stdin {
		channels[Stdin] = Read
	}
	if stdout {
		channels[Stdout] = Write
	}
	if stderr {
		channels[Stderr] = Write
	}
	return channels
}

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

// Config is what Accept needs to know. Zero limits are replaced by their defaults.
type Config struct {
	// Channels are the connection's channels by number, at most 255; 10 with a base64 protocol is
	// all that digits can name, but the bytes behind '9' are taken as further digits.
	Channels []Direction
	// Greeting sends an empty message on the lowest writable channel, by which the stock server and
	// the API server tell a client, of v5 too, that the connection stands.
	Greeting bool

	// MaxMessage is the most bytes of one received message, as sent. A larger one ends the
	// connection with code 1009. Default 32 MiB. Messages are not kept whole.
	MaxMessage int64
	// ChannelBuffer is the most payload of one channel that is kept for a reader that is not slower
	// than 640 KiB/s; what a slower one does not take counts only against Budget. Default 256 KiB.
	ChannelBuffer int
	// Budget is the most payload of all channels together. At this limit the connection is not read
	// until somebody takes something out. Default 16 MiB, at least 64 KiB.
	Budget int
	// Room is what this connection shares with others for unread payload. While it is full, no connection that
	// holds 64 KiB of its own is read, until somebody takes something out. Nil: only the limits above.
	Room memory.Room
	// Patience is how long the connection must have been without room until Pongs are sent that nobody asked
	// for. The client may have closed its socket right behind its last byte of input, and then its kernel
	// answers the Pong with RST and throws away what it has still to deliver. But that is also how a client
	// is missed that has died. Default 30 s, and 5 s at most with a protocol that has a half-close: there
	// closing is not how a client says that its input is complete.
	Patience time.Duration
	// OnPanic is told of a panic in a goroutine of the connection's own. Nil ends the process.
	OnPanic rescue.Report
}

// ChannelConn is a WebSocket connection with numbered channels. Its methods may be called from
// several goroutines.
//
// The caller runs Serve until it returns and owns the connection until then; CloseAndWait, Close and
// CloseNow make it return.
type ChannelConn struct {
	*conn
	protocol Protocol
	inbound  *inbox.Inbox
	channels []Channel
	config   Config

	// Owned by Serve.
	over     bool        // nothing is read any more
	timer    *time.Timer // for waiting without room
	lastPong time.Time
}

// Accept answers the handshake of a request that Negotiate chose the protocol for. After an error
// the request has been answered.
func Accept(w http.ResponseWriter, r *http.Request, protocol Protocol, config Config) (*ChannelConn, error) {
	if len(config.Channels) > maxChannels || protocol.Tunnel() {
		http.Error(w, "too many channels, or a protocol without channels", http.StatusInternalServerError)
		return nil, fmt.Errorf("accept %q with %d channels: not a channel protocol, or more than %d channels", protocol, len(config.Channels), maxChannels)
	}
	c := newChannelConn(protocol, config)
	base, err := accept(w, r, protocol, c.config.MaxMessage)
	if err != nil {
		return nil, err
	}
	c.conn = base
	c.reportPanics(c.config.OnPanic)
	if config.Greeting {
		if err := c.greet(); err != nil {
			c.CloseNow()
			return nil, fmt.Errorf("greet the client: %w", err)
		}
	}
	return c, nil
}

// newChannelConn returns one without its conn.
func newChannelConn(protocol Protocol, config Config) *ChannelConn {
	if config.MaxMessage == 0 {
		config.MaxMessage = defaultMaxMessage
	}
	if config.ChannelBuffer == 0 {
		config.ChannelBuffer = defaultChannelBuffer
	}
	if config.Budget == 0 {
		config.Budget = defaultBudget
	}
	if config.Patience == 0 {
		config.Patience = defaultPatience
	}
	if protocol.HalfClose() {
		config.Patience = min(config.Patience, halfClosePatience)
	}
	config.Budget = max(config.Budget, inbox.MinBudget)
	if config.Room == nil {
		config.Room = memory.Unshared{}
	}

	wanted := make([]bool, len(config.Channels))
	for i, direction := range config.Channels {
		wanted[i] = direction.readable()
	}
	c := &ChannelConn{
		protocol: protocol,
		config:   config,
		inbound:  inbox.New(inbox.Format{Base64: protocol.Base64(), HalfClose: protocol.HalfClose()}, wanted, config.ChannelBuffer, config.Budget, config.Room),
		channels: make([]Channel, len(config.Channels)),
	}
	c.inbound.Wait = c.waitForRoom
	for i := range c.channels {
		c.channels[i] = Channel{conn: c, number: byte(i), direction: config.Channels[i]} //nolint:gosec // at most maxChannels
	}
	return c
}

func (c *ChannelConn) greet() error {
	for i := range c.channels {
		if c.channels[i].direction.writable() {
			return c.channels[i].writeEmpty()
		}
	}
	return nil
}

// Protocol is the one given to Accept.
func (c *ChannelConn) Protocol() Protocol { return c.protocol }

// LocalAddr is our address of the connection.
func (c *ChannelConn) LocalAddr() net.Addr { return c.network.LocalAddr() }

// RemoteAddr is the client's address.
func (c *ChannelConn) RemoteAddr() net.Addr { return c.network.RemoteAddr() }

// NetConn is the connection underneath, to ask it about its state; bytes must not be read from it or
// written to it.
func (c *ChannelConn) NetConn() net.Conn { return c.network }

// Channel returns a channel, nil for one that is not in Config.Channels.
func (c *ChannelConn) Channel(number byte) *Channel {
	if int(number) >= len(c.channels) {
		return nil
	}
	return &c.channels[number]
}

// Serve reads from the client until the connection is over, in the caller's goroutine, and releases
// the socket before it returns. It must be called once; without it nothing is received, no Ping is
// answered and no client is missed. The context's end is CloseNow.
//
// The error is nil when the client sent Close, or closed its end after ours; otherwise it says why the
// connection is over.
//
// The end of the client is one thing, Done; the end of what it sends on a channel another, which a reader of
// the channel sees: io.EOF after a half-close. Protocols that have none end all channels so when the client
// sends Close with 1000 or without a code, or FIN between two messages: those are what their clients have to
// say it with. Any other end is an error behind what came before.
//
// After Freeze it returns handover.ErrFrozen, and the socket is not released.
func (c *ChannelConn) Serve(ctx context.Context) error {
	c.serving.Store(true)
	defer c.serving.Store(false)
	stop := context.AfterFunc(ctx, func() { rescue.Call(c.onPanic, c.CloseNow) })
	defer stop()
	defer c.release()
	err := c.serve()
	if c.frozen.Load() {
		return handover.ErrFrozen
	}
	return err
}

func (c *ChannelConn) serve() error {
	if c.over { // before it was resumed
		return c.endAgain()
	}
	c.writeHeldUp()
	for !c.frozen.Load() {
		if !c.inbound.Receiving {
			if _, err := c.in.Next(); err != nil {
				return c.ended(err, err == io.EOF)
			}
			c.received()
		}
		n, err := c.inbound.Receive(c.in)
		if n > 0 {
			c.active()
		}
		if err != nil {
			return c.ended(err, false)
		}
	}
	return handover.ErrFrozen
}

// ended turns the error that ended the read loop into Serve's. The loop was between two messages or not.
func (c *ChannelConn) ended(err error, between bool) error {
	if c.timer != nil {
		c.timer.Stop()
	}
	if c.stopped(err) {
		return handover.ErrFrozen
	}
	c.over = true
	err = c.readError(err, func(reason error) {
		if !c.protocol.HalfClose() && saysEndOfInput(err, reason, between) {
			c.inbound.EndAll()
		}
		c.inbound.Fail(reason)
	})
	return c.served(err)
}

// served is what Serve returns when the connection has ended so.
func (c *ChannelConn) served(err error) error {
	if err == ErrClientClosed || err == ErrClientVanished && c.closeSent.Load() {
		return nil
	}
	return err
}

// saysEndOfInput tells whether a client without half-close has said with the end of its connection that its
// input is complete.
func saysEndOfInput(err, reason error, between bool) bool {
	var closed *frames.CloseFrame
	if errors.As(err, &closed) && reason == ErrClientClosed {
		return closed.Code == CloseNormal || closed.Code == frames.CloseNoStatus
	}
	return reason == ErrClientVanished && between
}

// waitForRoom waits until room is signalled or the time is up, and notices meanwhile that the client
// went away (kubernetes#89031: its process would otherwise stay for ever behind a stuck stdin). After a FIN it
// goes on, as what came before is still to be read.
func (c *ChannelConn) waitForRoom(room <-chan struct{}, atMost time.Duration) error {
	began := time.Now()
	for {
		tick := blockedPoll
		if atMost > 0 {
			tick = min(tick, time.Until(began.Add(atMost)))
			if tick <= 0 {
				return nil
			}
		}
		if c.timer == nil {
			c.timer = time.NewTimer(tick)
		} else {
			c.timer.Reset(tick)
		}
		select {
		case <-room:
			c.timer.Stop()
			return nil
		case <-c.freezing:
			c.timer.Stop()
			return handover.ErrFrozen
		case now := <-c.timer.C:
			switch end := c.peerEnd(); end {
			case nil:
				if now.Sub(began) >= c.config.Patience && now.Sub(c.lastPong) >= blockedPong {
					c.lastPong = now
					c.heartbeat()
				}
			case ErrClientVanished:
				c.finish(end)
				c.network.SetWriteDeadline(time.Unix(1, 0)) //nolint:errcheck // for writers that are stuck; nobody reads
			default:
				return end
			}
		}
	}
}

// Done is closed as soon as the connection is over: the client's Close or end of stream, an error,
// or the end of a close from our side. What came before the client's end may still have to be read.
func (c *ChannelConn) Done() <-chan struct{} { return c.done }

// Err says why the connection is over, nil while it is not. ErrClientClosed and ErrClosed are the
// orderly reasons.
func (c *ChannelConn) Err() error { return c.err() }

// LastActivity is when payload was last received or sent; before that, when the connection began.
func (c *ChannelConn) LastActivity() time.Time { return time.Unix(0, c.lastActivity.Load()) }

// LastReceived is when anything was last received, Ping and Pong included.
func (c *ChannelConn) LastReceived() time.Time { return time.Unix(0, c.lastReceived.Load()) }

// Ping sends a Ping frame behind the message that is being written, if there is one. It does not
// block and does not wait for the Pong, which shows in LastReceived.
func (c *ChannelConn) Ping() error {
	if err := c.Err(); err != nil {
		return err
	}
	c.ping()
	return nil
}

// CloseAndWait ends the session in order: it sends Close with code 1000 behind everything written
// before, discards what the client still sends, and waits for the client to close. The read loop
// goes on meanwhile, because bytes that are unread when we close make the kernel send RST, which
// throws away what the client has not received yet (kubernetes#60140).
//
// When the context ends first the connection is closed and the error says so. There is no other
// limit: a slow client may need minutes for what is under way to it, and LastReceived shows whether
// it is there. Channels must not be written to any more.
func (c *ChannelConn) CloseAndWait(ctx context.Context) error {
	return c.close(ctx, CloseNormal, "")
}

// CloseWrite sends Close with code 1000 behind everything written before: nothing more comes from us. Reading
// goes on until the client closes, which it does when it sees the Close. A client that has not answered it, and
// has sent nothing for silentAfterClose, gets the end of our side of the connection too (see close).
//
// It returns when both are sent, or the connection is over, or the context is done; with handover.ErrFrozen it is to be
// called again after Resume, as are CloseAndWait and Close.
func (c *ChannelConn) CloseWrite(ctx context.Context) error {
	if err := c.sendClose(ctx, CloseNormal, ""); err != nil || c.protocol.HalfClose() {
		return err
	}
	sent := time.Now()
	look := time.NewTicker(closedQuiet)
	defer look.Stop()
	for {
		select {
		case <-c.done:
			return nil
		case <-ctx.Done():
			return nil
		case <-c.freezing:
			return handover.ErrFrozen
		case now := <-look.C:
			quiet := now.Sub(sent) >= silentAfterClose && now.Sub(c.LastReceived()) >= silentAfterClose && c.inbound.Empty()
			if quiet && c.endOurSide() {
				return nil
			}
		}
	}
}

// endOurSide sends FIN if the client's kernel has everything before it.
func (c *ChannelConn) endOurSide() bool {
	half, ok := c.network.(interface{ CloseWrite() error })
	if !ok || !allAcknowledged(c.network) {
		return false
	}
	half.CloseWrite() //nolint:errcheck // the client may have gone
	return true
}

// Close does the close handshake with this code and reason (of which at most 123 bytes are sent),
// and waits for the client at most 2 seconds, a writer that is stuck included. Then the connection
// is closed, and writers and readers of its channels return.
func (c *ChannelConn) Close(code int, reason string) error {
	ctx, cancel := context.WithTimeout(context.Background(), closeTimeout)
	defer cancel()
	return c.close(ctx, code, reason)
}

func (c *ChannelConn) close(ctx context.Context, code int, reason string) error {
	c.inbound.DiscardAll()
	if err := c.sendClose(ctx, code, reason); err != nil {
		c.CloseNow()
		return err
	}
	ended := time.NewTicker(closedQuiet)
	defer ended.Stop()
	for {
		select {
		case <-c.done:
			return nil
		case <-c.freezing:
			return handover.ErrFrozen
		case <-ended.C:
			// Clients of the older protocols wait for the end of the connection. A client that looks at its
			// socket before it reads does not even see frames that came in one TLS record with others
			// (python-websocket's poll). We go on reading, so that what it may still send does no harm. Behind
			// a proxy that closes both ways at our end it is as with a runtime that closes first, but for
			// what has not come as far as the proxy yet.
			if !c.protocol.HalfClose() && c.endOurSide() {
				ended.Stop()
			}
		case <-ctx.Done():
			c.CloseNow()
			return fmt.Errorf("wait for the client's Close: %w", context.Cause(ctx))
		}
	}
}

const (
	// closedQuiet is for how long after our Close a client of a protocol without half-close may answer it before
	// our side of the connection is ended.
	closedQuiet = 250 * time.Millisecond
	// silentAfterClose is the same for a client that may still be sending. The stock server gives it a second
	// whatever it sends.
	silentAfterClose = time.Second
)

// CloseNow ends the connection without a word to the client. It does not block; may be called more
// than once. It does nothing to a frozen connection.
func (c *ChannelConn) CloseNow() {
	if !c.beginClosing() {
		return
	}
	c.inbound.Fail(ErrClosed)
	c.finish(ErrClosed)
	c.network.Close()
}
