package streaming

import (
	"bytes"
	"context"
	"crypto/sha256"
	"fmt"
	"hash"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"net/url"
	"os"
	"reflect"
	"strings"
	"syscall"
	"testing"
	"time"

	"k8s.io/client-go/tools/remotecommand"

	"github.com/streamshim/streamshim/pkg/handover"
	"github.com/streamshim/streamshim/pkg/streaming/internal/status"
	commands "github.com/streamshim/streamshim/pkg/streaming/remotecommand"
	"github.com/streamshim/streamshim/pkg/workload"
)

// handedOver freezes the server, calls look with the states of its commands, and resumes it.
func (s *testServer) handedOver(look func(commands.State)) {
	s.t.Helper()
	files := handover.NewFiles()
	defer files.Close()
	ctx, cancel := context.WithTimeout(context.Background(), testTimeout)
	defer cancel()
	encoded, err := s.Freeze(ctx, files)
	if err != nil {
		s.t.Fatalf("freeze: %v", err)
	}
	state, err := decode(encoded)
	if err != nil {
		s.t.Fatal(err)
	}
	for _, each := range state.Sessions {
		var command commands.State
		if err := handover.Decode(each.State, &command); err != nil {
			s.t.Fatal(err)
		}
		look(command)
	}
	if _, ended, err := s.Server.Resume(encoded, files); err != nil || ended > 0 {
		s.t.Fatalf("resume: %v, %d sessions have ended", err, ended)
	}
}

// inPhase hands the server over several times while a session is in a phase, and checks that the session stays in it.
func (s *testServer) inPhase(want string) {
	s.t.Helper()
	var got string
	hand := func() {
		s.handedOver(func(state commands.State) { got = string(state.Phase) })
	}
	eventually(s.t, "the phase "+want, func() bool {
		time.Sleep(100 * time.Millisecond) // otherwise no session would get on: some look at their clients this rarely
		hand()
		return got == want
	})
	for range 5 {
		hand()
		if got != want {
			s.t.Fatalf("after the phase %q comes %q", want, got)
		}
	}
}

// sumOf returns random bytes and their sum.
func sumOf(size int64) (io.Reader, hash.Hash) {
	sum := sha256.New()
	seed := [32]byte{byte(rand.Int())}
	return io.TeeReader(io.LimitReader(rand.NewChaCha8(seed), size), sum), sum
}

type readerFunc func([]byte) (int, error)

func (f readerFunc) Read(p []byte) (int, error) { return f(p) }

// TestCommandsAreHandedOver checks that hand-overs at random moments lose no byte in either direction and no exit code: of
// commands that are started here, of commands that an upstream serves, and of attached ones.
func TestCommandsAreHandedOver(t *testing.T) {
	const size = 4 << 20
	for _, kind := range []string{"exec", "relayed", "bandwidth"} {
		t.Run(kind, func(t *testing.T) {
			forEachTransport(t, func(t *testing.T, transport string) {
				config := Config{}
				if kind == "bandwidth" {
					config.Bandwidth = 2 << 20
				}
				s := startServer(t, config)
				executor := &hostExecutor{t: t}
				in, want := sumOf(size)
				got := sha256.New()
				handedOver := readerFunc(func([]byte) (int, error) { // however fast the machine is
					for s.handovers.Load() < 5 && t.Context().Err() == nil {
						time.Sleep(time.Millisecond)
					}
					return 0, io.EOF
				})
				options := remotecommand.StreamOptions{
					Stdin:  io.MultiReader(io.LimitReader(in, size/2), handedOver, in),
					Stdout: got, Stderr: io.Discard,
				}
				var u *url.URL
				if kind == "relayed" {
					upstream := startServer(t, config)
					defer upstream.beRestless(40 * time.Millisecond)()
					u = s.relayedURL(upstream.execURL(executor, options, "sh", "-c", "cat; exit 7"), options)
				} else {
					u = s.execURL(executor, options, "sh", "-c", "cat; exit 7")
				}
				ended := make(chan error, 1)
				go func() { ended <- stream(t.Context(), t, transport, u, options) }()
				stop := s.beRestless(40 * time.Millisecond)
				defer stop()
				if err := receive(t, ended, "the end"); exitCode(t, err) != 7 {
					t.Errorf("ended with %v", err)
				}
				if !bytes.Equal(want.Sum(nil), got.Sum(nil)) {
					t.Error("what came back is not what was sent")
				}
				stop()
				if n := s.handovers.Load(); n < 5 {
					t.Errorf("only %d hand-overs", n)
				}
			})
		})
	}
}

