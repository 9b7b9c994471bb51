package remotecommand

import (
	"bufio"
	"bytes"
	"context"
	"crypto/tls"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/streamshim/streamshim/pkg/rescue"
	"github.com/streamshim/streamshim/pkg/session"
	"github.com/streamshim/streamshim/pkg/streaming/buffers"
	"github.com/streamshim/streamshim/pkg/streaming/internal/socket"
	"github.com/streamshim/streamshim/pkg/streaming/internal/spdy"
	"github.com/streamshim/streamshim/pkg/streaming/internal/status"
	"github.com/streamshim/streamshim/pkg/streaming/internal/transport"
	"github.com/streamshim/streamshim/pkg/workload"
)

const (
	relayTimeout         = 30 * time.Second // to get a URL of the upstream, to connect to it and be upgraded
	upstreamReplyTimeout = 10 * time.Second // for the upstream to accept the streams
	maxUpstreamStatus    = 64 << 10         // bytes read of the upstream's error stream
	maxUpstreamMessage   = 1 << 10          // bytes shown of an upstream's refusal
	upstreamDetachWait   = time.Second      // for the upstream to end an attach whose client has detached
)

// relay is a process that the upstream's own streaming server serves: the main process of a
// container one attaches to, or a command in a container whose runtime is not run by us. To the
// session it is a Process like any other.
type relay struct {
	conn           *spdy.Conn
	wire           transport.Conn // conn
	buffers        *buffers.Share
	network        net.Conn // below conn
	stdin, resize  *spdy.Stream
	failure        *spdy.Stream
	jsonStatus     bool
	stdinGrace     time.Duration // see startRelay
	stdout, stderr *relayOutput  // nil those that the command did not ask for
	lastOutput     atomic.Int64  // when the upstream sent output last, in ns since 1970; only with a buffer limit
	upstream       rescue.Group
	exited         chan struct{}
	frozen         chan struct{}
	detaching      atomic.Int64   // since when the client detaches, in ns since 1970; 0 when it does not
	detached       atomic.Bool    // the connection is closed because the client has detached
	message        []byte         // of the upstream's error stream
	result         *status.Status // valid once exited is closed
	closeOnce      sync.Once
	freezeOnce     sync.Once
}

// startRelay redeems a streaming URL of the upstream. With a buffer limit the upstream is always
// read and a client that is too slow misses output, instead of stopping the container (moby#41827);
// with none the client's pace is the command's, as it is for an exec.
//
// The client's end of input is passed on after stdinGrace without output, never when that is negative. When it is
// positive it is a detach, after which the session ends whether the upstream ends it or not.
func startRelay(ctx context.Context, target string, c workload.Command, buffer int, stdinGrace time.Duration, buffers *buffers.Share, report rescue.Report) (Process, error) {
	conn, network, protocol, err := dialUpstream(ctx, target, spdy.Config{Room: buffers, OnPanic: report})
	if err != nil {
		return nil, fmt.Errorf("connect to the upstream's streaming server: %w", err)
	}
	r := newRelay(conn, network, buffers, report)
	r.stdinGrace, r.jsonStatus = stdinGrace, protocol.jsonStatus
	r.serve()
	if err := r.open(c, protocol, buffer); err != nil {
		r.Close() //nolint:errcheck // of no use
		return nil, fmt.Errorf("open the upstream's streams: %w", err)
	}
	return r, nil
}

func newRelay(conn *spdy.Conn, network net.Conn, buffers *buffers.Share, report rescue.Report) *relay {
	return &relay{
		upstream: rescue.Group{Report: report},
		conn:     conn, wire: transport.Streams{Conn: conn}, network: network, buffers: buffers, exited: make(chan struct{}), frozen: make(chan struct{}),
	}
}

// serve reads from the upstream until the relay is closed or frozen.
func (r *relay) serve() {
	r.upstream.Go(func() { r.conn.Serve(context.Background()) }) //nolint:errcheck // seen through Done
}

// dialUpstream connects to a runtime's streaming server and upgrades the connection to SPDY, the
// protocol that every runtime speaks.
func dialUpstream(ctx context.Context, target string, config spdy.Config) (*spdy.Conn, net.Conn, protocolVersion, error) {
	u, err := url.Parse(target)
	if err != nil {
		return nil, nil, protocolVersion{}, err
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
		return nil, nil, protocolVersion{}, err
	}
	conn, protocol, err := upgradeUpstream(ctx, network, target, config)
	if err != nil {
		network.Close() //nolint:errcheck // of no use
		return nil, nil, protocolVersion{}, err
	}
	return conn, network, protocol, nil
}

