package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"time"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// sessionTimeout bounds one session on a busy machine; it is there to end a run that hangs.
const sessionTimeout = 3 * time.Minute

// command is an exec that the client asks for.
type command struct {
	args               []string
	stdin, stderr, tty bool
}

// execSession is an exec under way.
type execSession struct {
	*connection
	failure, stdin, stdout, stderr, resize uint32
}

// startExec asks for an exec, upgrades, and opens the streams. It does not wait for the command.
func startExec(ctx context.Context, client runtimeapi.RuntimeServiceClient, container string, c command) (*execSession, error) {
	response, err := client.Exec(ctx, &runtimeapi.ExecRequest{
		ContainerId: container, Cmd: c.args, Stdin: c.stdin, Stdout: true, Stderr: c.stderr && !c.tty, Tty: c.tty,
	})
	if err != nil {
		return nil, err
	}
	conn, err := upgrade(response.Url, "v4.channel.k8s.io")
	if err != nil {
		return nil, err
	}
	if err := conn.SetDeadline(time.Now().Add(sessionTimeout)); err != nil {
		return nil, err
	}
	s := &execSession{connection: conn}
	var frames []byte
	frames, s.failure = conn.appendStream(frames, "streamtype", "error")
	if c.stdin {
		frames, s.stdin = conn.appendStream(frames, "streamtype", "stdin")
	}
	frames, s.stdout = conn.appendStream(frames, "streamtype", "stdout")
	if c.stderr && !c.tty {
		frames, s.stderr = conn.appendStream(frames, "streamtype", "stderr")
	}
	if c.tty {
		frames, s.resize = conn.appendStream(frames, "streamtype", "resize")
		frames = appendData(frames, s.resize, false, []byte(`{"Width":80,"Height":24}`+"\n"))
	}
	if err := conn.write(frames); err != nil {
		return nil, errors.Join(err, conn.Close())
	}
	return s, nil
}

// finish reads until the status has come and all streams have ended, says how many bytes came on
// stdout, and closes the connection. A command that failed is an error.
func (s *execSession) finish() (received int64, err error) {
	defer func() { err = errors.Join(err, s.Close()) }()
	open := map[uint32]bool{s.failure: true, s.stdout: true}
	if s.stderr != 0 {
		open[s.stderr] = true
	}
	var status bytes.Buffer
	for len(open) > 0 {
		e, err := s.read()
		if errors.Is(err, errGoAway) || errors.Is(err, io.EOF) {
			break // the status decides
		}
		if err != nil {
			return received, err
		}
		switch e.stream {
		case s.failure:
			status.Write(e.data)
		case s.stdout:
			received += int64(len(e.data))
		}
		if e.fin || e.reset {
			delete(open, e.stream)
		}
	}
	var result struct{ Status, Message string }
	if err := json.Unmarshal(status.Bytes(), &result); err != nil {
		return received, fmt.Errorf("status %q: %w", status.Bytes(), err)
	}
	if result.Status != "Success" {
		return received, fmt.Errorf("the command ended with %s: %s", result.Status, result.Message)
	}
	return received, nil
}

// frameSize is the payload of the frames the client sends: what io.Copy in client-go makes. Several
// of them leave with one write.
const (
	frameSize      = 32 << 10
	framesPerWrite = 8
)

// upload sends total bytes and FIN on a stream.
func (c *connection) upload(stream uint32, total int64) error {
	var batch []byte
	for range framesPerWrite {
		batch = appendData(batch, stream, false, make([]byte, frameSize))
	}
	const payload = frameSize * framesPerWrite
	for sent := int64(0); sent < total; sent += payload {
		if err := c.write(batch); err != nil {
			return err
		}
	}
	return c.write(appendDataHeader(nil, stream, true, 0))
}

// expect reads until the text has come on the stream.
func (c *connection) expect(stream uint32, text string) error {
	var got []byte
	for {
		e, err := c.read()
		if err != nil {
			return err
		}
		if e.stream == stream {
			if got = append(got, e.data...); bytes.Contains(got, []byte(text)) {
				return nil
			}
		}
		if e.fin || e.reset {
			return fmt.Errorf("stream %d ended before %q came; got %q", e.stream, text, got)
		}
	}
}

// first reads until something has come on the stream and says how many bytes.
func (c *connection) first(stream uint32) (int, error) {
	for {
		e, err := c.read()
		if err != nil {
			return 0, err
		}
		if e.stream == stream && len(e.data) > 0 {
			return len(e.data), nil
		}
		if e.fin || e.reset {
			return 0, fmt.Errorf("stream %d ended before anything came on %d", e.stream, stream)
		}
	}
}
