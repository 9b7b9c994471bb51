package main

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os/exec"
	"regexp"
	"strings"
	"time"

	"github.com/creack/pty"

	"github.com/streamshim/streamshim/test/internal/node"
)

// stepTimeout bounds each step of the tour, on a machine that may be busy.
const stepTimeout = time.Minute

// step tries one thing that streamshim does, with crictl.
type step struct {
	name string
	try  func(ctx context.Context, n *node.Node, p pod) error
}

var steps = []step{
	{"exec prints to stdout and stderr", tryExec},
	{"exec reports the exit code", tryExitCode},
	{"exec takes stdin, 1 MiB there and back", tryStdin},
	{"exec with a terminal has its size", tryTerminal},
	{"exec over WebSocket", tryWebSocket},
	{"ExecSync", tryExecSync},
	{"attach talks with the main process", tryAttach},
	{"port-forward reaches the web server", tryPortForward},
}

// tour runs all steps, reports how each went, and fails if one failed.
func tour(ctx context.Context, n *node.Node, p pod) error {
	progress("no terminal here, so this is a tour")
	failures := 0
	for _, s := range steps {
		start := time.Now()
		stepCtx, cancel := context.WithTimeout(ctx, stepTimeout)
		err := s.try(stepCtx, n, p)
		cancel()
		if err != nil {
			failures++
			fmt.Printf("FAIL  %s: %v\n", s.name, err)
			continue
		}
		fmt.Printf("ok    %s (%.2f s)\n", s.name, time.Since(start).Seconds())
	}
	if failures > 0 {
		return fmt.Errorf("%d of %d steps failed; see %s", failures, len(steps), n.LogPath("streamshim"))
	}
	progress("all %d steps went well; the lab stays up until make lab-down", len(steps))
	return nil
}

// crictl returns a crictl command that ends with the context.
func crictl(ctx context.Context, n *node.Node, args ...string) *exec.Cmd {
	template := n.Crictl(args...)
	command := exec.CommandContext(ctx, template.Path, template.Args[1:]...)
	command.WaitDelay = 5 * time.Second
	return command
}

// run runs crictl and returns its stdout and stderr. The error tells how crictl ended.
func run(ctx context.Context, n *node.Node, stdin io.Reader, args ...string) (stdout, stderr string, err error) {
	var out, errOut bytes.Buffer
	command := crictl(ctx, n, args...)
	command.Stdin, command.Stdout, command.Stderr = stdin, &out, &errOut
	err = command.Run()
	return out.String(), errOut.String(), err
}

func expect(stdout, stderr string, err error, want string) error {
	if err == nil && stdout != want {
		err = errors.New("not as expected")
	}
	if err != nil {
		return fmt.Errorf("%w: stdout %.200q, stderr %.200q; expected stdout %.200q", err, stdout, stderr, want)
	}
	return nil
}

func tryExec(ctx context.Context, n *node.Node, p pod) error {
	stdout, stderr, err := run(ctx, n, nil, "exec", p.container, "sh", "-c", "echo out; echo err >&2")
	if err == nil && stderr != "err\n" {
		err = errors.New("stderr did not come through")
	}
	return expect(stdout, stderr, err, "out\n")
}

func tryExitCode(ctx context.Context, n *node.Node, p pod) error {
	_, stderr, err := run(ctx, n, nil, "exec", p.container, "sh", "-c", "exit 3")
	// crictl itself ends with 1 and prints the code.
	failed := new(exec.ExitError)
	if !errors.As(err, &failed) || !strings.Contains(stderr, "exit code 3") {
		return fmt.Errorf("crictl did not report exit code 3 but %.200q", stderr)
	}
	return nil
}

func tryStdin(ctx context.Context, n *node.Node, p pod) error {
	data := strings.Repeat("0123456789abcde\n", 1<<20/16)
	stdout, stderr, err := run(ctx, n, strings.NewReader(data), "exec", "-i", p.container, "cat")
	return expect(stdout, stderr, err, data)
}

func tryTerminal(ctx context.Context, n *node.Node, p pod) error {
	terminal, err := pty.StartWithSize(crictl(ctx, n, "exec", "-it", p.container, "stty", "size"), &pty.Winsize{Rows: 41, Cols: 97})
	if err != nil {
		return err
	}
	defer func() { _ = terminal.Close() }()
	output, _ := io.ReadAll(terminal) // ends with EIO, as terminals do
	if !strings.Contains(string(output), "41 97") {
		return fmt.Errorf("stty size says %q, expected 41 97", output)
	}
	return nil
}

func tryWebSocket(ctx context.Context, n *node.Node, p pod) error {
	stdout, stderr, err := run(ctx, n, nil, "exec", "--transport", "websocket", p.container, "echo", "hello")
	return expect(stdout, stderr, err, "hello\n")
}

func tryExecSync(ctx context.Context, n *node.Node, p pod) error {
	stdout, stderr, err := run(ctx, n, nil, "exec", "-s", p.container, "echo", "hello")
	return expect(strings.TrimSpace(stdout), stderr, err, "hello") // crictl adds empty lines
}

func tryAttach(ctx context.Context, n *node.Node, p pod) error {
	return withCommand(ctx, n, []string{"attach", "-i", p.container}, "hello, lab\n", `(?m)^you said: (hello, lab)$`,
		func(string) error { return nil })
}

func tryPortForward(ctx context.Context, n *node.Node, p pod) error {
	return withCommand(ctx, n, []string{"port-forward", p.sandbox, "0:80"}, "", `Forwarding from 127\.0\.0\.1:(\d+)`, func(port string) error {
		request, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://127.0.0.1:"+port+"/", nil)
		if err != nil {
			return err
		}
		response, err := http.DefaultClient.Do(request)
		if err != nil {
			return err
		}
		body, err := io.ReadAll(io.LimitReader(response.Body, 1<<16))
		if err = errors.Join(err, response.Body.Close()); err != nil {
			return err
		}
		return expect(string(body), "", nil, "hello from the pod\n")
	})
}

// withCommand runs a crictl command that does not end by itself. It writes the input, waits for a line of output that
// matches the pattern, calls then with the match of the pattern's group, and ends the command.
func withCommand(ctx context.Context, n *node.Node, args []string, input, pattern string, then func(match string) error) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	command := crictl(ctx, n, args...)
	var stderr bytes.Buffer
	command.Stderr = &stderr
	stdin, err := command.StdinPipe()
	if err != nil {
		return err
	}
	stdout, err := command.StdoutPipe()
	if err != nil {
		return err
	}
	if err := command.Start(); err != nil {
		return err
	}
	end := func() {
		cancel()
		_ = command.Wait() // killed, as intended
	}
	if _, err := io.WriteString(stdin, input); err != nil {
		end()
		return err
	}
	expected := regexp.MustCompile(pattern)
	for lines := bufio.NewScanner(stdout); lines.Scan(); {
		if match := expected.FindStringSubmatch(lines.Text()); match != nil {
			err := then(match[1])
			end()
			return err
		}
	}
	end()
	return fmt.Errorf("crictl %s ended without %q on stdout; stderr %.300q", args[0], pattern, stderr.String())
}
