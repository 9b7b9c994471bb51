package enter

import (
	"context"
	"encoding/binary"
	"errors"
	"io"
	"os"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// The layout of a request, word by word, as program/enter.c has it.
func TestEncode(t *testing.T) {
	score, umask := -5, uint32(0o27)
	r := Request{
		Namespaces: unix.CLONE_NEWNS, Cgroups: []string{"/c/tasks"}, OOMScoreAdj: &score,
		Limits: []Limit{{Resource: 7, Soft: 1, Hard: 1<<64 - 1}}, SessionKeyring: "_ses", NoNewPrivileges: true, Umask: &umask,
		Filters:   []Filter{{Flags: 4, Instructions: []byte("12345678ABCDEFGH")}},
		Directory: "/d", UID: 1000, GID: 2000, Groups: []uint32{1, 2, 3},
		Capabilities: &Capabilities{Bounding: 1, Effective: 2, Permitted: 3, Inheritable: 4, Ambient: 5, Last: 40},
		AppArmor:     "p", Args: []string{"a", ""}, Env: []string{"E=1"}, FindHome: true,
	}
	b, err := r.encode(true, true)
	if err != nil {
		t.Fatal(err)
	}
	total := len(b)
	word := func(what string, want uint32) {
		t.Helper()
		if got := binary.NativeEndian.Uint32(b); got != want {
			t.Errorf("%s is %#x, want %#x", what, got, want)
		}
		b = b[4:]
	}
	long := func(what string, want uint64) {
		t.Helper()
		if got := binary.NativeEndian.Uint64(b); got != want {
			t.Errorf("%s is %#x, want %#x", what, got, want)
		}
		b = b[8:]
	}
	word("magic", magic)
	word("version", 1)
	word("size", uint32(total))
	word("flags", 0xff)
	word("namespaces", 0x20000)
	word("uid", 1000)
	word("gid", 2000)
	word("umask", 0o27)
	word("oom score", 0xfffffffb)
	word("last capability", 40)
	for i, set := range []string{"bounding", "effective", "permitted", "inheritable", "ambient"} {
		long(set, uint64(i+1))
	}
	for i, count := range []string{"limits", "filters", "groups", "cgroups", "args", "env"} {
		word(count, []uint32{1, 1, 3, 1, 2, 1}[i])
	}
	word("limit's resource", 7)
	word("nothing", 0)
	long("soft limit", 1)
	long("hard limit", 1<<64-1)
	word("filter's flags", 4)
	word("filter's length", 2)
	if string(b[:16]) != "12345678ABCDEFGH" {
		t.Errorf("filter is %q", b[:16])
	}
	b = b[16:]
	for i := range uint32(3) {
		word("group", i+1)
	}
	word("padding", 0)
	if want := "/d\x00_ses\x00p\x00/c/tasks\x00a\x00\x00E=1\x00"; string(b) != want {
		t.Errorf("strings are %q, want %q", b, want)
	}
}

func TestEncodeRefuses(t *testing.T) {
	for name, r := range map[string]Request{
		"no command": {},
		"NUL":        {Args: []string{"a\x00b"}},
		"filter":     {Args: []string{"a"}, Filters: []Filter{{Instructions: []byte("1234567")}}},
	} {
		if _, err := r.encode(false, false); err == nil {
			t.Errorf("%s: no error", name)
		}
	}
}

func TestParseRecords(t *testing.T) {
	record := func(kind uint32, value int32, step string) string {
		b := binary.NativeEndian.AppendUint32(binary.NativeEndian.AppendUint32(nil, kind), uint32(value))
		return string(append(append(b, step...), make([]byte, recordSize-8-len(step))...))
	}
	for _, test := range []struct {
		name, records string
		pid           int
		failed        string
	}{
		{"nothing", "", 0, ""},
		{"started", record(1, 77, ""), 77, ""},
		{"failed", record(2, int32(syscall.ENOENT), "execute command"), 0, "execute command: no such file"},
		{"both", record(1, 77, "") + record(2, 1, "set uid"), 77, "set uid: operation not permitted"},
		{"the other way round", record(2, 1, "set uid") + record(1, 77, ""), 77, "set uid"},
		{"half", record(1, 77, "")[:20], 0, ""},
		{"nonsense", record(9, 0, ""), 0, "means nothing"},
	} {
		pid, failed := parseRecords([]byte(test.records))
		if pid != test.pid || (failed == nil) != (test.failed == "") || (failed != nil && !strings.Contains(failed.Error(), test.failed)) {
			t.Errorf("%s: %d, %v", test.name, pid, failed)
		}
	}
}

func FuzzParseRecords(f *testing.F) {
	f.Add([]byte("\x01\x00\x00\x00\x4d\x00\x00\x00"))
	f.Fuzz(func(_ *testing.T, b []byte) { parseRecords(b) }) //nolint:errcheck // it must not panic
}

func load(t *testing.T) *Program {
	t.Helper()
	program, err := Load()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { program.Close() })
	return program
}

// self is a pidfd of this process: with no namespace to be joined, any process does for a container.
func self(t *testing.T) int {
	t.Helper()
	pidfd, err := unix.PidfdOpen(os.Getpid(), 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Close(pidfd) })
	return pidfd
}

func null(t *testing.T) *os.File {
	t.Helper()
	file, err := os.OpenFile(os.DevNull, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { file.Close() })
	return file
}

