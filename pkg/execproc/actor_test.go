package execproc

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/streamshim/streamshim/pkg/execproc/internal/proc"
	"github.com/streamshim/streamshim/pkg/handover"
	"github.com/streamshim/streamshim/pkg/workload"
)

// An actor is the test binary as a streamshim that follows orders, one line of JSON each on stdin with an answer on stdout.
// It hands over to itself with a real execve.

const (
	actorVariable = "EXECPROC_TEST_ACTOR" // the state directory
	stateVariable = "EXECPROC_TEST_STATE" // the descriptor of the state
	afterVariable = "EXECPROC_TEST_AFTER" // how long a command that is hung up has until SIGTERM, and as long again until SIGKILL
)

func init() {
	if os.Getenv(actorVariable) != "" {
		runtime.LockOSThread() // to the main thread, as in the real program
	}
}

// order is what an actor must do.
type order struct {
	Do        string
	Name      string // of a command
	Container *workload.Container
	Command   workload.Command
	Text      string
	Size      workload.Size
	Gates     bool // stop at each step of a hand-over
	Thread    bool // call execve on a thread other than the main one
	Without   []string
	Lose      bool // lose the state
}

// answer is what an actor answers.
type answer struct {
	Error  string
	Text   string
	Number int
	Yes    bool
	Counts [3]int // see resources
}

// passed is what one actor leaves to the next.
type passed struct {
	Descriptors []handover.Descriptor
	Runner      []byte
	Processes   map[string][]byte
	Gates       bool
	Lost        bool
}

type actorProgram struct {
	config    Config
	in        *bufio.Reader
	runner    *Runner
	processes map[string]*Process
	self      proc.Identity
}

// act does not return.
func act(dir string) {
	a := &actorProgram{config: testConfig(dir), in: bufio.NewReaderSize(os.Stdin, 1<<20), processes: map[string]*Process{}}
	after := 2 * time.Second
	if given, err := time.ParseDuration(os.Getenv(afterVariable)); err == nil {
		after = given
	}
	a.config.TermAfter, a.config.KillAfter, a.config.OnDisconnect = after, 2*after, Policy(os.Getenv("EXECPROC_TEST_POLICY"))
	if stat, err := proc.ReadStat(os.Getpid()); err == nil {
		a.self = stat.Identity
	}
	signal.Stop(func() chan os.Signal { c := make(chan os.Signal, 1); signal.Notify(c, unix.SIGUSR1); return c }())
	if err := a.begin(); err != nil {
		a.say(answer{Error: "begin: " + err.Error()})
		os.Exit(1)
	}
	for {
		var o order
		a.hear(&o)
		reply, err := a.do(o)
		if err != nil {
			reply.Error = err.Error()
		}
		a.say(reply)
	}
}

func (a *actorProgram) hear(o *order) {
	line, err := a.in.ReadBytes('\n')
	if err != nil {
		os.Exit(0)
	}
	if err := json.Unmarshal(line, o); err != nil {
		panic(err)
	}
}

func (a *actorProgram) say(reply answer) {
	line, err := json.Marshal(reply)
	if err != nil {
		panic(err)
	}
	os.Stdout.Write(append(line, '\n'))
}

// gate reports which step a hand-over has reached, and waits for the order to continue.
func (a *actorProgram) gate(gates bool, where string) {
	if gates {
		a.say(answer{Text: where})
		a.hear(new(order))
	}
}

func (a *actorProgram) begin() (err error) {
	number, successor := os.LookupEnv(stateVariable)
	a.config.Successor = successor
	if !successor {
		a.runner, err = NewRunner(a.config)
		return err
	}
	fd, err := strconv.Atoi(number)
	if err != nil {
		return err
	}
	file := os.NewFile(uintptr(fd), "state")
	file.Seek(0, io.SeekStart)
	encoded, err := io.ReadAll(file)
	if err != nil {
		return err
	}
	file.Close()
	var state passed
	if err := handover.Decode(encoded, &state); err != nil {
		return err
	}
	var subreaper int32
	if err := unix.Prctl(unix.PR_GET_CHILD_SUBREAPER, uintptr(unsafe.Pointer(&subreaper)), 0, 0, 0); err != nil || subreaper != 1 {
		return fmt.Errorf("after execve this process is no subreaper: %d, %w", subreaper, err)
	}
	a.gate(state.Gates, "executed")
	if a.runner, err = NewRunner(a.config); err != nil {
		return err
	}
	a.gate(state.Gates, "begun")
	files, err := handover.Inherited(state.Descriptors)
	if err != nil {
		return err
	}
	if err := a.resume(state, files); err != nil {
		return err
	}
	a.say(answer{Text: "resumed", Number: int(a.self.Start)}) //nolint:gosec // small enough
	return nil
}