// TestTerminalsAreHandedOver types into a terminal and resizes it while it is handed over.
func TestTerminalsAreHandedOver(t *testing.T) {
	forEachTransport(t, func(t *testing.T, transport string) {
		s := startServer(t, Config{})
		input, typed := io.Pipe()
		defer typed.Close()
		var out syncBuffer
		queue := make(sizes, 10)
		queue <- remotecommand.TerminalSize{Width: 10, Height: 20}
		defer close(queue)
		options := remotecommand.StreamOptions{Stdin: input, Stdout: &out, Tty: true, TerminalSizeQueue: queue}
		ended := make(chan error, 1)
		u := s.execURL(&hostExecutor{t: t}, options, "sh", "-c", "stty -echo; echo ready; while read line; do echo \"<$line $(stty size)>\"; done; exit 3")
		go func() { ended <- stream(t.Context(), t, transport, u, options) }()
		eventually(t, "the shell", func() bool { return strings.Contains(out.String(), "ready") })
		for i := range 12 {
			queue <- remotecommand.TerminalSize{Width: uint16(100 + i), Height: 50}
			s.handOver()
			typed.Write([]byte(fmt.Sprintf("line %d\n", i)))
			s.handOver()
			eventually(t, "the answer", func() bool { return strings.Contains(out.String(), fmt.Sprintf("<line %d ", i)) })
		}
		eventually(t, "the last size", func() bool {
			typed.Write([]byte("size\n"))
			return strings.Contains(out.String(), "<size 50 111>")
		})
		typed.Write([]byte{4})
		if err := receive(t, ended, "the end"); exitCode(t, err) != 3 {
			t.Errorf("ended with %v", err)
		}
	})
}

// TestExitDuringAHandOver checks that nothing is lost if the client does not read and the process exits meanwhile.
func TestExitDuringAHandOver(t *testing.T) {
	forEachTransport(t, func(t *testing.T, transport string) {
		s := startServer(t, Config{})
		executor := &hostExecutor{t: t}
		var out bytes.Buffer
		options := remotecommand.StreamOptions{Stdout: &out}
		for range 5 {
			out.Reset()
			u := s.execURL(executor, options, "sh", "-c", "sleep 0.1; head -c 300000 /dev/zero; exit 5")
			ended := make(chan error, 1)
			before := executor.count()
			go func() { ended <- stream(t.Context(), t, transport, u, options) }()
			eventually(t, "the start", func() bool { return executor.count() > before })
			files := handover.NewFiles()
			state, err := s.Freeze(t.Context(), files)
			if err != nil {
				t.Fatal(err)
			}
			time.Sleep(150 * time.Millisecond) // until it has exited or written its first output
			if _, _, err := s.Server.Resume(state, files); err != nil {
				t.Fatal(err)
			}
			files.Close()
			if err := receive(t, ended, "the end"); exitCode(t, err) != 5 || out.Len() != 300000 {
				t.Errorf("ended with %v, %d bytes", err, out.Len())
			}
		}
	})
}

// stubborn is a process that ignores the end of its client and that no signal kills.
type stubborn struct{ *hostProcess }

func (stubborn) Disconnect() {}
func (stubborn) Kill()       {}

func (p stubborn) Freeze(files *handover.Files) ([]byte, error) {
	return freezeFiles(p, files, p.stdin, p.stdout, p.stderr)
}

// leaving is a process whose Close, with which the phase of the output ends, waits for the test.
type leaving struct {
	*hostProcess
	begun, goOn chan struct{}
}

func (p *leaving) Close() error {
	if p.begun != nil {
		close(p.begun)
		<-p.goOn
		p.begun = nil
	}
	return p.hostProcess.Close()
}

