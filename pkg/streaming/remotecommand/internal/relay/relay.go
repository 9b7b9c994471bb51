// Package relay relays a session to the container runtime's own streaming server. Only that server has the streams of a
// container's main process, and only it can run commands in containers whose runtime is not runc-compatible (Kata, gVisor).
// The package is a client of that server over SPDY, which every runtime speaks.
package relay

import (
	"bufio"
	"bytes"
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/streamshim/streamshim/pkg/handover"
	"github.com/streamshim/streamshim/pkg/rescue"
	"github.com/streamshim/streamshim/pkg/session"
	"github.com/streamshim/streamshim/pkg/streaming/buffers"
	"github.com/streamshim/streamshim/pkg/streaming/internal/socket"
	"github.com/streamshim/streamshim/pkg/streaming/internal/spdy"
	"github.com/streamshim/streamshim/pkg/streaming/internal/status"
	"github.com/streamshim/streamshim/pkg/streaming/internal/transport"
	"github.com/streamshim/streamshim/pkg/streaming/remotecommand/internal/protocol"
	"github.com/streamshim/streamshim/pkg/workload"
)

const (
	upstreamReplyTimeout = 10 * time.Second // for the upstream to accept the streams
	maxUpstreamStatus    = 64 << 10         // bytes read of the upstream's error stream
	maxUpstreamMessage   = 1 << 10          // bytes of an upstream's error that are shown
	upstreamDetachWait   = time.Second      // for the upstream to end an attach whose client has detached
	detachMax            = 10 * time.Second // for the container to become silent; then a client whose input has ended is detached anyway
)

// Relay is a process that the upstream's own streaming server serves: the main process of a container that a client
// attaches to, or a command. It implements remotecommand.Process. Its methods may be called from several goroutines.
type Relay struct {
	conn           *spdy.Conn
	wire           transport.Conn // conn
	buffers        *buffers.Share
	network        net.Conn // below conn
	stdin, resize  *spdy.Stream
	failure        *spdy.Stream
	jsonStatus     bool
	stdinGrace     time.Duration // see Options.StdinGrace
	stdout, stderr *output       // nil if the command did not ask for it
	lastOutput     atomic.Int64  // when the upstream sent output last, in ns since 1970; only with a buffer limit
	upstream       rescue.Group
	exited         chan struct{}
	frozen         chan struct{}
	detaching      atomic.Int64   // since when the client is detaching, in ns since 1970; 0 if it is not
	detached       atomic.Bool    // the connection is closed because the client has detached
	message        []byte         // of the upstream's error stream
	result         *status.Status // valid once exited is closed
	closeOnce      sync.Once
	freezeOnce     sync.Once
}

// Options configure a Relay.
type Options struct {
	// Buffer bounds the bytes of output that wait for a client that reads too slowly. The upstream is always read, so such
	// a client misses output and does not stop the container (moby#41827). With 0 a slow client slows the command down, as
	// for an exec.
	Buffer int
	// StdinGrace is how long there must have been no output before the client's end of input is passed on. If it is
	// negative, the end of input is never passed on. If it is positive, the end of input is a detach: the session ends
	// even if the upstream does not end it.
	StdinGrace time.Duration
	// Buffers bound the unread data of all sessions.
	Buffers *buffers.Share
	// Report is called after a panic.
	Report rescue.Report
}

// Start redeems a streaming URL of the upstream. The context bounds only the start.
func Start(ctx context.Context, target string, c workload.Command, options Options) (*Relay, error) {
	conn, network, version, err := dialUpstream(ctx, target, spdy.Config{Room: options.Buffers, OnPanic: options.Report})
	if err != nil {
		return nil, fmt.Errorf("connect to the upstream's streaming server: %w", err)
	}
	r := newRelay(conn, network, options.Buffers, options.Report)
	r.stdinGrace, r.jsonStatus = options.StdinGrace, version.JSONStatus
	r.serve()
	if err := r.open(c, version, options.Buffer); err != nil {
		r.Close() //nolint:errcheck // of no use
		return nil, fmt.Errorf("open the upstream's streams: %w", err)
	}
	return r, nil
}

func newRelay(conn *spdy.Conn, network net.Conn, buffers *buffers.Share, report rescue.Report) *Relay {
	return &Relay{
		upstream: rescue.Group{Report: report},
		conn:     conn, wire: transport.Streams{Conn: conn}, network: network, buffers: buffers, exited: make(chan struct{}), frozen: make(chan struct{}),
	}
}

