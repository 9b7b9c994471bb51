// Package ociruntime starts a process in a container by running the container's OCI runtime, and interprets its
// failures.
package ociruntime

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"

	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/streamshim/streamshim/pkg/execproc/internal/proc"
	"github.com/streamshim/streamshim/pkg/execproc/internal/stdio"
	"github.com/streamshim/streamshim/pkg/execproc/internal/tree"
	"github.com/streamshim/streamshim/pkg/rescue"
	"github.com/streamshim/streamshim/pkg/workload"
)

const (
	// maxRuntimeLog is how many bytes from the end of a runtime's log are searched for its reason.
	maxRuntimeLog = 64 << 10
	// maxRuntimeStderr is how many bytes of a runtime's stderr are read if its log says nothing.
	maxRuntimeStderr = 8 << 10
)

// RecordEnding is the file name ending of recovery records.
const RecordEnding = ".record"

// Files holds the paths of one start's files, all in the state directory.
type Files struct{ Process, Pid, log, Socket, Record string }

// FilesOf returns the paths of a start's files. base is their common beginning.
func FilesOf(base string) Files {
	return Files{
		Process: base + ".process", Pid: base + ".pid", log: base + ".log",
		Socket: base + ".sock", Record: base + RecordEnding,
	}
}

// RemoveStart removes the files that only the start needs.
func (f Files) RemoveStart() {
	os.Remove(f.Process)
	os.Remove(f.Pid)
	os.Remove(UnfinishedFile(f.Pid)) // from a runc killed while writing it
	os.Remove(f.log)
}

// UnfinishedFile returns the path of a file while it is being written. runc's pid file and our records follow it.
func UnfinishedFile(path string) string {
	return filepath.Join(filepath.Dir(path), "."+filepath.Base(path))
}

// passedEnvironment lists the only variables that the runtime gets from our environment. LISTEN_FDS in particular
// must stay out: runc would pass those descriptors on to the container.
var passedEnvironment = []string{"PATH", "HOME", "XDG_RUNTIME_DIR", "DBUS_SESSION_BUS_ADDRESS", "TMPDIR"}

// RuntimeEnvironment returns the OCI runtime's environment.
func RuntimeEnvironment() []string {
	// One thread is enough for runc. With one per CPU an exec takes a twentieth more CPU time and is no faster.
	// This does not reach the command, whose environment runc builds anew.
	env := []string{"GOMAXPROCS=1"}
	for _, name := range passedEnvironment {
		if value, set := os.LookupEnv(name); set {
			env = append(env, name+"="+value)
		} else if name == "PATH" {
			env = append(env, "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin")
		}
	}
	return env
}

// ErrProcessUnknown is wrapped by the error of a start after which something may run that we cannot identify.
var ErrProcessUnknown = errors.New("the OCI runtime said it started the command")

// Exec runs `RUNTIME exec --detach` and returns the process's pid. The process is then our child, because the
// runtime has ended and this process is a subreaper. The streams are the process's, or with a terminal the
// runtime's own. stderr, if not nil, is the other side of the third stream, and may hold the reason for a failure.
//
// If ctx is done, or a process in the container stops one that is entering it, the runtime is killed with
// everything that it has started.
func Exec(ctx context.Context, c workload.Container, spec *specs.Process, f Files, streams [3]*os.File, stderr *os.File) (int, error) {
	return ExecPassing(ctx, c, spec, f, streams, stderr, nil)
}