func (a *actorProgram) resume(state passed, files *handover.Files) error {
	defer files.Close()
	if err := a.runner.Resume(state.Runner, files); (err != nil) != state.Lost {
		return fmt.Errorf("resume, the state is lost: %v: %w", state.Lost, err)
	}
	for name, state := range state.Processes {
		p, err := a.runner.ResumeProcess(context.Background(), state, files)
		if err != nil {
			return err
		}
		a.processes[name] = p
	}
	a.runner.EndUnclaimed(files)
	return nil
}

// handOver returns only if it fails.
func (a *actorProgram) handOver(o order) error {
	files := handover.NewFiles()
	if err := a.runner.Quiesce(context.Background()); err != nil {
		return err
	}
	state := passed{Processes: map[string][]byte{}, Gates: o.Gates}
	for name, p := range a.processes {
		encoded, err := p.Freeze(files)
		if err != nil {
			return err
		}
		if !slices.Contains(o.Without, name) {
			state.Processes[name] = encoded
		}
	}
	var err error
	if state.Runner, err = a.runner.Freeze(files); err != nil {
		return err
	}
	if o.Lose {
		state.Runner, state.Processes, state.Lost = []byte("?"), nil, true
	}
	a.gate(o.Gates, "frozen")
	if o.Do == "thaw" {
		a.processes = map[string]*Process{}
		if err := a.resume(state, files); err != nil {
			return err
		}
		return nil
	}
	if state.Descriptors, err = files.Inherit(); err != nil {
		return err
	}
	encoded, err := handover.Encode(state)
	if err != nil {
		return err
	}
	fd, err := unix.MemfdCreate("state", 0)
	if err != nil {
		return err
	}
	if _, err := unix.Write(fd, encoded); err != nil {
		return err
	}
	env := slices.DeleteFunc(os.Environ(), func(v string) bool { return strings.HasPrefix(v, stateVariable+"=") })
	env = append(env, stateVariable+"="+strconv.Itoa(fd))
	execute := func() error { return syscall.Exec("/proc/self/exe", os.Args, env) }
	if !o.Thread {
		return execute()
	}
	failed := make(chan error)
	go func() {
		runtime.LockOSThread()
		failed <- execute()
	}()
	return <-failed
}

func (a *actorProgram) do(o order) (answer, error) {
	p := a.processes[o.Name]
	switch o.Do {
	case "start":
		p, err := a.runner.Start(context.Background(), *o.Container, o.Command)
		if err != nil {
			return answer{}, err
		}
		a.processes[o.Name] = p
		return answer{Number: p.PID()}, nil
	case "sync":
		result, err := a.runner.RunSync(context.Background(), *o.Container, workload.SyncCommand{Args: o.Command.Args})
		return answer{Text: string(result.Stdout), Number: result.ExitCode}, err
	case "child":
		command := exec.Command("sleep", o.Text)
		err := command.Start()
		return answer{Number: command.Process.Pid}, err
	case "write":
		_, err := io.WriteString(p.Stdin(), o.Text)
		return answer{}, err
	case "read": // reads until the text
		var seen bytes.Buffer
		buffer := make([]byte, 1)
		for !strings.HasSuffix(seen.String(), o.Text) {
			n, err := p.Stdout().Read(buffer)
			seen.Write(buffer[:n])
			if err != nil {
				return answer{Text: seen.String()}, err
			}
		}
		return answer{Text: seen.String()}, nil
	case "close stdin":
		return answer{}, p.Stdin().Close()
	case "resize":
		return answer{}, p.Resize(o.Size)
	case "disconnect":
		p.Disconnect()
		return answer{}, nil
	case "kill":
		p.Kill()
		return answer{}, nil
	case "close": // closes and forgets
		delete(a.processes, o.Name)
		return answer{}, p.Close()
	case "wait":
		select {
		case <-p.Exited():
			return answer{Number: p.ExitCode()}, nil
		case <-time.After(patience):
			return answer{}, errors.New("the process does not end")
		}
	case "container":
		select {
		case <-p.ContainerExited():
			return answer{Yes: true}, nil
		case <-time.After(time.Duration(o.Size.Width) * time.Millisecond):
			return answer{}, nil
		}
	case "resources":
		counts, err := countResources()
		return answer{Counts: counts}, err
	case "hand over", "thaw":
		return answer{Text: "resumed", Number: int(a.self.Start)}, a.handOver(o) //nolint:gosec // small enough
	case "shut down":
		return answer{}, a.runner.Shutdown(context.Background())
	}
	return answer{}, fmt.Errorf("cannot %q", o.Do)
}

