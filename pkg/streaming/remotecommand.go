package streaming

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/streamshim/streamshim/pkg/session"
	"github.com/streamshim/streamshim/pkg/streaming/internal/socket"
	"github.com/streamshim/streamshim/pkg/streaming/internal/spdy"
	"github.com/streamshim/streamshim/pkg/workload"
)

// remoteCommand is what an exec or attach session is to do, independent of its transport.
type remoteCommand struct {
	command   workload.Command
	buffers   *bufferShare
	start     startFunc
	endReason func(context.Context) string
}

// remoteCommandClient is the client's side of an exec or attach: its connection and the streams it
// asked for, nil those it did not.
type remoteCommandClient struct {
	connection
	protocol remoteCommandProtocol
	// ready is closed when all streams are there; they are valid from then on.
	ready                          <-chan struct{}
	stdin, stdout, stderr, failure workload.Stream // failure is the protocol's error stream
	resize                         workload.Stream
	// failureOpened holds the error stream as soon as it is there, before the others may be.
	failureOpened chan workload.Stream
	// statusRefused is closed when the error stream has ended from the client's side; nil where a
	// client cannot end it.
	statusRefused <-chan struct{}
	// answersItself and sendsSize are what is known of the client from its request: see firstsize.go.
	// kubectl sends the size of its terminal in any case.
	answersItself, sendsSize bool
	// holdback says how long the status is to wait for the client to read; nil where it need not.
	holdback *holdback
	// farewell tells the client that the session is over, after everything was sent, and returns
	// when the client has closed the connection or the context is done.
	farewell func(context.Context)
}

// refusesStatus tells whether the client has reset the error stream: it does not want to know how the
// command ends, and so has gone, whatever becomes of its connection. Proxies keep theirs for a while.
func (c *remoteCommandClient) refusesStatus() bool {
	stream, ok := c.failure.(*spdy.Stream)
	var reset *spdy.ResetError
	return ok && errors.As(stream.Err(), &reset) && reset.Remote
}

// Transferred implements session.Connection.
func (c *remoteCommandClient) Transferred() (received, sent int64) {
	select {
	case <-c.ready:
		return transferred(c.stdin, c.stdout, c.stderr, c.resize)
	default:
		return 0, 0
	}
}

// transferred is the payload that streams have moved; some may be nil.
func transferred(streams ...workload.Stream) (received, sent int64) {
	for _, s := range streams {
		if s != nil {
			received += s.Received()
			sent += s.Sent()
		}
	}
	return received, sent
}

// Waits within one session that are not configuration.
const (
	reapTimeout      = 5 * time.Second        // for a killed process to be gone
	endReasonTimeout = 5 * time.Second        // to learn why a container ended
	containerEndWait = 200 * time.Millisecond // between a process killed with its container and the beginning of the container's end
	exitCodeKilled   = 128 + 9
)

// remoteCommandSession is one exec or attach session while it runs.
type remoteCommandSession struct {
	config  Config
	session *session.Session
	client  *remoteCommandClient
	remoteCommand

	process  Process
	input    *input        // nil where the client sends none
	served   chan struct{} // closed when nothing more will come from the client
	terminal terminal
	outputs  sync.WaitGroup // the copiers of stdout and stderr
	others   sync.WaitGroup // connection reader, stdin, resize, warnings
	drain    drain

	bandwidth *bandwidth
	withheld  atomic.Bool // output that could not be recorded and so was not sent; the session is stopped
}

// run serves the session from the upgraded connection to its end. When it returns, the connection
// is closed and every goroutine of the session has ended.
func (s *remoteCommandSession) run() session.Outcome {
	ctx := s.session.Context()
	// Not the session's context: a session that is told to end still has a status to deliver.
	s.served = make(chan struct{})
	s.others.Go(func() {
		defer close(s.served)
		s.client.Serve(context.WithoutCancel(ctx)) //nolint:errcheck // seen through Done and Err
	})
	defer s.others.Wait()
	defer s.client.Close() //nolint:errcheck // the session is over
	defer func() {
		if s.input != nil {
			s.input.close()
		}
	}()

	if outcome, ok := s.waitForStreams(ctx); !ok {
		return outcome
	}
	command := s.command
	command.Size = s.firstSize(ctx)
	process, err := s.start(ctx, command, s.buffers)
	if err != nil {
		return s.startFailed(ctx, err)
	}
	s.process = process
	s.session.SetHelper(process.StandIn())
	s.session.SetPhase(session.Running)
	s.beginOperating(process)
	s.terminal.attach(s.announcingSizes(process))
	s.copyStreams()
	return s.wait(ctx)
}