// serve reads from the upstream until the relay is closed or frozen.
func (r *Relay) serve() {
	r.upstream.Go(func() { r.conn.Serve(context.Background()) }) //nolint:errcheck // seen through Done
}

// dialUpstream connects to a runtime's streaming server and upgrades the connection to SPDY, the
// protocol that every runtime speaks.
func dialUpstream(ctx context.Context, target string, config spdy.Config) (*spdy.Conn, net.Conn, protocol.Version, error) {
	u, err := url.Parse(target)
	if err != nil {
		return nil, nil, protocol.Version{}, err
	}
	var dialer interface {
		DialContext(ctx context.Context, network, address string) (net.Conn, error)
	} = &net.Dialer{}
	port := "80"
	if u.Scheme == "https" {
		dialer, port = &tls.Dialer{}, "443" // verified against the system's roots, as the kubelet does
	}
	address := u.Host
	if u.Port() == "" {
		address = net.JoinHostPort(u.Hostname(), port)
	}
	network, err := dialer.DialContext(ctx, "tcp", address)
	if err != nil {
		return nil, nil, protocol.Version{}, err
	}
	conn, version, err := upgradeUpstream(ctx, network, target, config)
	if err != nil {
		network.Close() //nolint:errcheck // of no use
		return nil, nil, protocol.Version{}, err
	}
	return conn, network, version, nil
}

func upgradeUpstream(ctx context.Context, network net.Conn, target string, config spdy.Config) (*spdy.Conn, protocol.Version, error) {
	request, err := http.NewRequestWithContext(ctx, http.MethodPost, target, http.NoBody)
	if err != nil {
		return nil, protocol.Version{}, err
	}
	request.Header.Set("Connection", "Upgrade")
	request.Header.Set("Upgrade", transport.SPDY)
	for _, v := range protocol.SPDY {
		request.Header.Add(transport.HeaderProtocolVersion, v.Name)
	}
	stop := context.AfterFunc(ctx, func() { network.SetDeadline(time.Unix(1, 0)) }) //nolint:errcheck // only to wake us
	defer stop()
	if err := request.Write(network); err != nil {
		return nil, protocol.Version{}, err
	}
	reader := bufio.NewReader(network)
	response, err := http.ReadResponse(reader, request)
	if err != nil {
		return nil, protocol.Version{}, err
	}
	if response.StatusCode != http.StatusSwitchingProtocols {
		text, _ := io.ReadAll(io.LimitReader(response.Body, maxUpstreamMessage)) //nolint:errcheck // what could be read
		response.Body.Close()                                                    //nolint:errcheck // nothing is left in it
		return nil, protocol.Version{}, fmt.Errorf("the upgrade was refused: %s: %s", response.Status, bytes.TrimSpace(text))
	}
	if !stop() {
		return nil, protocol.Version{}, ctx.Err()
	}
	var buffered []byte
	if n := reader.Buffered(); n > 0 {
		peeked, _ := reader.Peek(n) //nolint:errcheck // n bytes are there
		buffered = append(buffered, peeked...)
	}
	return spdy.NewClient(network, buffered, config), protocol.ByName(response.Header.Get(transport.HeaderProtocolVersion)), nil
}

// open opens the streams that the command wants and starts to follow them.
func (r *Relay) open(c workload.Command, version protocol.Version, buffer int) error {
	var stdout, stderr *spdy.Stream
	var opened []*spdy.Stream
	for _, s := range []struct {
		name   string
		wanted bool
		stream **spdy.Stream
	}{
		{transport.StreamError, true, &r.failure},
		{transport.StreamStdin, c.Stdin, &r.stdin},
		{transport.StreamStdout, c.Stdout, &stdout},
		{transport.StreamStderr, c.Stderr && !c.TTY, &stderr},
		{transport.StreamResize, c.TTY && version.Resize, &r.resize},
	} {
		if !s.wanted {
			continue
		}
		stream, err := r.conn.OpenStream(http.Header{transport.HeaderStreamType: {s.name}})
		if err != nil {
			return err
		}
		*s.stream = stream
		opened = append(opened, stream)
	}
	if stdout != nil {
		r.stdout = r.newOutput(stdout, c.TTY, buffer)
	}
	if stderr != nil {
		r.stderr = r.newOutput(stderr, c.TTY, buffer)
	}
	r.failure.CloseWrite() //nolint:errcheck // we have nothing to say on it
	r.followStatus()
	if err := waitAccepted(opened); err != nil {
		return err
	}
	return r.Resize(c.Size)
}

