package websocket

import (
	"io"
	"os"
	"strings"
	"testing"

	"github.com/streamshim/streamshim/pkg/streaming/internal/websocket/frames"
)

// TestNoAllocationPerMessage checks both directions, and the pipe of a process.
func TestNoAllocationPerMessage(t *testing.T) {
	const size = 32 << 10
	accepted := make(chan *ChannelConn, 1)
	s := newTestServer(t, execConfig(), func(c *ChannelConn) {
		accepted <- c
		<-c.Done()
	})
	client := s.dialRaw(t, ChannelV5)
	c := <-accepted
	drained := make(chan struct{})
	go func() {
		defer close(drained)
		io.Copy(io.Discard, client)
	}()
	payload := make([]byte, size)
	message := clientFrame(frames.OpBinary, true, "\x00"+strings.Repeat("x", size))
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	piped := make(chan struct{})
	go func() {
		defer close(piped)
		c.Channel(Stdout).ReadFrom(r)
	}()
	for name, step := range map[string]func() error{
		"write": func() error {
			_, err := c.Channel(Stderr).Write(payload)
			return err
		},
		"receive": func() error {
			if _, err := client.Write(message); err != nil {
				return err
			}
			_, err := io.ReadFull(c.Channel(Stdin), payload)
			return err
		},
		"pipe": func() error {
			_, err := w.Write(payload)
			return err
		},
	} {
		n := testing.AllocsPerRun(2000, func() {
			if err := step(); err != nil {
				t.Fatal(err)
			}
		})
		if n > 0 && !raceEnabled {
			t.Errorf("%s: %v allocations per message", name, n)
		}
		t.Logf("%s: %v allocations per message", name, n)
	}
	w.Close()
	<-piped
	r.Close()
	client.Close()
	<-drained
	s.waitEnded(t)
}
