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
	// maxChannels excludes the byte 255, which means half-close.
	maxChannels = 255

	defaultMaxMessage    = 32 << 20 // as in the stock server
	defaultChannelBuffer = 256 << 10
	defaultBudget        = 16 << 20

	// blockedPoll is how often a read loop without room checks whether the client is still there.
	// blockedPong is how often it sends an unsolicited Pong (RFC 6455 section 5.5.3). If the client was
	// killed, its FIN waits behind data that we do not read, but its kernel answers the Pong with RST. The Pong
	// also keeps client-go, whose pings we cannot see, from giving up after 61 seconds.
	//
	// The first Pong is sent when nothing has moved for Config.Patience.
	blockedPoll = 250 * time.Millisecond
	blockedPong = time.Second

	defaultPatience = 30 * time.Second
	// halfClosePatience is the same as in package spdy.
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

// Direction is the direction in which payload may move on a channel. What a client sends on a channel that is not
// readable, or does not exist, is ignored, as in the stock server.
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

// Config configures a connection. Zero limits mean the defaults.
type Config struct {
	// Channels are the connection's channels by number, at most 255. A base64 protocol can name only 10 of them with
	// digits. The characters after '9' count as further digits.
	Channels []Direction
	// Greeting sends an empty message on the lowest writable channel. The stock server and the API server do so,
	// also with v5, to tell the client that the connection is established.
	Greeting bool

	// MaxMessage bounds the bytes of one received message, as sent. A larger message ends the connection with code
	// 1009. Default 32 MiB. Messages are not buffered as a whole.
	MaxMessage int64
	// ChannelBuffer bounds the payload of one channel that is kept for a reader of at least 640 KiB/s. For a slower
	// reader only Budget is the bound. Default 256 KiB.
	ChannelBuffer int
	// Budget bounds the payload of all channels together. At this limit the connection is not read until somebody
	// reads from a channel. Default 16 MiB, at least 64 KiB.
	Budget int
	// Room is shared with other connections for unread payload. While it is full, a connection that holds 64 KiB of
	// its own is not read until somebody reads from a channel. If nil, only the limits above hold.
	Room memory.Room
	// Patience is how long the connection must have been without room before unsolicited Pongs are sent. They are
	// how a dead client is noticed. But if the client has closed its socket right after its last byte of input, its
	// kernel answers the Pong with RST and discards what it has not delivered yet. Default 30 s. With a protocol that
	// has a half-close it is at most 5 s, because there a client does not close to end its input.
	Patience time.Duration
	// OnPanic is called after a panic in one of the connection's own goroutines. If nil, a panic ends the process.
	OnPanic rescue.Report
}

// ChannelConn is a WebSocket connection with numbered channels. Its methods may be called from several goroutines.
//
// The caller runs Serve and owns the connection until Serve returns. CloseAndWait, Close and CloseNow make it return.
type ChannelConn struct {
	*conn
	protocol Protocol
	inbound  *inbox.Inbox
	channels []Channel
	config   Config

	// Owned by Serve.
	over     bool        // reading has ended
	timer    *time.Timer // for waitForRoom
	lastPong time.Time
}

// Accept completes the handshake of a request for which Negotiate has chosen the protocol. If it returns an error, it
// has answered the request.
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

// newChannelConn returns a ChannelConn without its conn.
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

// NetConn returns the underlying connection, to query its state. The caller must not read from it or write to it.
func (c *ChannelConn) NetConn() net.Conn { return c.network }

// Channel returns a channel, or nil if it is not in Config.Channels.
func (c *ChannelConn) Channel(number byte) *Channel {
	if int(number) >= len(c.channels) {
		return nil
	}
	return &c.channels[number]
}