// waitAccepted waits until the upstream has replied to all streams, even if the session ends. If the connection were closed
// before, the stock server could never send the replies. Its next write would wait for that, and hold the lock through which
// all of the container's output goes. So a client that comes and goes would stop the container.
func waitAccepted(streams []*spdy.Stream) error {
	ctx, cancel := context.WithTimeout(context.Background(), upstreamReplyTimeout)
	defer cancel()
	for _, stream := range streams {
		if err := stream.WaitAccepted(ctx); err != nil {
			return fmt.Errorf("wait for the upstream's reply: %w", err)
		}
	}
	return nil
}

// followStatus waits for the upstream's status.
func (r *Relay) followStatus() {
	r.upstream.Go(func() {
		message, err := io.ReadAll(io.LimitReader(r.failure, maxUpstreamStatus-int64(len(r.message))))
		r.message = append(r.message, message...)
		if errors.Is(err, handover.ErrFrozen) {
			return
		}
		r.result = r.readResult(err)
		close(r.exited)
	})
}

// readResult returns the status that the upstream has written on its error stream, which has ended with the error.
func (r *Relay) readResult(err error) *status.Status {
	message := bytes.TrimSpace(r.message) // a space alone means that the status is missing, see protocol.Version.PromiseStatus
	switch {
	case len(message) > 0 || err == nil:
		return status.Parse(message, r.jsonStatus)
	case r.detached.Load():
		return status.Success()
	default:
		return status.InternalError("the connection to the upstream's streaming server was lost: " + err.Error())
	}
}

// output is a stream of the upstream as the session reads it.
type output struct {
	stream *spdy.Stream // nil if it had ended before a hand-over
	skip   *skipBuffer  // nil if Options.Buffer is 0
}

func (r *Relay) newOutput(stream *spdy.Stream, tty bool, buffer int) *output {
	if buffer == 0 {
		return &output{stream: stream}
	}
	o := &output{stream, newSkipBuffer(buffer, tty, r.buffers)}
	r.fill(o)
	return o
}

// fill keeps reading what the upstream sends.
func (r *Relay) fill(o *output) {
	r.upstream.Go(func() {
		if _, err := o.stream.WriteTo(notedOutput{o.skip, &r.lastOutput}); !errors.Is(err, handover.ErrFrozen) {
			o.skip.end() // its end is the end of output
		}
	})
}

// Read implements io.Reader.
func (o *output) Read(p []byte) (int, error) {
	switch {
	case o.skip != nil:
		return o.skip.Read(p)
	case o.stream != nil:
		return o.stream.Read(p)
	default:
		return 0, io.EOF
	}
}

// Close implements io.Closer.
func (o *output) Close() error {
	if o.skip != nil {
		return o.skip.Close()
	}
	if o.stream != nil {
		o.stream.CloseRead()
	}
	return nil
}

// notedOutput records when something was written.
type notedOutput struct {
	io.Writer
	last *atomic.Int64
}

func (o notedOutput) Write(p []byte) (int, error) {
	o.last.Store(time.Now().UnixNano())
	return o.Writer.Write(p)
}

type input struct {
	*spdy.Stream
	relay *Relay
	grace time.Duration // see Options.StdinGrace
}

func (i input) Close() error {
	switch {
	case i.grace < 0:
		return nil
	case i.grace == 0:
		return i.CloseWrite()
	}
	i.relay.detaching.Store(time.Now().UnixNano())
	i.relay.startDetaching()
	return nil
}

// startDetaching detaches the client once there was no output for a while, or after detachMax.
func (r *Relay) startDetaching() {
	rescue.Go(r.upstream.Report, r.detachWhenSilent)
}

// detachWhenSilent ends with the relay, or when it is frozen.
func (r *Relay) detachWhenSilent() {
	began := time.Unix(0, r.detaching.Load())
	for {
		last := time.Unix(0, r.lastOutput.Load())
		if last.Before(began) {
			last = began
		}
		wait := min(time.Until(last.Add(r.stdinGrace)), time.Until(began.Add(detachMax)))
		if wait <= 0 {
			r.detach()
			return
		}
		if r.endsWithin(wait) {
			return
		}
	}
}

