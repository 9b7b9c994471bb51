package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"strconv"
	"strings"
	"time"

	"github.com/gorilla/websocket"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/streamshim/streamshim/test/internal/wire"
)

// sessionLimit is longer than any healthy session may take beyond its own time.
const sessionLimit = 60 * time.Second

// client is who makes one session.
type client struct {
	s    *soakRun
	r    *rand.Rand
	pod  *pod
	kind string
	// idle is the context of idle times.
	idle context.Context
	// upstream says that the session needs more than streamshim.
	upstream bool
	// warming is before the soak: nothing is slow, and what -inject does is left out.
	warming bool
}

// sessionKind is one thing that a client does.
type sessionKind struct {
	name   string
	weight int
	run    func(context.Context, *client) error
}

// kinds are those with a client that lives as long as its session. Their output must be right. Most are idle for a
// while, as most sessions are.
var kinds = []sessionKind{
	{"idle", 30, idle},
	{"idle-terminal", 15, idleTerminal},
	{"download", 8, download},
	{"slow-download", 4, slowDownload},
	{"upload", 6, upload},
	{"websocket-download", 6, webSocketDownload},
	{"websocket-upload", 4, webSocketUpload},
	{"exit-code", 4, exitCode},
	{"background", 3, background},
	{"execsync", 4, execSync},
	{"attach", 4, attach},
	{"forward", 6, forward},
}

// runtime is the client of streamshim's CRI.
func (c *client) runtime() runtimeapi.RuntimeServiceClient { return c.s.node.Runtime() }

// start begins an exec over SPDY.
func (c *client) start(ctx context.Context, command wire.Command) (*wire.Exec, error) {
	ctx, cancel := context.WithTimeout(ctx, callLimit)
	defer cancel()
	session, err := wire.StartExec(ctx, c.runtime(), c.pod.shell, command)
	if err != nil {
		return nil, fmt.Errorf("start: %w", err)
	}
	return session, nil
}

// finish reads to the end and checks output and exit code.
func finish(session *wire.Exec, stdout, stderr *checker, exitCode int) error {
	defer session.Close() //nolint:errcheck // everything has come
	errs := io.Discard
	if stderr != nil {
		errs = stderr
	}
	status, err := session.Copy(stdout, errs)
	if err != nil {
		return err
	}
	return judge(status, stdout, stderr, exitCode)
}

// judge checks that a session whose status says that the command has ended brought all of its output.
func judge(status metav1.Status, stdout, stderr *checker, exitCode int) error {
	code, ok := exitCodeOf(status)
	if !ok || code == killedCode && exitCode != killedCode {
		return fmt.Errorf("status %s: %s", status.Status, status.Message)
	}
	if code != exitCode {
		return wrongError{fmt.Sprintf("exit code %d, not %d: %s", code, exitCode, status.Message)}
	}
	if err := stdout.whole(); err != nil || stderr == nil {
		return err
	}
	return stderr.whole()
}

// killedCode is 128+SIGKILL, that of a command whose container was killed.
const killedCode = 137

// exitCodeOf is the command's own exit code, if it says one.
func exitCodeOf(status metav1.Status) (int, bool) {
	if status.Status == metav1.StatusSuccess {
		return 0, true
	}
	if status.Reason != "NonZeroExitCode" || status.Details == nil {
		return 0, false
	}
	for _, cause := range status.Details.Causes {
		if cause.Type == "ExitCode" {
			code, err := strconv.Atoi(cause.Message)
			return code, err == nil
		}
	}
	return 0, false
}

// amount is how many numbers an output has.
func (c *client) amount() int { return []int{1, 100, 2000, 20000, 100000}[c.r.IntN(5)] }

func (c *client) checker(what string, n int) *checker {
	k := &checker{what: what, want: sequence(n)}
	if c.s.injects(injectCut) && !c.warming && c.r.IntN(2) == 0 {
		k.drop = 1
	}
	return k
}

func download(ctx context.Context, c *client) error {
	n, m, code := c.amount(), c.r.IntN(200), c.r.IntN(2)*7
	session, err := c.start(ctx, wire.Command{
		Args: []string{"sh", "-c", fmt.Sprintf("seq 1 %d; seq 1 %d >&2; exit %d", n, m, code)}, Stderr: true,
	})
	if err != nil {
		return err
	}
	return finish(session, c.checker("stdout", n), &checker{what: "stderr", want: sequence(m)}, code)
}

