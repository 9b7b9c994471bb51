package handover

import (
	"context"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/streamshim/streamshim/internal/testutil/leak"
)

// childVariable has the test binary be a new program, of the kind that it names.
const childVariable = "HANDOVER_TEST_CHILD"

func TestMain(m *testing.M) {
	switch kind := os.Getenv(childVariable); kind {
	case "":
		os.Exit(m.Run())
	case "exec":
		os.Exit(executes())
	default:
		os.Unsetenv(childVariable)
		child(kind)
	}
}

// child is the side of a check that the new program has.
func child(kind string) {
	fail := func(at string) {
		switch kind {
		case "exit " + at:
			os.Exit(0)
		case "panic " + at:
			panic("at " + at)
		case "hang " + at:
			time.Sleep(time.Hour)
		}
	}
	fail("begin")
	err := AnswerCheck("next", func() error {
		fail("start")
		if kind == "refuse start" {
			return errors.New("a wrong setting")
		}
		return nil
	}, func(s *State) Verdict {
		fail("read")
		if kind == "refuse read" {
			return Verdict{Error: "a strange state"}
		}
		return Verdict{Carried: len(s.Parts), Ended: []string{"one"}}
	})
	if err != nil {
		os.Exit(1)
	}
	os.Exit(0)
}

func startChild(t *testing.T, ctx context.Context, kind string) (*Check, error) {
	t.Helper()
	t.Setenv(childVariable, kind)
	return StartCheck(ctx, os.Args[0], nil)
}

func TestCheck(t *testing.T) {
	leak.Check(t)
	c, err := startChild(t, t.Context(), "good")
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if c.Program != "next" {
		t.Errorf("program %q", c.Program)
	}
	state := NewState("this")
	if err := state.Put("part", 7); err != nil {
		t.Fatal(err)
	}
	verdict, size, err := c.Read(t.Context(), state)
	if err != nil || verdict.Carried != 1 || len(verdict.Ended) != 1 || size == 0 {
		t.Errorf("%+v, %d bytes, %v", verdict, size, err)
	}
}

// A program that goes wrong is told from one that is good, wherever it does so, and nothing is left of it.
func TestCheckOfFaultyPrograms(t *testing.T) {
	for kind, want := range map[string]string{
		"exit begin": "it has ended", "panic begin": "panic: at begin", "hang begin": "too long",
		"exit start": "it has ended", "panic start": "panic: at start", "hang start": "too long", "refuse start": "a wrong setting",
		"exit read": "it has ended", "panic read": "panic: at read", "hang read": "too long", "refuse read": "a strange state",
	} {
		t.Run(strings.ReplaceAll(kind, " ", "-"), func(t *testing.T) {
			leak.Check(t)
			ctx := t.Context()
			limit := func() (context.Context, context.CancelFunc) {
				return context.WithTimeoutCause(ctx, 2*time.Second, errors.New("too long"))
			}
			if !strings.HasPrefix(kind, "hang") {
				limit = func() (context.Context, context.CancelFunc) { return ctx, func() {} }
			}
			starting, cancel := limit()
			defer cancel()
			if strings.HasSuffix(kind, "read") {
				starting = ctx
			}
			c, err := startChild(t, starting, kind)
			if err == nil {
				defer c.Close()
				reading, cancel := limit()
				defer cancel()
				_, _, err = c.Read(reading, NewState("this"))
			}
			if err == nil || !strings.Contains(err.Error(), want) {
				t.Errorf("%v; want %q", err, want)
			}
		})
	}
}

func TestCheckOfNoProgram(t *testing.T) {
	leak.Check(t)
	path := filepath.Join(t.TempDir(), "program")
	if _, err := StartCheck(t.Context(), path, nil); err == nil {
		t.Error("a program that is not there was started")
	}
	os.WriteFile(path, []byte("no program"), 0o755)
	if _, err := StartCheck(t.Context(), path, nil); err == nil || !strings.Contains(err.Error(), "exec format error") {
		t.Errorf("a file that is no program: %v", err)
	}
}

