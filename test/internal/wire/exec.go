package wire

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// SessionTimeout bounds one session on a busy machine. It ends a run that hangs.
const SessionTimeout = 3 * time.Minute

// Command is an exec that the client asks for.
type Command struct {
	Args               []string
	Stdin, Stderr, TTY bool
}

// Exec is an exec in progress.
type Exec struct {
	*Conn
	Failure, Stdin, Stdout, Stderr, Resize uint32 // the ids of the streams; 0 if there is none
}

// StartExec asks for an exec, upgrades, and opens the streams. It does not wait for the command.
func StartExec(ctx context.Context, client runtimeapi.RuntimeServiceClient, container string, c Command) (*Exec, error) {
	response, err := client.Exec(ctx, &runtimeapi.ExecRequest{
		ContainerId: container, Cmd: c.Args, Stdin: c.Stdin, Stdout: true, Stderr: c.Stderr && !c.TTY, Tty: c.TTY,
	})
	if err != nil {
		return nil, err
	}
	return Open(response.Url, c)
}

// Open upgrades the URL of an exec or attach and opens the streams. It ignores the arguments of the command.
func Open(address string, c Command) (*Exec, error) {
	conn, err := Upgrade(address, "v4.channel.k8s.io")
	if err != nil {
		return nil, err
	}
	if err := conn.SetDeadline(time.Now().Add(SessionTimeout)); err != nil {
		return nil, err
	}
	s := &Exec{Conn: conn}
	var frames []byte
	frames, s.Failure = conn.AppendStream(frames, "streamtype", "error")
	if c.Stdin {
		frames, s.Stdin = conn.AppendStream(frames, "streamtype", "stdin")
	}
	frames, s.Stdout = conn.AppendStream(frames, "streamtype", "stdout")
	if c.Stderr && !c.TTY {
		frames, s.Stderr = conn.AppendStream(frames, "streamtype", "stderr")
	}
	if c.TTY {
		frames, s.Resize = conn.AppendStream(frames, "streamtype", "resize")
		frames = AppendData(frames, s.Resize, false, []byte(`{"Width":80,"Height":24}`+"\n"))
	}
	if err := conn.WriteFrames(frames); err != nil {
		return nil, errors.Join(err, conn.Close())
	}
	return s, nil
}

// Finish reads until it has the status and all streams have ended. It returns how many bytes of stdout it has received, and
// closes the connection. A command that failed is an error.
func (s *Exec) Finish() (received int64, err error) {
	defer func() { err = errors.Join(err, s.Close()) }()
	var stdout counter
	status, err := s.Copy(&stdout, io.Discard)
	if err == nil && status.Status != "Success" {
		err = fmt.Errorf("the command ended with %s: %s", status.Status, status.Message)
	}
	return int64(stdout), err
}

type counter int64

func (c *counter) Write(data []byte) (int, error) {
	*c += counter(len(data))
	return len(data), nil
}

// Copy reads until it has the status and all streams have ended. If they end without a status, it returns an error. The
// connection stays open.
func (s *Exec) Copy(stdout, stderr io.Writer) (metav1.Status, error) {
	open := map[uint32]bool{s.Failure: true, s.Stdout: true}
	if s.Stderr != 0 {
		open[s.Stderr] = true
	}
	var text bytes.Buffer
	for len(open) > 0 {
		e, err := s.Next()
		if errors.Is(err, ErrGoAway) || errors.Is(err, io.EOF) {
			break // the status decides
		}
		if err != nil {
			return metav1.Status{}, err
		}
		switch e.Stream {
		case s.Failure:
			_, err = text.Write(e.Data)
		case s.Stdout:
			_, err = stdout.Write(e.Data)
		case s.Stderr:
			_, err = stderr.Write(e.Data)
		}
		if err != nil {
			return metav1.Status{}, err
		}
		if e.Fin || e.Reset {
			delete(open, e.Stream)
		}
	}
	var status metav1.Status
	if err := json.Unmarshal(text.Bytes(), &status); err != nil {
		return status, fmt.Errorf("status %q: %w", text.Bytes(), err)
	}
	return status, nil
}

// FrameSize is the payload of the frames that the client sends, as io.Copy in client-go makes them. Several are sent with
// one write.
const (
	FrameSize      = 32 << 10
	FramesPerWrite = 8
)

// Upload sends total bytes and FIN on a stream.
func (c *Conn) Upload(stream uint32, total int64) error {
	var batch []byte
	for range FramesPerWrite {
		batch = AppendData(batch, stream, false, make([]byte, FrameSize))
	}
	const payload = FrameSize * FramesPerWrite
	for sent := int64(0); sent < total; sent += payload {
		if err := c.WriteFrames(batch); err != nil {
			return err
		}
	}
	return c.WriteFrames(AppendDataHeader(nil, stream, true, 0))
}

// Expect reads until the stream has sent the text.
func (c *Conn) Expect(stream uint32, text string) error {
	var got []byte
	for {
		e, err := c.Next()
		if err != nil {
			return err
		}
		if e.Stream == stream {
			if got = append(got, e.Data...); bytes.Contains(got, []byte(text)) {
				return nil
			}
		}
		if e.Fin || e.Reset {
			return fmt.Errorf("stream %d ended before %q came; got %q", e.Stream, text, got)
		}
	}
}

// First reads until the stream has sent something, and returns how many bytes that is.
func (c *Conn) First(stream uint32) (int, error) {
	for {
		e, err := c.Next()
		if err != nil {
			return 0, err
		}
		if e.Stream == stream && len(e.Data) > 0 {
			return len(e.Data), nil
		}
		if e.Fin || e.Reset {
			return 0, fmt.Errorf("stream %d ended before anything came on %d", e.Stream, stream)
		}
	}
}