func upgradeUpstream(ctx context.Context, network net.Conn, target string, config spdy.Config) (*spdy.Conn, protocolVersion, error) {
	request, err := http.NewRequestWithContext(ctx, http.MethodPost, target, http.NoBody)
	if err != nil {
		return nil, protocolVersion{}, err
	}
	request.Header.Set("Connection", "Upgrade")
	request.Header.Set("Upgrade", transport.SPDY)
	for _, p := range protocols {
		request.Header.Add(transport.HeaderProtocolVersion, p.name)
	}
	stop := context.AfterFunc(ctx, func() { network.SetDeadline(time.Unix(1, 0)) }) //nolint:errcheck // only to wake us
	defer stop()
	if err := request.Write(network); err != nil {
		return nil, protocolVersion{}, err
	}
	reader := bufio.NewReader(network)
	response, err := http.ReadResponse(reader, request)
	if err != nil {
		return nil, protocolVersion{}, err
	}
	if response.StatusCode != http.StatusSwitchingProtocols {
		text, _ := io.ReadAll(io.LimitReader(response.Body, maxUpstreamMessage)) //nolint:errcheck // what could be read
		response.Body.Close()                                                    //nolint:errcheck // nothing is left in it
		return nil, protocolVersion{}, fmt.Errorf("the upgrade was refused: %s: %s", response.Status, bytes.TrimSpace(text))
	}
	if !stop() {
		return nil, protocolVersion{}, ctx.Err()
	}
	var buffered []byte
	if n := reader.Buffered(); n > 0 {
		peeked, _ := reader.Peek(n) //nolint:errcheck // n bytes are there
		buffered = append(buffered, peeked...)
	}
	protocol := protocolByName(response.Header.Get(transport.HeaderProtocolVersion))
	return spdy.NewClient(network, buffered, config), protocol, nil
}

// open opens the streams that the command wants and starts to follow them.
func (r *relay) open(c workload.Command, protocol protocolVersion, buffer int) error {
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
		{transport.StreamResize, c.TTY && protocol.resize, &r.resize},
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
		r.stdout = r.output(stdout, c.TTY, buffer)
	}
	if stderr != nil {
		r.stderr = r.output(stderr, c.TTY, buffer)
	}
	r.failure.CloseWrite() //nolint:errcheck // we have nothing to say on it
	r.followStatus()
	if err := waitAccepted(opened); err != nil {
		return err
	}
	return r.Resize(c.Size)
}

// waitAccepted waits for the upstream to have replied to all streams. A connection that is closed
// before leaves the stock server with streams whose reply can never be sent; it waits for that in its
// next write, with the lock held through which all of the container's output goes, so that a client
// that comes and goes would stop the container. Therefore the wait does not end with the session.
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

// followStatus waits for what the upstream says of the end.
func (r *relay) followStatus() {
	r.upstream.Go(func() {
		message, err := io.ReadAll(io.LimitReader(r.failure, maxUpstreamStatus-int64(len(r.message))))
		r.message = append(r.message, message...)
		if isFrozen(err) {
			return
		}
		r.result = r.readResult(err)
		close(r.exited)
	})
}

// readResult is what the upstream has said on its error stream, which ended with the error.
func (r *relay) readResult(err error) *status.Status {
	message := bytes.TrimSpace(r.message) // a space alone is a status that never came, see promiseStatus
	switch {
	case len(message) > 0 || err == nil:
		return status.Parse(message, r.jsonStatus)
	case r.detached.Load():
		return status.Success()
	default:
		return status.InternalError("the connection to the upstream's streaming server was lost: " + err.Error())
	}
}

// relayOutput is a stream of the upstream as the session reads it.
type relayOutput struct {
	stream *spdy.Stream // nil when it has ended before a hand-over
	skip   *skipBuffer  // nil where the client's pace is the command's
}

func (r *relay) output(stream *spdy.Stream, tty bool, buffer int) *relayOutput {
	if buffer == 0 {
		return &relayOutput{stream: stream}
	}
	o := &relayOutput{stream, newSkipBuffer(buffer, tty, r.buffers)}
	r.fill(o)
	return o
}