// executes is a program that executes itself with a file and a state, and, the second time, tells what it has got.
func executes() int {
	state, files, err := Received()
	if err != nil {
		return 2
	}
	if state == nil {
		read, write, err := os.Pipe()
		if err != nil {
			return 3
		}
		write.WriteString("carried")
		write.Close()
		files := NewFiles()
		kept, err := files.Keep(read)
		if err != nil {
			return 4
		}
		os.Setenv(childVariable, "good")
		c, err := StartCheck(context.Background(), os.Args[0], nil)
		os.Setenv(childVariable, "exec")
		if err != nil {
			return 5
		}
		state := NewState("first")
		state.Put("pipe", kept)
		state.Descriptors = files.Descriptors()
		if _, _, err := c.Read(context.Background(), state); err != nil {
			return 6
		}
		c.Exec(files)
		return 7
	}
	var kept Descriptor
	if err := state.Get("pipe", &kept); err != nil || state.Program != "first" || state.Size == 0 || os.Getenv(variable) != "" {
		return 8
	}
	file, err := files.Take(kept, "pipe")
	if err != nil {
		return 9
	}
	text := make([]byte, 32)
	n, _ := file.Read(text)
	os.Stdout.Write(text[:n])
	return 0
}

// The state and its files, and nothing else, are there after execve, in the same process.
func TestExec(t *testing.T) {
	command := exec.Command(os.Args[0])
	command.Env = append(os.Environ(), childVariable+"=exec")
	out, err := command.CombinedOutput()
	if err != nil || string(out) != "carried" {
		t.Errorf("%v: %q", err, out)
	}
}

// A state that is damaged, of another version, or not sealed, is an error.
func TestStatesThatCannotBeRead(t *testing.T) {
	good, err := Encode(NewState("this"))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := parseState(good); err != nil {
		t.Error(err)
	}
	later := NewState("this")
	later.Version++
	wrong, err := Encode(later)
	if err != nil {
		t.Fatal(err)
	}
	for name, data := range map[string][]byte{"empty": nil, "cut": good[:len(good)-1], "of another version": wrong, "text": []byte("x")} {
		if _, err := parseState(data); err == nil {
			t.Errorf("%s: it was read", name)
		}
	}
	memory, err := newMemory()
	if err != nil {
		t.Fatal(err)
	}
	defer memory.Close()
	memory.Write(good)
	if _, err := readState(memory); err == nil || !strings.Contains(err.Error(), "not sealed") {
		t.Errorf("a state that may change: %v", err)
	}
	memory.Truncate(0)
	memory.Seek(0, 0)
	if err := writeState(memory, good); err != nil {
		t.Fatal(err)
	}
	if data, err := readState(memory); err != nil || string(data) != string(good) {
		t.Errorf("%q, %v", data, err)
	}
	if _, err := memory.WriteAt([]byte("x"), 0); err == nil {
		t.Error("a sealed state was changed")
	}
	t.Setenv(variable, "nonsense")
	if _, _, err := Received(); err == nil {
		t.Error("nonsense was received")
	}
	if state, files, err := Received(); state != nil || files != nil || err != nil {
		t.Errorf("the variable stays: %v, %v, %v", state, files, err)
	}
}

func TestSameProgram(t *testing.T) {
	text, err := os.ReadFile(os.Args[0])
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	put := func(name string, text []byte) string {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, text, 0o755); err != nil {
			t.Fatal(err)
		}
		return path
	}
	if same, err := IsRunning(os.Args[0]); !same || err != nil {
		t.Errorf("itself: %v, %v", same, err)
	}
	if same, err := IsRunning(put("copy", text)); !same || err != nil {
		t.Errorf("a copy: %v, %v", same, err)
	}
	if same, err := IsRunning(put("other", append(text, 0))); same || err != nil {
		t.Errorf("another: %v, %v", same, err)
	}
	if same, err := IsRunning(filepath.Join(dir, "none")); same || err == nil {
		t.Errorf("none: %v, %v", same, err)
	}
	if same, err := IsRunning(put("script", make([]byte, len(text)))); same || err == nil {
		t.Errorf("a file of the same size that is no program: %v, %v", same, err)
	}
}