func reap(t *testing.T, pid int) syscall.WaitStatus {
	t.Helper()
	var status syscall.WaitStatus
	if _, err := syscall.Wait4(pid, &status, 0, nil); err != nil {
		t.Fatal(err)
	}
	return status
}

// The program cannot be written to once it is loaded.
func TestProgramIsSealed(t *testing.T) {
	program := load(t)
	if _, err := program.File().WriteAt([]byte("x"), 0); !errors.Is(err, unix.EPERM) {
		t.Errorf("write: %v", err)
	}
	if err := program.File().Truncate(0); !errors.Is(err, unix.EPERM) {
		t.Errorf("truncate: %v", err)
	}
}

// A command is a child of this process, with the streams it was given and nothing else open.
func TestRun(t *testing.T) {
	program, container := load(t), self(t)
	read, write, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer read.Close()
	request := Request{Directory: "/tmp", Args: []string{"sh", "-c", "echo $0 $A; pwd; ls /proc/self/fd; exit 5", "name"}, Env: []string{"PATH=/bin:/usr/bin", "A=b"}}
	pid, err := program.Run(context.Background(), &request, Options{Container: container, Streams: [3]*os.File{null(t), write, write}})
	write.Close()
	if err != nil {
		t.Fatal(err)
	}
	output, _ := io.ReadAll(read)
	if status := reap(t, pid); status.ExitStatus() != 5 {
		t.Errorf("status %v", status)
	}
	if want := "name b\n/tmp\n0\n1\n2\n3\n"; string(output) != want { // 3 is the folder that ls reads
		t.Errorf("%q, want %q", output, want)
	}
}

func TestRunFails(t *testing.T) {
	program, container := load(t), self(t)
	for name, test := range map[string]struct {
		change    func(*Request)
		want      string
		ofCommand bool
	}{
		"not found":         {func(r *Request) { r.Args = []string{"no-such-command"} }, "search command: no such file", true},
		"no PATH":           {func(r *Request) { r.Env = nil }, "search command", true},
		"relative PATH":     {func(r *Request) { r.Env = []string{"PATH=bin"} }, "search command: invalid argument", true},
		"no such file":      {func(r *Request) { r.Args = []string{"/no/such"} }, "execute command: no such file", true},
		"directory":         {func(r *Request) { r.Args = []string{"/tmp"} }, "execute command: permission denied", true},
		"working directory": {func(r *Request) { r.Directory = "/no/such" }, "change directory: no such file", true},
		"cgroup":            {func(r *Request) { r.Cgroups = []string{"/no/such/tasks"} }, "join cgroup: no such file", false},
		"limit":             {func(r *Request) { r.Limits = []Limit{{Resource: 99}} }, "set limit: invalid argument", false},
		"filter":            {func(r *Request) { r.Filters = []Filter{{Instructions: make([]byte, 8)}} }, "install seccomp filter", false},
		"namespace":         {func(r *Request) { r.Namespaces = unix.CLONE_NEWUSER }, "join user namespace", false},
		"NUL":               {func(r *Request) { r.Args = []string{"a\x00"} }, "NUL", false},
	} {
		t.Run(name, func(t *testing.T) {
			request := Request{Directory: "/", Args: []string{"true"}, Env: []string{"PATH=/bin"}}
			test.change(&request)
			_, err := program.Run(context.Background(), &request, Options{Container: container, Streams: [3]*os.File{null(t), null(t), null(t)}})
			if !errors.Is(err, ErrNotStarted) || !strings.Contains(err.Error(), test.want) {
				t.Errorf("%v, want %q", err, test.want)
			}
			var step *StepError
			if got := errors.As(err, &step) && step.OfCommand(); got != test.ofCommand {
				t.Errorf("%v: of the command: %v", err, got)
			}
			for { // what did not become the command
				if pid, _ := syscall.Wait4(-1, nil, 0, nil); pid <= 0 {
					break
				}
			}
		})
	}
}

// A start that is cancelled before it begins, or in the middle, starts nothing.
func TestRunCancelled(t *testing.T) {
	program, container := load(t), self(t)
	ctx, cancel := context.WithCancelCause(context.Background())
	cancel(errors.New("enough"))
	request := Request{Directory: "/", Args: []string{"true"}, Env: []string{"PATH=/bin"}}
	pid, err := program.Run(ctx, &request, Options{Container: container, Streams: [3]*os.File{null(t), null(t), null(t)}, Cancel: func(int) {}})
	if err == nil || pid != 0 {
		t.Errorf("%d, %v", pid, err)
	}
	// A cgroup's file that blocks whoever opens it: a FIFO without a reader.
	fifo := t.TempDir() + "/tasks"
	if err := unix.Mkfifo(fifo, 0o600); err != nil {
		t.Fatal(err)
	}
	request.Cgroups = []string{fifo}
	limited, stop := context.WithTimeoutCause(context.Background(), 50*time.Millisecond, errors.New("too long"))
	defer stop()
	pid, err = program.Run(limited, &request, Options{Container: container, Streams: [3]*os.File{null(t), null(t), null(t)}, Cancel: func(pid int) { syscall.Kill(pid, syscall.SIGKILL) }})
	if err == nil || err.Error() != "too long" || pid == 0 {
		t.Fatalf("%d, %v", pid, err)
	}
	syscall.Kill(pid, syscall.SIGKILL)
	if status := reap(t, pid); status.Signal() != syscall.SIGKILL {
		t.Errorf("status %v", status)
	}
}