// tellingIsHandedOver freezes a session between the end of its output and the line for its user. It reports whether the freeze has
// come before the line.
func tellingIsHandedOver(t *testing.T, transport string) (caught bool) {
	s := startServer(t, Config{})
	executor := &hostExecutor{t: t}
	process := &leaving{begun: make(chan struct{}), goOn: make(chan struct{})}
	begun := process.begun
	request := s.localRequest(executorFunc(func(c workload.Command) (remoteProcess, error) {
		p, err := executor.Start(t.Context(), c)
		if err != nil {
			return nil, err
		}
		process.hostProcess = p.(*hostProcess)
		return process, nil
	}), streamsOf(remotecommand.StreamOptions{Stdout: io.Discard, Stderr: io.Discard}, "sleep", "600"))
	s.reasons[request.Container.ContainerID] = func(context.Context) string { return "it was the test" }
	var stderr syncBuffer
	ended := make(chan error, 1)
	u := s.url(s.Exec(request))
	go func() {
		ended <- stream(t.Context(), t, transport, u, remotecommand.StreamOptions{Stdout: io.Discard, Stderr: &stderr})
	}()
	eventually(t, "the start", func() bool { return executor.count() == 1 })
	close(executor.last().containerExited)
	receive(t, begun, "the end of the output")
	before := s.Frozen()
	go func() {
		for s.Frozen() == before {
			time.Sleep(time.Millisecond)
		}
		time.Sleep(10 * time.Millisecond) // the session itself is frozen by another goroutine; the caller tries again
		close(process.goOn)
	}()
	s.handedOver(func(state commands.State) {
		if caught = state.Phase == "telling"; caught && (state.Process != nil || !strings.Contains(state.Ending.Line, "it was the test")) {
			t.Errorf("its state has the process %v and the line %q", state.Process, state.Ending.Line)
		}
	})
	if err := receive(t, ended, "the end"); exitCode(t, err) != 137 || strings.Count(stderr.String(), "it was the test") != 1 {
		t.Errorf("ended with %v, %q", err, stderr.String())
	}
	return caught
}