// endsWithin reports whether the relay ended, or was frozen, within the time.
func (r *Relay) endsWithin(wait time.Duration) bool {
	timer := time.NewTimer(wait)
	defer timer.Stop()
	select {
	case <-r.exited:
		return true
	case <-r.frozen:
		return true
	case <-timer.C:
		return false
	}
}

// detach passes the end of a client's input on. At that containerd ends the session. CRI-O continues until the container
// ends.
func (r *Relay) detach() {
	r.stdin.CloseWrite() //nolint:errcheck // fails when the session has ended before
	if !r.endsWithin(upstreamDetachWait) {
		r.detached.Store(true)
		r.conn.Close() //nolint:errcheck // seen through Exited
	}
}

// Pending returns the number of bytes that the upstream's kernel has not acknowledged.
func (i input) Pending() int {
	n, _ := socket.Unacknowledged(i.relay.network) // 0 if it is not known
	return n
}

// ClientLeft passes the end of the client's input on, even if it otherwise would not end the session: the client has left, so
// no output can be cut off. If it also ends the container's input, it is passed on only if the input was complete.
func (i input) ClientLeft(complete bool) {
	if complete || i.grace < 0 {
		i.CloseWrite() //nolint:errcheck // fails when the upstream has gone, which shows in Exited
	}
}

// Stdin implements remotecommand.Process.
func (r *Relay) Stdin() io.WriteCloser {
	if r.stdin == nil {
		return nil
	}
	return input{r.stdin, r, r.stdinGrace}
}

// Stdout implements remotecommand.Process.
func (r *Relay) Stdout() io.ReadCloser { return r.stdout.reader() }

// Stderr implements remotecommand.Process.
func (r *Relay) Stderr() io.ReadCloser { return r.stderr.reader() }

// reader returns a nil interface for a nil pointer.
func (o *output) reader() io.ReadCloser {
	if o == nil {
		return nil
	}
	return o
}

// Resize implements remotecommand.Process.
func (r *Relay) Resize(size workload.Size) error {
	if r.resize == nil || !size.Known() {
		return nil
	}
	message, err := json.Marshal(size)
	if err != nil {
		return err
	}
	_, err = r.resize.Write(append(message, '\n'))
	return err
}

// Result returns the upstream's status. It is valid once Exited is closed.
func (r *Relay) Result() *status.Status { return r.result }

// Portable returns why the connection to the upstream cannot be handed over, or nil if it can be or has ended.
func (r *Relay) Portable() error {
	if err := r.wire.Portable(); err != nil && !transport.Closed(r.conn.Done()) {
		return fmt.Errorf("its connection to the container runtime's streaming server: %w", err)
	}
	return nil
}

// Exited implements remotecommand.Process. It is closed when the upstream has sent its status, or can no longer send it.
func (r *Relay) Exited() <-chan struct{} { return r.exited }

// ExitCode implements remotecommand.Process.
func (r *Relay) ExitCode() int { return r.result.ExitCode() }

// ContainerExited implements remotecommand.Process. It is never closed, because the upstream watches its containers itself.
func (r *Relay) ContainerExited() <-chan struct{} { return nil }

// ContainerEnding implements remotecommand.Process.
func (r *Relay) ContainerEnding() bool { return false }

// PID implements remotecommand.Process.
func (r *Relay) PID() int { return 0 }

// StandIn implements remotecommand.Process.
func (r *Relay) StandIn() string { return "" }

// Signal implements remotecommand.Process.
func (r *Relay) Signal(syscall.Signal) error { return session.ErrNotSupported }

// Disconnect implements remotecommand.Process. The upstream decides what happens to the process.
func (r *Relay) Disconnect() { r.conn.Close() } //nolint:errcheck // seen through Exited

// Kill implements remotecommand.Process.
func (r *Relay) Kill() { r.Disconnect() }

// Close implements remotecommand.Process.
func (r *Relay) Close() error {
	r.closeOnce.Do(func() {
		r.conn.Close() //nolint:errcheck // nothing is left to say to the upstream
		r.upstream.Wait()
	})
	return nil
}