// fill keeps reading what the upstream sends.
func (r *relay) fill(o *relayOutput) {
	r.upstream.Go(func() {
		if _, err := o.stream.WriteTo(notedOutput{o.skip, &r.lastOutput}); !isFrozen(err) {
			o.skip.end() // its end is the end of output
		}
	})
}

// Read implements io.Reader.
func (o *relayOutput) Read(p []byte) (int, error) {
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
func (o *relayOutput) Close() error {
	if o.skip != nil {
		return o.skip.Close()
	}
	if o.stream != nil {
		o.stream.CloseRead()
	}
	return nil
}

// notedOutput notes when something was written.
type notedOutput struct {
	io.Writer
	last *atomic.Int64
}

func (o notedOutput) Write(p []byte) (int, error) {
	o.last.Store(time.Now().UnixNano())
	return o.Writer.Write(p)
}

type relayInput struct {
	*spdy.Stream
	relay *relay
	grace time.Duration // see startRelay
}

func (i relayInput) Close() error {
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

// startDetaching detaches once there was no output for a while, or after detachMax.
func (r *relay) startDetaching() {
	rescue.Go(r.upstream.Report, r.detachWhenSilent)
}

// detachWhenSilent ends with the relay, or when it is frozen.
func (r *relay) detachWhenSilent() {
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
func (r *relay) endsWithin(wait time.Duration) bool {
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

// detach passes the end of a client's input on. containerd ends the session for it; CRI-O goes on until the
// container ends.
func (r *relay) detach() {
	r.stdin.CloseWrite() //nolint:errcheck // fails when the session has ended before
	if !r.endsWithin(upstreamDetachWait) {
		r.detached.Store(true)
		r.conn.Close() //nolint:errcheck // seen through Exited
	}
}

// Pending is how much the upstream's kernel has not acknowledged.
func (i relayInput) Pending() int {
	n, _ := socket.Unacknowledged(i.relay.network) // 0 is a good guess
	return n
}

// ClientLeft passes the end of the client's input on although the session was to go on after it: there is
// nobody left whose output could be cut. Only where it is also the end of the container's, it must have come.
func (i relayInput) ClientLeft(complete bool) {
	if complete || i.grace < 0 {
		i.CloseWrite() //nolint:errcheck // fails when the upstream has gone, which shows in Exited
	}
}

// Stdin implements Process.
func (r *relay) Stdin() io.WriteCloser {
	if r.stdin == nil {
		return nil
	}
	return relayInput{r.stdin, r, r.stdinGrace}
}

// Stdout implements Process.
func (r *relay) Stdout() io.ReadCloser { return r.stdout.reader() }

// Stderr implements Process.
func (r *relay) Stderr() io.ReadCloser { return r.stderr.reader() }

// reader is no nil pointer.
func (o *relayOutput) reader() io.ReadCloser {
	if o == nil {
		return nil
	}
	return o
}

// Resize implements Process.
func (r *relay) Resize(size workload.Size) error {
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

// Exited implements Process: it is closed when the upstream has said how the command ended, or can
// say no more.
func (r *relay) Exited() <-chan struct{} { return r.exited }

// ExitCode implements Process.
func (r *relay) ExitCode() int { return r.result.ExitCode() }

// ContainerExited implements Process: the upstream watches its containers itself.
func (r *relay) ContainerExited() <-chan struct{} { return nil }

// ContainerEnding implements Process.
func (r *relay) ContainerEnding() bool { return false }

// PID implements Process.
func (r *relay) PID() int { return 0 }

// StandIn implements Process.
func (r *relay) StandIn() string { return "" }

// Signal implements Process.
func (r *relay) Signal(syscall.Signal) error { return session.ErrNotSupported }

// Disconnect implements Process: what becomes of the process is the upstream's affair.
func (r *relay) Disconnect() { r.conn.Close() } //nolint:errcheck // seen through Exited

// Kill implements Process.
func (r *relay) Kill() { r.Disconnect() }

// Close implements Process.
func (r *relay) Close() error {
	r.closeOnce.Do(func() {
		r.conn.Close() //nolint:errcheck // nothing is left to say to the upstream
		r.upstream.Wait()
	})
	return nil
}