// waitForStreams returns false, and how the session ended, if the client did not open its streams.
func (s *remoteCommandSession) waitForStreams(ctx context.Context) (session.Outcome, bool) {
	timeout := time.NewTimer(s.config.streamCreation)
	defer timeout.Stop()
	select {
	case <-s.client.ready:
		return session.Outcome{}, true
	case <-s.client.Done():
		// It may have said all it has to say, in one breath.
		if isClosed(s.client.ready) && s.hasInputToFinish() {
			return session.Outcome{}, true
		}
		return clientGone(s.client.Err()), false
	case <-ctx.Done():
		outcome := stopped(ctx)
		s.sayNotStarted(endedStatus(outcome.Err.Error()))
		return outcome, false
	case <-timeout.C:
		err := fmt.Errorf("the client did not open all streams of the command within %v", s.config.streamCreation)
		s.sayNotStarted(internalErrorStatus(err.Error()))
		return session.Outcome{Reason: "no-streams", ExitCode: -1, Err: err}, false
	}
}

// sayNotStarted gives a client whose streams are not all there a status, if it has opened the stream
// for it: an error stream that ends empty counts as success (kubectl#1208).
func (s *remoteCommandSession) sayNotStarted(result *status) {
	select {
	case failure := <-s.client.failureOpened:
		failure.Write(result.encode(s.client.protocol)) //nolint:errcheck // best effort
		failure.CloseWrite()                            //nolint:errcheck // as above
		ctx, cancel := context.WithTimeout(context.Background(), shutdownGrace)
		defer cancel()
		s.client.farewell(ctx)
	default:
	}
}

// startFailed tells the client why the command did not start: a command that is not there is the
// user's mistake and gets a line on stderr and an exit code as a shell would give it, anything else
// is an internal error (kubernetes#40820).
func (s *remoteCommandSession) startFailed(ctx context.Context, err error) session.Outcome {
	outcome := session.Outcome{Reason: "start-failed", ExitCode: -1, Err: err}
	if ctx.Err() != nil {
		outcome = stopped(ctx)
		s.sayEnd(ctx, endedStatus(outcome.Err.Error()))
		return outcome
	}
	var refused *session.RefusedError
	if errors.As(err, &refused) {
		outcome.Reason = "refused"
		s.sayEnd(ctx, refusedStatus(refused))
		return outcome
	}
	var exit interface{ ExitCode() int }
	if !errors.As(err, &exit) {
		s.sayEnd(ctx, internalErrorStatus("error executing command in container: "+err.Error()))
		return outcome
	}
	outcome.ExitCode, outcome.Err = exit.ExitCode(), nil // its text names the command, which is not for the log
	line, to := err.Error()+"\n", s.client.stderr
	if s.command.TTY {
		line, to = err.Error()+"\r\n", s.client.stdout
	}
	if to != nil {
		io.WriteString(to, line) //nolint:errcheck // a client that has gone is noticed in sayEnd
	}
	s.sayEnd(ctx, exitStatus(outcome.ExitCode, err.Error()))
	return outcome
}

func (s *remoteCommandSession) copyStreams() {
	if stdin := s.process.Stdin(); stdin != nil && s.client.stdin != nil {
		s.input = copyInput(&s.others, stdin, s.operatedInput(s.client.stdin))
	}
	s.drain.idle, s.drain.observe, s.drain.unwanted = s.config.DrainIdle, s.config.Observe, s.outputUnwanted
	for _, o := range []struct {
		to   workload.Stream
		from io.ReadCloser
		fin  bool // at its own end, not at the session's: sayLine may have something to add
	}{
		{s.operatedOutput(session.Stdout, s.client.stdout), s.process.Stdout(), !s.command.TTY},
		{s.operatedOutput(session.Stderr, s.client.stderr), s.process.Stderr(), false},
	} {
		if o.to == nil || o.from == nil {
			continue
		}
		s.drain.sources = append(s.drain.sources, o.from)
		s.outputs.Go(func() {
			s.drain.copyOutput(o.to, o.from)
			if o.fin {
				o.to.CloseWrite() //nolint:errcheck // a client that has gone is noticed elsewhere
			}
		})
	}
}