func slowDownload(ctx context.Context, c *client) error {
	const n = 300000 // 2 MB
	session, err := c.start(ctx, wire.Command{Args: []string{"seq", "1", strconv.Itoa(n)}, Stderr: true})
	if err != nil {
		return err
	}
	k := c.checker("stdout", n)
	if !c.warming {
		k.pace = time.Duration(c.r.Int64N(int64(100 * time.Millisecond)))
	}
	return finish(session, k, nil, 0)
}

func upload(ctx context.Context, c *client) error {
	n := c.amount()
	session, err := c.start(ctx, wire.Command{Args: []string{"cat"}, Stdin: true, Stderr: true})
	if err != nil {
		return err
	}
	sent := make(chan error, 1)
	go func() { sent <- send(session, sequence(n)) }()
	err = finish(session, c.checker("stdout", n), nil, 0)
	return errors.Join(err, <-sent)
}

// send sends all of the text and FIN on stdin.
func send(session *wire.Exec, text []byte) error {
	for len(text) > 0 {
		n := min(len(text), wire.FrameSize)
		if err := session.WriteFrames(wire.AppendData(nil, session.Stdin, false, text[:n])); err != nil {
			return err
		}
		text = text[n:]
	}
	return session.WriteFrames(wire.AppendData(nil, session.Stdin, true, nil))
}

func exitCode(ctx context.Context, c *client) error {
	code := c.r.IntN(126)
	session, err := c.start(ctx, wire.Command{Args: []string{"sh", "-c", fmt.Sprintf("exit %d", code)}, Stderr: true})
	if err != nil {
		return err
	}
	return finish(session, &checker{what: "stdout"}, nil, code)
}

// background leaves a child that holds the output. The session ends without it.
func background(ctx context.Context, c *client) error {
	session, err := c.start(ctx, wire.Command{Args: []string{"sh", "-c", "sleep 15 & seq 1 1000"}, Stderr: true})
	if err != nil {
		return err
	}
	return finish(session, c.checker("stdout", 1000), nil, 0)
}

// idleTime is how long an idle session lives.
func (c *client) idleTime() time.Duration { return between(c.r, 10*time.Second, 90*time.Second) }

// idle is a shell with a child that is told to end after a while, or at the end of the soak.
func idle(ctx context.Context, c *client) error {
	session, err := c.start(ctx, wire.Command{
		Args: []string{"sh", "-c", "sleep 100000 & read line; kill $!; echo $line; exit 3"}, Stdin: true, Stderr: true,
	})
	if err != nil {
		return err
	}
	if c.s.injects(injectLeak) && !c.warming && c.r.IntN(3) == 0 {
		c.s.mu.Lock()
		defer c.s.mu.Unlock()
		c.s.forgotten = append(c.s.forgotten, session) // or the garbage collector would close it
		return nil
	}
	if err := c.linger(session); err != nil {
		return errors.Join(err, session.Close())
	}
	word := strconv.FormatUint(c.r.Uint64(), 36)
	if err := session.WriteFrames(wire.AppendData(nil, session.Stdin, false, []byte(word+"\n"))); err != nil {
		return errors.Join(err, session.Close())
	}
	return finish(session, &checker{what: "echo", want: []byte(word + "\n")}, nil, 3)
}

// linger waits for the session's time to be over. A session that ends meanwhile is found by what comes next.
func (c *client) linger(session *wire.Exec) error {
	d := c.idleTime()
	if err := session.SetDeadline(time.Now().Add(d + sessionLimit)); err != nil {
		return err
	}
	pause(c.idle, d)
	return nil
}

// idleTerminal types a line into a terminal before and after its idle time.
func idleTerminal(ctx context.Context, c *client) error {
	session, err := c.start(ctx, wire.Command{Args: []string{"sh"}, Stdin: true, TTY: true})
	if err != nil {
		return err
	}
	defer session.Close() //nolint:errcheck // everything has come, or has failed
	for i := range 2 {
		a, b := c.r.IntN(1000), c.r.IntN(1000)
		line := fmt.Sprintf("echo $((%d * %d))\n", a, b)
		if err := session.WriteFrames(wire.AppendData(nil, session.Stdin, false, []byte(line))); err != nil {
			return err
		}
		if err := session.Expect(session.Stdout, strconv.Itoa(a*b)+"\r\n"); err != nil {
			return withStatus(session, err)
		}
		if i == 0 {
			if err := c.linger(session); err != nil {
				return err
			}
		}
	}
	if err := session.WriteFrames(wire.AppendData(nil, session.Stdin, false, []byte("exit 9\n"))); err != nil {
		return err
	}
	status, err := session.Copy(io.Discard, io.Discard)
	if err != nil {
		return err
	}
	return judge(status, &checker{}, nil, 9)
}