// ExecPassing is Exec, but the process inherits the passed file, if not nil, as descriptor 3.
func ExecPassing(ctx context.Context, c workload.Container, spec *specs.Process, f Files, streams [3]*os.File, stderr, passed *os.File) (int, error) {
	encoded, err := json.Marshal(spec)
	if err != nil {
		return 0, fmt.Errorf("encode process spec: %w", err)
	}
	if err := os.WriteFile(f.Process, encoded, 0o600); err != nil {
		return 0, fmt.Errorf("write process spec: %w", err)
	}
	binary, err := exec.LookPath(c.Runtime)
	if err != nil {
		return 0, fmt.Errorf("find the container's OCI runtime: %w (is it installed, and in $PATH or configured with its full path?)", err)
	}
	var args []string
	if c.Root != "" {
		args = append(args, "--root", c.Root)
	}
	args = append(args, "--log", f.log, "--log-format", "json",
		"exec", "--process", f.Process, "--detach", "--pid-file", f.Pid)
	if spec.Terminal {
		args = append(args, "--console-socket", f.Socket)
	}
	if passed != nil {
		args = append(args, "--preserve-fds", "1")
	}
	args = append(args, c.ContainerID)

	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	command := exec.CommandContext(ctx, binary, args...)
	command.Env = RuntimeEnvironment()
	command.Dir = "/"
	// Pass files, so that os/exec starts no copying goroutines and Wait waits only for the runtime.
	command.Stdin, command.Stdout, command.Stderr = streams[0], streams[1], streams[2]
	if passed != nil {
		command.ExtraFiles = []*os.File{passed}
	}
	// The session tells the reaper the runtime's orphans from os/exec's children.
	command.SysProcAttr = &unix.SysProcAttr{Setsid: true}
	var runtime proc.Identity
	known := make(chan struct{})
	command.Cancel = func() (err error) { // called by a goroutine of os/exec
		<-known
		rescue.Call(func(fault *rescue.Panic) { err = fault }, func() { tree.New(runtime, 0, tree.StreamEnds{}).Kill() })
		return errors.Join(err, command.Process.Kill()) // in case /proc could not be read
	}
	score := containerOOMScoreAdj(spec, c.InitPid)
	if err := command.Start(); err != nil {
		if ctx.Err() != nil {
			return 0, context.Cause(ctx)
		}
		return 0, fmt.Errorf("run the OCI runtime: %w", err)
	}
	// The pid belongs to the runtime until Wait below.
	giveOOMScoreAdj(command.Process.Pid, score)
	if stat, err := proc.ReadStat(command.Process.Pid); err == nil {
		runtime = stat.Identity
	} else {
		runtime = proc.Identity{Pid: command.Process.Pid}
	}
	close(known)
	looking, stopLooking := context.WithCancel(ctx)
	looked := make(chan struct{})
	rescue.Go(rescue.Die, func() {
		defer close(looked)
		rescue.Call(func(fault *rescue.Panic) { cancel(fault) }, func() {
			endIfStopped(looking, runtime.Pid, func() { cancel(ErrStopped) })
		})
	})
	runErr := command.Wait()
	stopLooking()
	<-looked
	pid, pidErr := ReadPidFile(f.Pid)
	if runErr == nil && ctx.Err() == nil {
		if pidErr != nil {
			return 0, fmt.Errorf("%w, but gave no pid: %w", ErrProcessUnknown, pidErr)
		}
		giveOOMScoreAdj(pid, score) // the runtime may have been too quick for us
		return pid, nil
	}
	// It may have got as far as starting the process.
	if pidErr == nil {
		if stat, err := proc.ReadStat(pid); err == nil && stat.Parent == os.Getpid() && stat.Start >= runtime.Start {
			tree.New(stat.Identity, c.InitPid, tree.StreamEnds{}).Kill()
		}
	}
	if ctx.Err() != nil {
		return 0, context.Cause(ctx)
	}
	var exit *exec.ExitError
	if !errors.As(runErr, &exit) {
		return 0, fmt.Errorf("wait for the OCI runtime: %w", runErr)
	}
	reason := lastError(readTail(f.log, maxRuntimeLog))
	if reason == "" && stderr != nil {
		reason = stdio.ReadPending(stderr, maxRuntimeStderr)
	}
	if reason == "" {
		reason = exit.Error() + " without a word"
	}
	return 0, classify(reason)
}

// ReadPidFile reads a pid file that the runtime wrote.
func ReadPidFile(path string) (int, error) {
	data, err := os.ReadFile(path)
	if err != nil {
		return 0, err
	}
	return parsePid(data)
}

func parsePid(data []byte) (int, error) {
	pid, err := strconv.Atoi(string(bytes.TrimSpace(data)))
	if err != nil || pid <= 1 {
		return 0, fmt.Errorf("the pid file does not hold a pid (%d bytes)", len(data))
	}
	return pid, nil
}

// readTail returns the last limit bytes of a file, or nothing if it cannot be read.
func readTail(path string, limit int64) []byte {
	file, err := os.Open(path)
	if err != nil {
		return nil
	}
	defer file.Close()
	if size, err := file.Seek(0, io.SeekEnd); err != nil || size <= limit {
		_, err = file.Seek(0, io.SeekStart)
		if err != nil {
			return nil
		}
	} else if _, err := file.Seek(-limit, io.SeekEnd); err != nil {
		return nil
	}
	data, _ := io.ReadAll(io.LimitReader(file, limit))
	return data
}
