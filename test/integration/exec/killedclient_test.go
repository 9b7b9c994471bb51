package exec

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"os/exec"
	"testing"
	"time"

	"k8s.io/client-go/tools/remotecommand"

	"github.com/streamshim/streamshim/test/internal/harness"
)

// clientVariable makes this test binary a client of several sessions. The test kills it.
const clientVariable = "STREAMSHIM_SYMPTOMS_CLIENT"

// clientSession is one session of a client.
type clientSession struct {
	Transport, URL string
	TTY            bool
	Stdin          string // "", "open" or "flood"
	Blocked        bool   // does not read output
}

func (c clientSession) options() remotecommand.StreamOptions {
	options := remotecommand.StreamOptions{Stdout: io.Discard, Tty: c.TTY}
	if !c.TTY {
		options.Stderr = io.Discard
	}
	if c.Blocked {
		options.Stdout = harness.NewGate(io.Discard)
	}
	switch c.Stdin {
	case "open":
		options.Stdin, _ = io.Pipe()
	case "flood":
		options.Stdin = harness.Flood{}
	}
	return options
}

func clientMain() int {
	var sessions []clientSession
	if err := json.Unmarshal([]byte(os.Getenv(clientVariable)), &sessions); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 2
	}
	for _, s := range sessions {
		go func() {
			if err := harness.Stream(context.Background(), s.Transport, s.URL, s.options()); err != nil {
				fmt.Fprintf(os.Stderr, "%+v: %v\n", s, err)
			}
		}()
	}
	time.Sleep(time.Hour) // until it is killed
	return 0
}

// startClient runs sessions in a separate process. The caller may kill it. Otherwise it is killed when the test ends.
func startClient(t *testing.T, sessions []clientSession) *os.Process {
	t.Helper()
	text, err := json.Marshal(sessions)
	if err != nil {
		t.Fatal(err)
	}
	command := exec.Command(os.Args[0])
	command.Env = append(os.Environ(), clientVariable+"="+string(text))
	command.Stderr = os.Stderr
	if err := command.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		command.Process.Kill() //nolint:errcheck // it may be dead
		command.Wait()         //nolint:errcheck // as above
	})
	return command.Process
}