// webSocketSession speaks v5.channel.k8s.io.
func (c *client) webSocket(ctx context.Context, request *runtimeapi.ExecRequest) (*websocket.Conn, error) {
	ctx, cancel := context.WithTimeout(ctx, callLimit)
	defer cancel()
	response, err := c.runtime().Exec(ctx, request)
	if err != nil {
		return nil, fmt.Errorf("start: %w", err)
	}
	dialer := websocket.Dialer{Subprotocols: []string{"v5.channel.k8s.io"}, ReadBufferSize: 64 << 10}
	conn, answer, err := dialer.DialContext(ctx, "ws"+strings.TrimPrefix(response.Url, "http"), nil)
	if err != nil {
		if answer != nil {
			reason, _ := io.ReadAll(answer.Body) //nolint:errcheck // as much as there is; it has been read already
			err = fmt.Errorf("%w: %s: %s", err, answer.Status, reason)
		}
		return nil, fmt.Errorf("upgrade: %w", err)
	}
	_ = answer.Body.Close() //nolint:errcheck // an upgraded one has no body
	return conn, conn.NetConn().SetDeadline(time.Now().Add(sessionLimit))
}

// The channels of v5.channel.k8s.io.
const (
	channelStdin  = 0
	channelStdout = 1
	channelStatus = 3
	channelClose  = 255
)

// finishWebSocket reads to the end and checks.
func finishWebSocket(conn *websocket.Conn, stdout *checker, exitCode int) error {
	defer conn.Close() //nolint:errcheck // everything has come
	var status metav1.Status
	for {
		_, message, err := conn.ReadMessage()
		if websocket.IsCloseError(err, websocket.CloseNormalClosure) {
			break
		}
		if err != nil {
			return err
		}
		if len(message) < 2 {
			continue
		}
		switch message[0] {
		case channelStdout:
			if _, err := stdout.Write(message[1:]); err != nil {
				return err
			}
		case channelStatus:
			if err := json.Unmarshal(message[1:], &status); err != nil {
				return fmt.Errorf("status %q: %w", message[1:], err)
			}
		}
	}
	return judge(status, stdout, nil, exitCode)
}

func webSocketDownload(ctx context.Context, c *client) error {
	n := c.amount()
	conn, err := c.webSocket(ctx, &runtimeapi.ExecRequest{
		ContainerId: c.pod.shell, Cmd: []string{"sh", "-c", fmt.Sprintf("seq 1 %d; exit 5", n)}, Stdout: true, Stderr: true,
	})
	if err != nil {
		return err
	}
	return finishWebSocket(conn, c.checker("stdout", n), 5)
}

func webSocketUpload(ctx context.Context, c *client) error {
	n := c.amount()
	conn, err := c.webSocket(ctx, &runtimeapi.ExecRequest{
		ContainerId: c.pod.shell, Cmd: []string{"cat"}, Stdin: true, Stdout: true, Stderr: true,
	})
	if err != nil {
		return err
	}
	sent := make(chan error, 1)
	go func() {
		sent <- func() error {
			for text := sequence(n); len(text) > 0; {
				size := min(len(text), wire.FrameSize)
				if err := conn.WriteMessage(websocket.BinaryMessage, append([]byte{channelStdin}, text[:size]...)); err != nil {
					return err
				}
				text = text[size:]
			}
			return conn.WriteMessage(websocket.BinaryMessage, []byte{channelClose, channelStdin})
		}()
	}()
	err = finishWebSocket(conn, c.checker("stdout", n), 0)
	return errors.Join(err, <-sent)
}

