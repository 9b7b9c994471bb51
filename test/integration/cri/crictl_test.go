package cri

import (
	"net"
	"os"
	"regexp"
	"strings"
	"testing"

	"github.com/creack/pty"

	"github.com/streamshim/streamshim/test/internal/harness"
	"github.com/streamshim/streamshim/test/internal/node"
)

// notFound is what runc or crun says of a command that is not there.
var notFound = regexp.MustCompile(`executable file (.nosuch. )?not found in \$PATH`)

// TestCrictl does what people do by hand with crictl, over both of its transports. crictl's own exit code is 1 whatever the
// command's is. The command's is in its last line.
func TestCrictl(t *testing.T) {
	n := harness.Shared.Node
	_, container := runLab(t, n, node.PodSpec{Name: "plain"}, node.ContainerSpec{Stdin: true})
	_, terminal := runLab(t, n, node.PodSpec{Name: "tty"}, node.ContainerSpec{Stdin: true, TTY: true})
	servers, members := runTwoServers(t, n)
	all := append(members, container, terminal)

	// ExecSync has no transport.
	t.Run("exec -s", func(t *testing.T) {
		stdout, stderr, code := run(t, n.Crictl("exec", "-s", container, "sh", "-c", "echo out; echo err >&2"))
		if got := strings.Fields(stdout); len(got) != 2 || got[0] != "out" || got[1] != "err" || code != 0 { // crictl prints both on stdout
			t.Errorf("%q, %q, %d", stdout, stderr, code)
		}
		if _, stderr, code := run(t, n.Crictl("exec", "-s", container, "sh", "-c", "echo why >&2; exit 7")); code != 1 || !strings.Contains(stderr, "exited with 7: why") {
			t.Errorf("%q, %d", stderr, code)
		}
		if _, stderr, code := run(t, n.Crictl("exec", "-s", container, "nosuch")); code != 1 || !notFound.MatchString(stderr) {
			t.Errorf("%q, %d", stderr, code)
		}
		before := takeFootprint(t, n, container)
		if _, stderr, code := run(t, n.Crictl("exec", "-s", "--timeout", "1", container, "sh", "-c", "sleep 1000 & sleep 1000")); code != 1 || !strings.Contains(stderr, "DeadlineExceeded") {
			t.Errorf("%q, %d", stderr, code)
		}
		expectNothingLeft(t, n, before, container)
	})

	before := takeFootprint(t, n, all...)
	for _, transport := range []string{"spdy", "websocket"} {
		crictl := func(verb string, args ...string) *program {
			return start(t, n.Crictl(append([]string{verb, "-r", transport}, args...)...))
		}
		for name, test := range map[string]func(t *testing.T){
			"exec -it": func(t *testing.T) {
				shell := startInTerminal(t, n.Crictl("exec", "-r", transport, "-it", container, "sh"), 93, 31)
				shell.write("stty size\n")
				shell.expect("31 93")
				if err := pty.Setsize(shell.terminal, &pty.Winsize{Cols: 101, Rows: 42}); err != nil {
					t.Fatal(err)
				}
				// The new size arrives at some time. The shell asks until it is there.
				shell.write("until stty size | grep '42 101'; do sleep 0.1; done\n")
				shell.expectMatch(`\n42 101\r\n`)
				// The quotes distinguish what the command prints from the terminal's echo of it.
				shell.write("sh -c 'echo sta\"\"rted; exec sleep 1000'\n")
				shell.expect("started")
				shell.write(interrupt)
				shell.expect("^C")
				shell.write("exit $?\n")
				shell.expect("command terminated with exit code 130")
				shell.end(1)
			},
			"exec -it ends well": func(t *testing.T) {
				shell := startInTerminal(t, n.Crictl("exec", "-r", transport, "-it", container, "sh"), 80, 24)
				shell.write("exit\n")
				shell.end(0)
				if strings.Contains(shell.output.String(), "FATA") {
					t.Errorf("%q", shell.output)
				}
			},
			"exec -it in a terminal that is closed": func(t *testing.T) {
				shell := startInTerminal(t, n.Crictl("exec", "-r", transport, "-it", container, "sh", "-c", "echo started; exec sleep 1000"), 80, 24)
				shell.expect("started")
				if err := shell.command.Process.Kill(); err != nil {
					t.Fatal(err)
				}
				shell.end(-1)
			},
			"exec -i with piped stdin": func(t *testing.T) {
				// More than the windows of SPDY and every buffer on the way.
				input := strings.Repeat("0123456789abcde\n", 4<<20/16)
				command := n.Crictl("exec", "-r", transport, "-i", container, "sh", "-c", "cat; echo end >&2; exit 5")
				command.Stdin = strings.NewReader(input)
				var stdout, stderr strings.Builder
				command.Stdout, command.Stderr = &stdout, &stderr
				_ = command.Run() // its exit code is checked below
				if stdout.String() != input {
					t.Errorf("%d bytes came back of %d", stdout.Len(), len(input))
				}
				if code := command.ProcessState.ExitCode(); code != 1 || !strings.HasPrefix(stderr.String(), "end\n") || !strings.Contains(stderr.String(), "command terminated with exit code 5") {
					t.Errorf("%q, %d", stderr.String(), code)
				}
			},
			"exec": func(t *testing.T) {
				exec := crictl("exec", container, "sh", "-c", "echo out; echo err >&2")
				exec.end(0)
				if exec.output.String() != "out\n" || exec.stderr.String() != "err\n" {
					t.Errorf("%q and %q", exec.output, exec.stderr)
				}
			},
			"exec of a missing command": func(t *testing.T) {
				exec := crictl("exec", container, "nosuch")
				exec.end(1)
				lines := strings.SplitAfter(exec.stderr.String(), "\n")
				if !notFound.MatchString(lines[0]) || !strings.Contains(lines[1], "command terminated with exit code 127") || exec.output.String() != "" {
					t.Errorf("%q and %q", exec.output, exec.stderr)
				}
			},
			"attach": func(t *testing.T) {
				viewer := crictl("attach", container)
				// The viewer sees only what is written after it has attached, so it is written again and again.
				talker := crictl("exec", container, "sh", "-c", "while wget -qO /dev/null http://127.0.0.1/; do sleep 0.2; done")
				viewer.expect(`"GET /" 200`)
				for _, program := range []*program{viewer, talker} {
					program.signal(os.Kill)
					program.end(-1)
				}
			},
			"attach -i": func(t *testing.T) {
				// Without stdin_once the container's stdin stays open for the next client, and the answer to the last line
				// arrives although the client's input has ended.
				for _, word := range []string{"hello", "again"} {
					attach := crictl("attach", "-i", container)
					attach.write(word + "\n")
					attach.stdin.Close()
					attach.expect("you said: " + word + "\n")
					attach.signal(os.Kill)
					attach.end(-1)
				}
			},
			"attach -it with detach": func(t *testing.T) {
				const detach = "\x10\x11" // ctrl-P ctrl-Q
				for _, word := range []string{"hello", "again"} {
					attach := startInTerminal(t, n.Crictl("attach", "-r", transport, "-it", terminal), 80, 24)
					attach.write(word + "\n")
					attach.expect("you said: " + word)
					attach.write(detach)
					attach.end(0)
				}
			},
			"port-forward with two ports": func(t *testing.T) {
				forward := crictl("port-forward", servers, ":80", ":81")
				first, second := forward.forwardedTo(80), forward.forwardedTo(81)
				for range 3 {
					for address, want := range map[string]string{first: firstPage, second: secondPage} {
						web := dialHTTP(t, address)
						for range 2 {
							if page, err := web.page(); err != nil || !strings.Contains(page, want) {
								t.Errorf("%s: %q, %v, want %q", address, page, err, want)
							}
						}
						web.close()
					}
				}
				forward.signal(os.Interrupt)
				forward.end(0)
				if conn, err := net.Dial("tcp", first); err == nil {
					conn.Close()
					t.Error("the local port is still open")
				}
			},
		} {
			t.Run(name+" "+transport, func(t *testing.T) {
				test(t)
				expectNothingLeft(t, n, before, all...)
			})
		}
	}
}