// Serve reads from the client until the connection is over, in the caller's goroutine, and closes the socket before it
// returns. It must be called once. Until it is called, nothing is received, no Ping is answered, and the end of the
// client is not noticed. The end of the context is like CloseNow.
//
// The error is nil when the client sent Close, or closed its end after ours. Otherwise it is the reason why the
// connection is over.
//
// Done reports the end of the client. The end of its input on a channel is separate: a reader of the channel gets io.EOF
// after a half-close. In protocols without a half-close, a reader of any channel gets io.EOF when the client sends
// Close with 1000 or without a code, or FIN between two messages, because their clients have no other way to end their
// input. After any other end a reader gets what arrived before, and then an error.
//
// After Freeze it returns handover.ErrFrozen, and the socket stays open.
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
	if c.over { // already before the hand-over
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

// ended turns the error that ended the read loop into Serve's. between says that the loop was between two messages.
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

// served turns the reason why the connection is over into Serve's error.
func (c *ChannelConn) served(err error) error {
	if err == ErrClientClosed || err == ErrClientVanished && c.closeSent.Load() {
		return nil
	}
	return err
}

// saysEndOfInput reports whether a client without half-close has ended its connection in a way that means that its input
// is complete.
func saysEndOfInput(err, reason error, between bool) bool {
	var closed *frames.CloseFrame
	if errors.As(err, &closed) && reason == ErrClientClosed {
		return closed.Code == CloseNormal || closed.Code == frames.CloseNoStatus
	}
	return reason == ErrClientVanished && between
}

// waitForRoom waits until room is signalled or atMost has passed. Meanwhile it checks whether the client has gone
// (kubernetes#89031: otherwise its process would stay for ever behind a stuck stdin). After a FIN it keeps waiting,
// because the data before it is still to be read.
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
				c.network.SetWriteDeadline(time.Unix(1, 0)) //nolint:errcheck // unblocks writers; nobody reads what they send
			default:
				return end
			}
		}
	}
}

// Done is closed as soon as the connection is over: after the client's Close or end of stream, an error, or the end of a
// close from our side. Data that arrived before may still be unread.
func (c *ChannelConn) Done() <-chan struct{} { return c.done }

// Err returns why the connection is over, or nil while it is not. ErrClientClosed and ErrClosed are the orderly
// reasons.
func (c *ChannelConn) Err() error { return c.err() }

// LastActivity returns when payload was last received or sent, or when the connection began.
func (c *ChannelConn) LastActivity() time.Time { return time.Unix(0, c.lastActivity.Load()) }

// LastReceived returns when anything was last received, Ping and Pong included.
func (c *ChannelConn) LastReceived() time.Time { return time.Unix(0, c.lastReceived.Load()) }

// Ping sends a Ping frame, after the message that is being written. It does not block and does not wait for the Pong,
// which shows in LastReceived.
func (c *ChannelConn) Ping() error {
	if err := c.Err(); err != nil {
		return err
	}
	c.ping()
	return nil
}

// CloseAndWait ends the session in order. It sends Close with code 1000 after everything written before, discards what
// the client still sends, and waits for the client to close. The read loop continues meanwhile: if bytes were unread
// when we close, the kernel would send RST, and the client would lose what it has not received yet (kubernetes#60140).
//
// When the context ends first, the connection is closed and an error is returned. There is no other limit, because a
// slow client may need minutes for what is on its way to it. LastReceived shows whether it is alive. Channels must not
// be written to any more.
func (c *ChannelConn) CloseAndWait(ctx context.Context) error {
	return c.close(ctx, CloseNormal, "")
}

// CloseWrite sends Close with code 1000 after everything written before. Nothing can be written after it. Reading
// continues until the client closes, which it does when it sees the Close. If the client does not answer the Close and
// sends nothing for silentAfterClose, CloseWrite also sends FIN (see close).
//
// It returns when both are sent, the connection is over, or the context is done. If it returns handover.ErrFrozen, call
// it again after Resume. The same holds for CloseAndWait and Close.
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

// endOurSide sends FIN if the client's kernel has acknowledged everything before it.
func (c *ChannelConn) endOurSide() bool {
	half, ok := c.network.(interface{ CloseWrite() error })
	if !ok || !allAcknowledged(c.network) {
		return false
	}
	half.CloseWrite() //nolint:errcheck // the client may have gone
	return true
}

// Close does the close handshake with this code and reason, of which at most 123 bytes are sent. It waits for the client
// for at most 2 seconds, including the wait for a blocked writer. Then it closes the connection, and writers and readers
// of its channels return.
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
			// Clients of the older protocols wait for the end of the connection. A client that polls its socket
			// before it reads does not even see frames that arrived in one TLS record with others
			// (python-websocket). So we send FIN, and keep reading so that no unread data makes the kernel send
			// RST. A proxy that closes both directions at our FIN can still lose what has not reached it yet.
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
	// closedQuiet is how long a client of a protocol without half-close may take to answer our Close. After that we
	// send FIN.
	closedQuiet = 250 * time.Millisecond
	// silentAfterClose is the same for a client that may still be sending. The stock server always waits for one
	// second.
	silentAfterClose = time.Second
)

// CloseNow ends the connection without a Close frame. It does not block, and may be called more than once. It does
// nothing to a frozen connection.
func (c *ChannelConn) CloseNow() {
	if !c.beginClosing() {
		return
	}
	c.inbound.Fail(ErrClosed)
	c.finish(ErrClosed)
	c.network.Close()
}