// TestEachPhaseIsHandedOver hands over in each phase. The phase must end as it would have.
func TestEachPhaseIsHandedOver(t *testing.T) {
	options := remotecommand.StreamOptions{Stdin: strings.NewReader(""), Stdout: io.Discard}
	t.Run("opening", func(t *testing.T) {
		s := startServer(t, Config{Commands: commandConfig{Waits: commandWaits{StreamCreation: time.Second}}})
		u := s.execURL(&hostExecutor{t: t}, options, "true")
		c := dialRaw(t, u, upgradeRequest(http.MethodPost, u, spdyLines("v4.channel.k8s.io")...))
		defer c.conn.Close()
		s.inPhase("opening")
		// The deadline must not move, otherwise it would never come.
		defer s.beRestless(20 * time.Millisecond)()
		eventually(t, "the end", func() bool { return len(s.config.Sessions.List()) == 0 })
	})
	forEachTransport(t, func(t *testing.T, transport string) {
		t.Run("explaining", func(t *testing.T) {
			s := startServer(t, Config{})
			executor := &hostExecutor{t: t}
			request := s.localRequest(executor, streamsOf(remotecommand.StreamOptions{Stdout: io.Discard, Stderr: io.Discard}, "sleep", "600"))
			asked := make(chan struct{}, 100)
			answer := make(chan struct{})
			s.reasons[request.Container.ContainerID] = func(ctx context.Context) string {
				asked <- struct{}{}
				select {
				case <-ctx.Done():
					return ""
				case <-answer:
					return "it was the test"
				}
			}
			var stderr syncBuffer
			ended := make(chan error, 1)
			u := s.url(s.Exec(request))
			go func() {
				ended <- stream(t.Context(), t, transport, u, remotecommand.StreamOptions{Stdout: io.Discard, Stderr: &stderr})
			}()
			eventually(t, "the start", func() bool { return executor.count() == 1 })
			close(executor.last().containerExited)
			<-asked
			s.inPhase("explaining")
			close(answer)
			if err := receive(t, ended, "the end"); exitCode(t, err) != 137 || !strings.Contains(stderr.String(), "it was the test") {
				t.Errorf("ended with %v, %q", err, stderr.String())
			}
		})
		t.Run("draining", func(t *testing.T) {
			s := startServer(t, Config{Commands: commandConfig{DrainIdle: 2 * time.Second}})
			executor := &hostExecutor{t: t}
			var out syncBuffer
			options := remotecommand.StreamOptions{Stdout: &out}
			u := s.execURL(executor, options, "sh", "-c", "(sleep 0.5; echo late; sleep 600) & echo early; exit 4")
			ended := make(chan error, 1)
			go func() { ended <- stream(t.Context(), t, transport, u, options) }()
			s.inPhase("draining")
			defer s.beRestless(100 * time.Millisecond)() // silence adds up over hand-overs
			if err := receive(t, ended, "the end"); exitCode(t, err) != 4 || out.String() != "early\nlate\n" {
				t.Errorf("ended with %v, %q", err, out.String())
			}
			syscall.Kill(-executor.last().cmd.Process.Pid, syscall.SIGKILL)
		})
		// One output has ended because it was silent. The other one goes on.
		t.Run("draining one of two", func(t *testing.T) {
			s := startServer(t, Config{Commands: commandConfig{DrainIdle: 2 * time.Second}})
			executor := &hostExecutor{t: t}
			options := remotecommand.StreamOptions{Stdout: io.Discard, Stderr: io.Discard}
			u := s.execURL(executor, options, "sh", "-c", "while :; do sleep 0.1; echo more; done & exit 4")
			ended := make(chan error, 1)
			go func() { ended <- stream(t.Context(), t, transport, u, options) }()
			silent := false
			eventually(t, "an output that was silent for too long", func() bool {
				time.Sleep(50 * time.Millisecond) // as in inPhase
				s.handedOver(func(state commands.State) {
					silent = state.Phase == "draining" && state.Drain.Outputs[1].Ended && !state.Drain.Outputs[0].Ended
				})
				return silent
			})
			syscall.Kill(-executor.last().cmd.Process.Pid, syscall.SIGKILL)
			if err := receive(t, ended, "the end"); exitCode(t, err) != 4 {
				t.Errorf("ended with %v", err)
			}
		})
		t.Run("following", func(t *testing.T) {
			s := startServer(t, Config{})
			executor := &hostExecutor{t: t}
			ctx, leave := context.WithCancel(t.Context())
			defer leave()
			u := s.execURL(executorFunc(func(c workload.Command) (remoteProcess, error) {
				p, err := executor.Start(ctx, c)
				if err != nil {
					return nil, err
				}
				return stubborn{p.(*hostProcess)}, nil
			}), options, "sleep", "600")
			ended := make(chan error, 1)
			go func() {
				ended <- stream(ctx, t, transport, u, remotecommand.StreamOptions{Stdin: openStdin(t), Stdout: io.Discard})
			}()
			eventually(t, "the start", func() bool { return executor.count() == 1 })
			s.inPhase("running")
			leave()
			s.inPhase("following")
			executor.last().Kill()
			eventually(t, "the end", func() bool { return len(s.config.Sessions.List()) == 0 })
			receive(t, ended, "the client's end")
		})
	})
	t.Run("sizing", func(t *testing.T) {
		s := startServer(t, Config{Commands: commandConfig{Waits: commandWaits{FirstSize: 10 * testTimeout}}})
		u := s.execURL(&hostExecutor{t: t}, remotecommand.StreamOptions{Stdin: strings.NewReader(""), Stdout: io.Discard, Tty: true}, "stty", "size")
		c := dialRaw(t, u, upgradeRequest(http.MethodPost, u, spdyLines("v4.channel.k8s.io")...))
		ids := c.remoteCommandStreams(streamTypeError, streamTypeStdin, streamTypeStdout, streamTypeResize)
		s.inPhase("sizing")
		c.send(ids[streamTypeResize], `{"Width":33,"Height":44}`, false)
		if got := c.finished(ids[streamTypeStdout]); got != "44 33\r\n" {
			t.Errorf("the size is %q", got)
		}
	})
	t.Run("finishing", func(t *testing.T) {
		s := startServer(t, Config{Commands: commandConfig{InputGrace: 10 * testTimeout}})
		executor := &hostExecutor{t: t}
		folder := t.TempDir()
		u := s.execURL(executor, options, "sh", "-c", fmt.Sprintf("cd %s; mkfifo go; read line < go; cat > input; mv input all", folder))
		c := dialRaw(t, u, upgradeRequest(http.MethodPost, u, spdyLines("v4.channel.k8s.io")...))
		ids := c.remoteCommandStreams(streamTypeError, streamTypeStdin, streamTypeStdout)
		input := strings.Repeat("all of it\n", 6000)
		c.send(ids[streamTypeStdin], input, true)
		eventually(t, "the command", func() bool { _, err := os.Stat(folder + "/go"); return err == nil })
		c.conn.(*net.TCPConn).CloseWrite()
		s.inPhase("finishing")
		if err := os.WriteFile(folder+"/go", []byte("go\n"), 0); err != nil {
			t.Fatal(err)
		}
		var got []byte
		eventually(t, "the input", func() (there bool) {
			var err error
			got, err = os.ReadFile(folder + "/all")
			return err == nil
		})
		if string(got) != input {
			t.Errorf("the command has read %d bytes of %d", len(got), len(input))
		}
		eventually(t, "the end", func() bool { return len(s.config.Sessions.List()) == 0 })
	})
	t.Run("reaping", func(t *testing.T) {
		s := startServer(t, Config{})
		executor := &hostExecutor{t: t}
		request := s.localRequest(executorFunc(func(c workload.Command) (remoteProcess, error) {
			p, err := executor.Start(t.Context(), c)
			if err != nil {
				return nil, err
			}
			return stubborn{p.(*hostProcess)}, nil
		}), streamsOf(remotecommand.StreamOptions{Stdout: io.Discard, Stderr: io.Discard}, "sleep", "600"))
		s.reasons[request.Container.ContainerID] = func(context.Context) string { return "it was the test" }
		var stderr syncBuffer
		ended := make(chan error, 1)
		u := s.url(s.Exec(request))
		go func() {
			ended <- stream(t.Context(), t, "SPDY", u, remotecommand.StreamOptions{Stdout: io.Discard, Stderr: &stderr})
		}()
		eventually(t, "the start", func() bool { return executor.count() == 1 })
		close(executor.last().containerExited)
		reaped := 0
		eventually(t, "the end, by the phase's deadline", func() bool {
			if len(ended) == 0 {
				s.handedOver(func(state commands.State) {
					if state.Phase == "reaping" {
						reaped++
					}
				})
			}
			return len(ended) > 0
		})
		if err := <-ended; err == nil || !strings.Contains(stderr.String()+err.Error(), "it was the test") {
			t.Errorf("ended with %v, %q", err, stderr.String())
		}
		if reaped == 0 {
			t.Error("it was never handed over in that phase")
		}
		executor.last().Kill()
	})
	// A receipt that is due goes to another program, which must ask again.
	t.Run("holding", func(t *testing.T) {
		s := startServer(t, Config{Commands: commandConfig{StatusWait: 10 * testTimeout}})
		reader, _, ended := beginHeldBack(t, s)
		s.inPhase("holding")
		close(reader.goOn)
		if err := receive(t, ended, "the end"); exitCode(t, err) != 3 || reader.taken != 240_000 {
			t.Errorf("%d bytes, %v", reader.taken, err)
		}
	})
	forEachTransport(t, func(t *testing.T, transport string) {
		t.Run("telling", func(t *testing.T) {
			eventually(t, "a freeze in this phase", func() bool { return tellingIsHandedOver(t, transport) })
		})
	})
	// These phases last only until the client reads what is sent, which fits into every socket. So the state says that they
	// have just begun.
	for _, phase := range []string{"telling", "holding", "saying"} {
		t.Run("at the beginning of "+phase, func(t *testing.T) {
			forEachTransport(t, func(t *testing.T, transport string) {
				s := startCarried(t, Config{})
				executor := &hostExecutor{t: t}
				var out, stderr syncBuffer
				options := remotecommand.StreamOptions{Stdin: openStdin(t), Stdout: &out, Stderr: &stderr}
				ended := make(chan error, 1)
				u := s.execURL(executor, options, "sh", "-c", "echo ready; cat")
				go func() { ended <- stream(t.Context(), t, transport, u, options) }()
				eventually(t, "the command", func() bool { return out.String() == "ready\n" })
				s.upgrade(func(state *State) {
					var command commands.State
					if err := handover.Decode(state.Sessions[0].State, &command); err != nil {
						t.Fatal(err)
					}
					reflect.ValueOf(&command.Phase).Elem().SetString(phase) // its type has no name here
					command.Process, command.Input = nil, nil
					command.Drain.Until, command.Drain.Stopped, command.Drain.Outputs = time.Time{}, false, nil
					command.Ending = commands.EndingState{Reason: "exited", ExitCode: 6, Status: status.Exit(6, "")}
					if phase == "telling" {
						command.Ending.Line = "a word before\n"
					}
					var err error
					if state.Sessions[0].State, err = handover.Encode(command); err != nil {
						t.Fatal(err)
					}
				})
				if err := receive(t, ended, "the end"); exitCode(t, err) != 6 || (stderr.String() == "a word before\n") != (phase == "telling") {
					t.Errorf("ended with %v, %q", err, stderr.String())
				}
			})
		})
	}
	t.Run("parting", func(t *testing.T) {
		s := startServer(t, Config{})
		executor := &hostExecutor{t: t}
		u := s.execURL(executor, options, "true")
		c := dialRaw(t, u, upgradeRequest(http.MethodPost, u, spdyLines("v4.channel.k8s.io")...))
		c.remoteCommandStreams(streamTypeError, streamTypeStdin, streamTypeStdout)
		s.inPhase("parting")
		c.conn.Close()
		eventually(t, "the end", func() bool { return len(s.config.Sessions.List()) == 0 })
	})
}