// wait sees the process and its client to their end. All that can end a session is in one place.
func (s *remoteCommandSession) wait(ctx context.Context) session.Outcome {
	refused := s.client.statusRefused
	limits := newTimeouts(s.config, s.session)
	defer limits.stop()
	for {
		select {
		case <-s.process.Exited():
			return s.exited(ctx)
		case <-s.process.ContainerExited():
			// Without a pid namespace of its own the process outlives its container (kubernetes#89233).
			s.process.Kill()
			if !waitFor(s.process.Exited(), reapTimeout) {
				return s.stop(ctx, session.Outcome{Reason: "container-exited", ExitCode: -1,
					Err: errors.New(s.containerEnd(ctx))})
			}
			return s.exited(ctx)
		case <-s.client.Done():
			s.finishInput(ctx)
			return s.disconnected()
		case <-refused:
			if s.client.refusesStatus() {
				return s.disconnected()
			}
			refused = nil
		case <-ctx.Done():
			return s.stop(ctx, stopped(ctx))
		case <-limits.C():
			if warning := limits.check(); warning != "" && s.client.stdout != nil {
				s.others.Go(func() { io.WriteString(s.client.stdout, warning) }) //nolint:errcheck // best effort
			}
		}
	}
}

// exited ends a session whose process has been reaped: all output, then the status, then the client
// closes.
func (s *remoteCommandSession) exited(ctx context.Context) session.Outcome {
	s.session.SetPhase(session.Lingering)
	stopWatching := context.AfterFunc(ctx, func() { // shutdown does not wait for slow readers
		time.AfterFunc(shutdownGrace, func() { s.client.Close() }) //nolint:errcheck // see run
	})
	defer stopWatching()
	s.stopInput()
	s.drain.begin(s.config.DrainMax)

	outcome := session.Outcome{Reason: "exited", ExitCode: s.process.ExitCode()}
	result := exitStatus(outcome.ExitCode, "")
	if upstream, ok := s.process.(*relay); ok {
		result = upstream.result
	} else if outcome.ExitCode == exitCodeKilled && s.containerEnds() {
		// Asked now, while the output is still on its way: later the container may be removed.
		outcome.Reason = "container-exited"
		outcome.Err = errors.New(s.containerEnd(ctx))
		result = exitStatus(outcome.ExitCode, outcome.Err.Error())
	}
	s.awaitOutput()
	if s.withheld.Load() { // also behind a command that has ended well
		code := outcome.ExitCode
		outcome = stopped(ctx)
		outcome.ExitCode, result = code, endedStatus(outcome.Err.Error())
	}
	s.process.Close() //nolint:errcheck // nothing is left in it that anybody wants
	if outcome.Err != nil {
		s.sayLine("[streamshim: " + outcome.Err.Error() + "]")
	}
	s.holdStatus(ctx)
	s.sayEnd(ctx, result)
	return outcome
}

// awaitOutput waits for the output's end, or for that of the client: output that a background child holds,
// or an upstream that does not end it, may be waited for without limit.
func (s *remoteCommandSession) awaitOutput() {
	ended := make(chan struct{})
	s.others.Go(func() {
		select {
		case <-s.client.Done():
			s.process.Close() //nolint:errcheck // wakes the copiers
		case <-ended:
		}
	})
	s.outputs.Wait()
	close(ended)
}

// sayLine writes a line for the user's eyes: clients that find an exit code in the status show
// nothing else of it. Stdout is left alone, unless it is a terminal.
func (s *remoteCommandSession) sayLine(line string) {
	if s.command.TTY && s.client.stdout != nil {
		io.WriteString(s.client.stdout, "\r\n"+line+"\r\n") //nolint:errcheck // a client that has gone is noticed in sayEnd
	} else if s.client.stderr != nil {
		io.WriteString(s.client.stderr, line+"\n") //nolint:errcheck // as above
	}
}

// containerEnds says whether a process that was killed was killed with its container. It may be seen to
// end a moment before the container's main process begins to, where both get the same signal. That one is
// the last to be gone, on a busy machine a good while later.
func (s *remoteCommandSession) containerEnds() bool {
	for deadline := time.Now().Add(reapTimeout); ; {
		if waitFor(s.process.ContainerExited(), containerEndWait) {
			return true
		}
		if !s.process.ContainerEnding() || time.Now().After(deadline) {
			return false
		}
	}
}

// containerEnd says why the container is gone.
func (s *remoteCommandSession) containerEnd(ctx context.Context) string {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), endReasonTimeout)
	defer cancel()
	if reason := s.endReason(ctx); reason != "" {
		return reason
	}
	return "the container's main process has ended"
}

// disconnected ends a session whose client has gone: its process follows (kubernetes#89031), unless it has
// ended by itself.
func (s *remoteCommandSession) disconnected() session.Outcome {
	outcome := clientGone(s.client.Err())
	if !isClosed(s.process.Exited()) {
		defer s.holdInput()()
		s.process.Disconnect()
	}
	s.client.Close() //nolint:errcheck // wakes the copiers
	s.stopInput()
	if s.processFollows() {
		outcome.ExitCode = s.process.ExitCode()
	}
	s.process.Close() //nolint:errcheck // nobody is left to tell
	s.outputs.Wait()
	return outcome
}