func execSync(ctx context.Context, c *client) error {
	n, code := c.r.IntN(20000), c.r.IntN(3)
	ctx, cancel := context.WithTimeout(ctx, callLimit)
	defer cancel()
	response, err := c.runtime().ExecSync(ctx, &runtimeapi.ExecSyncRequest{
		ContainerId: c.pod.shell, Cmd: []string{"sh", "-c", fmt.Sprintf("seq 1 %d; exit %d", n, code)}, Timeout: 30,
	})
	if err != nil {
		return err
	}
	if response.ExitCode == killedCode {
		return errors.New("killed")
	}
	k := c.checker("stdout", n)
	if _, err := k.Write(response.Stdout); err != nil {
		return err
	}
	if int(response.ExitCode) != code {
		return wrongError{fmt.Sprintf("exit code %d, not %d", response.ExitCode, code)}
	}
	return k.whole()
}

// attach writes a line to the main process of a container, which answers it, and leaves.
func attach(ctx context.Context, c *client) error {
	c.upstream = true
	bounded, cancel := context.WithTimeout(ctx, callLimit)
	defer cancel()
	response, err := c.runtime().Attach(bounded, &runtimeapi.AttachRequest{ContainerId: c.pod.lab, Stdin: true, Stdout: true, Stderr: true})
	if err != nil {
		return fmt.Errorf("start: %w", err)
	}
	session, err := wire.Open(response.Url, wire.Command{Stdin: true, Stderr: true})
	if err != nil {
		return err
	}
	defer session.Close() //nolint:errcheck // that is how one leaves
	word := strconv.FormatUint(c.r.Uint64(), 36)
	if err := session.WriteFrames(wire.AppendData(nil, session.Stdin, false, []byte(word+"\n"))); err != nil {
		return err
	}
	if err := session.Expect(session.Stdout, "you said: "+word+"\n"); err != nil {
		return withStatus(session, err)
	}
	return nil
}

// withStatus adds the status that comes after an output that ended too early, if one does.
func withStatus(session *wire.Exec, err error) error {
	_ = session.SetReadDeadline(time.Now().Add(10 * time.Second)) //nolint:errcheck // then nothing comes
	var text []byte
	for {
		e, nextErr := session.Next()
		if nextErr != nil {
			break
		}
		if e.Stream == session.Failure {
			if text = append(text, e.Data...); e.Fin {
				break
			}
		}
	}
	return fmt.Errorf("%w; status %q", err, text)
}

const resetAtOnce = "a forwarded connection was reset before anything came"

// forward makes some connections through one port-forward, one after the other.
func forward(ctx context.Context, c *client) error {
	bounded, cancel := context.WithTimeout(ctx, callLimit)
	defer cancel()
	response, err := c.runtime().PortForward(bounded, &runtimeapi.PortForwardRequest{PodSandboxId: c.pod.sandbox, Port: []int32{int32(c.pod.port)}})
	if err != nil {
		return fmt.Errorf("start: %w", err)
	}
	conn, err := wire.Upgrade(response.Url, "portforward.k8s.io")
	if err != nil {
		return err
	}
	defer conn.Close() //nolint:errcheck // everything has come, or has failed
	if err := conn.SetDeadline(time.Now().Add(sessionLimit)); err != nil {
		return err
	}
	port := strconv.Itoa(int(c.pod.port))
	for i := range 1 + c.r.IntN(4) {
		n, id := c.amount(), strconv.Itoa(i)
		var frames []byte
		frames, failure := conn.AppendStream(frames, "streamtype", "error", "port", port, "requestid", id)
		frames = wire.AppendData(frames, failure, true, nil)
		frames, data := conn.AppendStream(frames, "streamtype", "data", "port", port, "requestid", id)
		frames = wire.AppendData(frames, data, true, []byte(strconv.Itoa(n)+"\n"))
		if err := conn.WriteFrames(frames); err != nil {
			return err
		}
		k := c.checker("forwarded", n)
		for open := 2; open > 0; {
			e, err := conn.Next()
			if err != nil {
				return err
			}
			switch {
			case e.Reset:
				if k.got == 0 {
					return errors.New(resetAtOnce)
				}
				return fmt.Errorf("a forwarded connection was reset after %d bytes of %d", k.got, len(k.want))
			case e.Stream == failure && len(e.Data) > 0:
				return fmt.Errorf("port-forward: %s", bytes.TrimSpace(e.Data))
			case e.Stream == data:
				if _, err := k.Write(e.Data); err != nil {
					return err
				}
			}
			if e.Fin {
				open--
			}
		}
		if err := k.whole(); err != nil {
			return err
		}
	}
	return nil
}