// actor is the test's side of an actor.
type actor struct {
	testing.TB
	command *exec.Cmd
	in      io.Writer
	out     *bufio.Reader
	dir     string
}

func newActor(t testing.TB, policy Policy, prefix ...string) *actor {
	t.Helper()
	return newActorIn(t, filepath.Join(t.TempDir(), "exec"), policy, prefix...)
}

func newActorIn(t testing.TB, dir string, policy Policy, prefix ...string) *actor {
	t.Helper()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	a := &actor{TB: t, dir: dir}
	args := append(prefix, self) //nolint:gocritic // of this call alone
	a.command = exec.Command(args[0], args[1:]...)
	a.command.Env = append(os.Environ(), actorVariable+"="+a.dir, "EXECPROC_TEST_POLICY="+string(policy))
	a.command.Stderr = os.Stderr
	if a.in, err = a.command.StdinPipe(); err != nil {
		t.Fatal(err)
	}
	out, err := a.command.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	a.out = bufio.NewReader(out)
	if err := a.command.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(a.kill)
	return a
}

func (a *actor) kill() {
	a.command.Process.Kill()
	a.command.Wait()
}

func (a *actor) send(o order) {
	a.Helper()
	line, err := json.Marshal(o)
	if err != nil {
		a.Fatal(err)
	}
	if _, err := a.in.Write(append(line, '\n')); err != nil {
		a.Fatal(err)
	}
}

func (a *actor) receive() answer {
	a.Helper()
	received := make(chan answer, 1)
	go func() {
		line, err := a.out.ReadBytes('\n')
		var reply answer
		if err == nil {
			err = json.Unmarshal(line, &reply)
		}
		if err != nil {
			reply.Error = fmt.Sprintf("%v: %q", err, line)
		}
		received <- reply
	}()
	select {
	case reply := <-received:
		return reply
	case <-time.After(2 * patience):
		a.Fatal("the actor does not answer")
		return answer{}
	}
}

func (a *actor) tell(o order) answer {
	a.Helper()
	a.send(o)
	reply := a.receive()
	if reply.Error != "" {
		a.Fatalf("%s %s: %s (%q)", o.Do, o.Name, reply.Error, reply.Text)
	}
	return reply
}

func (a *actor) do(what, name string) answer { a.Helper(); return a.tell(order{Do: what, Name: name}) }

func (a *actor) start(name string, c workload.Container, command workload.Command) int {
	a.Helper()
	return a.tell(order{Do: "start", Name: name, Container: &c, Command: command}).Number
}

func (a *actor) write(name, text string) {
	a.Helper()
	a.tell(order{Do: "write", Name: name, Text: text})
}
func (a *actor) read(name, until string) string {
	a.Helper()
	return a.tell(order{Do: "read", Name: name, Text: until}).Text
}

func (a *actor) exit(name string, code int) {
	a.Helper()
	if got := a.do("wait", name).Number; got != code {
		a.Errorf("%s ended with %d, not %d", name, got, code)
	}
}

// handOver hands over. At each gate it calls the function for that gate, if there is one.
func (a *actor) handOver(o order, at map[string]func()) {
	a.Helper()
	if o.Do == "" {
		o.Do = "hand over"
	}
	o.Gates = at != nil
	a.send(o)
	for {
		reply := a.receive()
		if reply.Error != "" {
			a.Fatalf("hand over: %s", reply.Error)
		}
		if reply.Text == "resumed" {
			if stat := mustStat(a, a.command.Process.Pid); uint64(reply.Number) != stat.Start { //nolint:gosec // a start time
				a.Errorf("the start time was %d before and is %d", reply.Number, stat.Start)
			}
			return
		}
		if f := at[reply.Text]; f != nil {
			f()
		}
		a.send(order{})
	}
}

// leaves checks that the actor has no more than before, and that its state directory is empty.
func (a *actor) leaves(before [3]int) {
	a.Helper()
	var now [3]int
	deadline := time.Now().Add(patience)
	for {
		now = a.do("resources", "").Counts
		entries, err := os.ReadDir(a.dir)
		if now[0] <= before[0] && now[1] <= before[1] && now[2] <= before[2] && err == nil && len(entries) == 0 {
			return
		}
		if time.Now().After(deadline) {
			fds, _ := exec.Command("ls", "-l", fmt.Sprintf("/proc/%d/fd", a.command.Process.Pid)).Output()
			a.Fatalf("goroutines, descriptors, children: %v, before %v; files: %v\n%s", now, before, entries, fds)
		}
		time.Sleep(20 * time.Millisecond)
	}
}

func countResources() ([3]int, error) {
	fds, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		return [3]int{}, err
	}
	children, err := proc.OwnChildren(nil)
	return [3]int{runtime.NumGoroutine(), len(fds), len(children)}, err
}