// holdInput keeps the end of input from a process that is about to be hung up and has not been given all of
// it, until release: it may live for a while, and input that was cut must not look whole.
func (s *remoteCommandSession) holdInput() (release func()) {
	release = func() {}
	if s.input == nil || isClosed(s.input.ended) && !s.input.cut {
		return release
	}
	if stdin, ok := s.input.stdin.(*os.File); ok {
		socket.Control(stdin, func(fd int) {
			if held, err := unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 0); err == nil { //nolint:gosec // a descriptor
				release = func() { unix.Close(held) } //nolint:errcheck // a pipe's end
			}
		})
	}
	return release
}

// outputUnwanted tells what to do with output that the client does not take any more: true is to throw it
// away. A command that is still to take its client's input must not end because of its output.
func (s *remoteCommandSession) outputUnwanted(err error) bool {
	var reset *spdy.ResetError
	return !errors.As(err, &reset) && s.hasInputToFinish()
}

// stop ends a session from outside: the client gets a status at once, the process is treated as if
// the client had gone.
func (s *remoteCommandSession) stop(ctx context.Context, outcome session.Outcome) session.Outcome {
	stopWatching := time.AfterFunc(shutdownGrace, func() { s.client.Close() }) //nolint:errcheck // see run
	defer stopWatching.Stop()
	defer s.holdInput()()
	s.process.Disconnect()
	s.stopInput()
	s.drain.begin(0)
	s.outputs.Wait()
	s.sayEnd(ctx, endedStatus(outcome.Err.Error()))
	if s.processFollows() {
		outcome.ExitCode = s.process.ExitCode()
	}
	s.process.Close() //nolint:errcheck // the session is over
	return outcome
}

// stopInput throws away what the client still sends.
func (s *remoteCommandSession) stopInput() {
	if s.input != nil {
		s.input.stop()
	} else if s.client.stdin != nil {
		s.client.stdin.CloseRead()
	}
}

// sayEnd ends the streams in the order the protocol wants and lets the client close the connection.
func (s *remoteCommandSession) sayEnd(ctx context.Context, result *status) {
	s.session.SetPhase(session.Lingering)
	for _, stream := range []workload.Stream{s.client.stdout, s.client.stderr} {
		if stream != nil {
			stream.CloseWrite() //nolint:errcheck // a client that has gone is noticed in farewell
		}
	}
	if message := result.encode(s.client.protocol); len(message) > 0 {
		s.client.failure.Write(message) //nolint:errcheck // as above
	}
	s.client.failure.CloseWrite() //nolint:errcheck // as above
	patience, cancel := withGrace(ctx)
	defer cancel()
	s.client.farewell(patience)
}

// withGrace is a context that outlasts ctx by shutdownGrace: a session that is told to end, before
// or while its client takes the rest, still gets it to a client who reads.
func withGrace(ctx context.Context) (context.Context, context.CancelFunc) {
	patience, cancel := context.WithCancel(context.WithoutCancel(ctx))
	stop := context.AfterFunc(ctx, func() { time.AfterFunc(shutdownGrace, cancel) })
	return patience, func() {
		stop()
		cancel()
	}
}

// drain decides when the output of a process that has exited is complete. Usually that is the end
// of the pipe; but a background child may hold the pipe open for ever, and then it is complete when
// the pipe has been silent for a while (kubernetes#44371, containerd#7802).
type drain struct {
	idle    time.Duration
	observe func(Event)
	// unwanted is asked when the client takes no more: true means that the rest is read and thrown away.
	unwanted func(err error) bool
	sources  []io.ReadCloser
	until    atomic.Int64 // Unix nanoseconds; 0 while the process runs
	stopped  atomic.Bool  // the session was told to end, and its output with it
}

// deadliner is a pipe or a pty of ours, whose reads can be given a limit.
type deadliner interface{ SetReadDeadline(time.Time) error }

// begin starts the wait; it lasts no longer than limit.
func (d *drain) begin(limit time.Duration) {
	d.stopped.Store(limit == 0)
	d.until.Store(time.Now().Add(limit).UnixNano())
	for _, source := range d.sources {
		if s, ok := source.(deadliner); ok && (d.idle > 0 || limit == 0) {
			s.SetReadDeadline(time.Unix(1, 0)) //nolint:errcheck // a source that is closed has ended already
		}
	}
}

// drainLooks is how many times a source is looked at within one idle period. The silence that ends
// the wait is at most so much longer than asked for.
const drainLooks = 4

// copyOutput sends a source to the client until it ends, is complete, or cannot be sent.
func (d *drain) copyOutput(to workload.Stream, from io.ReadCloser) {
	silent := -1 // looks that have found nothing; the first one was not a whole one
	for {
		n, err := to.ReadFrom(from)
		if err != nil && !errors.Is(err, os.ErrDeadlineExceeded) {
			if d.unwanted(err) {
				io.Copy(io.Discard, from) //nolint:errcheck // until the process or the session ends
			}
			from.Close() //nolint:errcheck // the process sees EPIPE, as in a shell's pipe
			return
		}
		if n > 0 && silent >= 0 {
			silent = 0
		} else {
			silent++
		}
		if err == nil {
			break
		}
		if silent == drainLooks {
			d.cut()
			break
		}
		if time.Now().UnixNano() >= d.until.Load() {
			d.cut()
			copyPending(to, from)
			break
		}
		from.(deadliner).SetReadDeadline(time.Now().Add(d.idle / drainLooks)) //nolint:errcheck // as in begin
	}
}

// cut notes that somebody still held an output when it was taken to be complete.
func (d *drain) cut() {
	if !d.stopped.Load() {
		d.observe(DrainCut)
	}
}

// copyPending sends what lies in a source now: the command wrote it before its time was over,
// however slowly the client takes it.
func copyPending(to workload.Stream, from io.ReadCloser) {
	source, ok := from.(interface {
		syscall.Conn
		deadliner
	})
	if !ok {
		return
	}
	if pending := pending(source); pending > 0 && source.SetReadDeadline(time.Time{}) == nil {
		to.ReadFrom(io.LimitReader(from, int64(pending))) //nolint:errcheck // a client that has gone is noticed elsewhere
	}
}

// terminal carries the client's terminal sizes to the process, also those that came before it.
type terminal struct {
	known chan struct{} // closed with the first size

	mu      sync.Mutex
	process Process
	size    workload.Size
	started bool // known has been closed
}

// follow applies the sizes of the resize stream until it ends.
func (t *terminal) follow(resize workload.Stream) {
	resize.WriteTo(&sizeWriter{terminal: t}) //nolint:errcheck // sizes that cannot be read end the resizing, not the session
	resize.CloseRead()
}

type sizeWriter struct {
	terminal *terminal
	sizes    terminalSizes
}

func (w *sizeWriter) Write(b []byte) (int, error) {
	sizes, err := w.sizes.feed(b)
	for _, size := range sizes {
		w.terminal.resize(size)
	}
	if err != nil {
		return 0, err
	}
	return len(b), nil
}

func (t *terminal) resize(size workload.Size) {
	if !size.Known() {
		return // a client that does not know its size says 0x0
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	t.size = size
	if !t.started {
		t.started = true
		close(t.known)
	}
	if t.process != nil {
		t.process.Resize(t.size) //nolint:errcheck // a process that has ended has no terminal
	}
}

func (t *terminal) lastSize() workload.Size {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.size
}

// attach gives the terminal its process. A size that came in while the process started is applied.
func (t *terminal) attach(p Process) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.process = p
	if t.started {
		p.Resize(t.size) //nolint:errcheck // as in resize
	}
}

func clientGone(err error) session.Outcome {
	if errors.Is(err, io.EOF) {
		err = nil
	}
	return session.Outcome{Reason: "client-gone", ExitCode: -1, Err: err}
}

// stopped is the outcome of a session whose context has ended.
func stopped(ctx context.Context) session.Outcome {
	var end *session.EndError
	if errors.As(context.Cause(ctx), &end) {
		return session.Outcome{Reason: end.Reason, ExitCode: -1, Err: end}
	}
	return session.Outcome{Reason: "stopped", ExitCode: -1, Err: context.Cause(ctx)}
}

// processFollows waits for the process of a client that has gone, unless processes live on without their
// clients, and reports whether it has ended.
func (s *remoteCommandSession) processFollows() bool {
	limit := s.config.processEnd
	if s.config.KeepProcesses {
		limit = 0
	}
	return waitFor(s.process.Exited(), limit)
}

// waitFor reports whether the channel was closed within the limit.
func waitFor(done <-chan struct{}, limit time.Duration) bool {
	select {
	case <-done:
		return true
	default:
	}
	timer := time.NewTimer(limit)
	defer timer.Stop()
	select {
	case <-done:
		return true
	case <-timer.C:
		return false
	}
}
