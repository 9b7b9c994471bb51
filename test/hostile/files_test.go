package hostile

import (
	"context"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/streamshim/streamshim/pkg/workload"
)

// A container's own files are anything at all.

// replace puts something else in place of a file of the container.
func replace(t testing.TB, c *container, name string, with func(path string) error) {
	t.Helper()
	path := filepath.Join(c.rootfs, name)
	if err := os.RemoveAll(path); err != nil {
		t.Fatal(err)
	}
	if err := with(path); err != nil {
		t.Fatal(err)
	}
}

var strangeFiles = map[string]func(path string) error{
	"FIFO":   func(path string) error { return unix.Mkfifo(path, 0o666) },
	"device": func(path string) error { return unix.Mknod(path, unix.S_IFCHR|0o666, int(unix.Mkdev(1, 5))) }, // zero
	"huge": func(path string) error {
		return os.WriteFile(path, nil, 0o644)
	},
	"link loop":       func(path string) error { return os.Symlink(filepath.Base(path), path) },
	"descriptor link": func(path string) error { return os.Symlink("/proc/self/fd/3", path) },
	"terminal":        func(path string) error { return os.Symlink("/dev/tty", path) },
	"directory":       func(path string) error { return os.Mkdir(path, 0o755) },
	"missing":         func(string) error { return nil },
}

func init() {
	strangeFiles["huge"] = func(path string) error {
		file, err := os.Create(path)
		if err != nil {
			return err
		}
		defer file.Close()
		return file.Truncate(1 << 40) // without a single line end
	}
}

// The user's home and groups stand in files of the container. Whatever they are, there is an answer in time, and
// what does not concern them goes on.
func TestUserDatabases(t *testing.T) {
	c := newContainer(t)
	for name, make := range strangeFiles {
		for _, file := range []string{"etc/passwd", "etc/group"} {
			replace(t, c, file, make)
			for _, e := range engines(t) {
				var o outcomes
				o.try(t, e, c)
				note(row{attack: file + ": " + name, configuration: "default", entrance: e.name, commands: 1, failed: o.failed})
			}
			replace(t, c, file, func(path string) error { return os.WriteFile(path, []byte("root:x:0:0:root:/:/\n"), 0o644) })
		}
	}
	for _, e := range engines(t) {
		recovers(t, e, c)
	}
	// The test would see it: a launcher that opens the file does not answer.
	replace(t, c, "etc/passwd", strangeFiles["FIFO"])
	ctx, cancel := context.WithTimeout(context.Background(), 500*time.Millisecond)
	defer cancel()
	if output, err := wrong(t, "reads-passwd").enter(ctx, c, "/victim", hostFile); err == nil {
		t.Errorf("a launcher that opens a FIFO answers: %q", output)
	}
}

// descriptors are those that a launcher may have open.
func descriptors() []int {
	var all []int
	for n := 3; n < 20; n++ {
		all = append(all, n)
	}
	return all
}

// enterThroughDescriptors starts commands whose working directory, or whose program, is reached through a descriptor
// (CVE-2024-21626), and returns how often that led to the host.
func enterThroughDescriptors(t testing.TB, e *entrance, c *container) (escapes int) {
	t.Helper()
	program := filepath.Join(base, "victim") // on the host, which no container has
	if err := os.Link(attackerProgram, program); err != nil && !os.IsExist(err) {
		t.Fatal(err)
	}
	for _, n := range descriptors() {
		descriptor := fmt.Sprintf("/proc/self/fd/%d", n)
		for _, link := range []string{descriptor, descriptor + "/..", descriptor + "/../../../.."} {
			replace(t, c, "work", func(path string) error { return os.Symlink(link, path) })
			if output, err := e.enter(context.Background(), c, "/victim", hostFile); err == nil {
				if s, err := parseState(output); err != nil || s["host"] != "0" || !strings.HasPrefix(s["cwd"], "/") {
					escapes++
				}
			}
			replace(t, c, "work", func(path string) error { return os.Mkdir(path, 0o755) })
		}
		if output, err := e.enter(context.Background(), c, descriptor+program, hostFile); err == nil {
			t.Logf("%s: a program of the host ran: %s", e.name, output)
			escapes++
		}
	}
	return escapes
}

func TestPathsThroughDescriptors(t *testing.T) {
	inWork := func(s *specs.Spec) { s.Process.Cwd = "/work" }
	c := newContainer(t, inWork)
	for _, e := range entrances(t) {
		escapes := enterThroughDescriptors(t, e, c)
		r := row{attack: "paths through descriptors", configuration: "default", entrance: e.name, commands: 4 * len(descriptors())}
		if escapes > 0 {
			r.gained = map[string]int{"the host's files": escapes}
			t.Errorf("%s: the host was reached %d times", e.name, escapes)
		}
		note(r)
	}
	if enterThroughDescriptors(t, wrong(t, "descriptor"), c) == 0 {
		t.Error("a launcher that keeps a descriptor of the host does not lead there")
	}
}

// Nothing is written to the container's /proc, where it may be a file of its choice (CVE-2025-52881).
func TestCoveredProc(t *testing.T) {
	c := newContainer(t, withCapability("CAP_SYS_ADMIN"))
	if _, err := reference().enter(context.Background(), c, "/attacker", "cover", "proc"); err != nil {
		t.Fatal(err)
	}
	written := func() (files []string) {
		proc := fmt.Sprintf("/proc/%d/root/proc", c.InitPid)
		err := filepath.Walk(proc, func(path string, info os.FileInfo, err error) error {
			if err == nil && info.Mode().IsRegular() && info.Size() > 0 && info.Name() != "cap_last_cap" {
				files = append(files, strings.TrimPrefix(path, proc))
			}
			return err
		})
		if err != nil {
			t.Fatal(err)
		}
		return files
	}
	for _, e := range entrances(t) {
		output, err := e.enter(context.Background(), c, "/victim", hostFile)
		if s, stateErr := parseState(output); err == nil && (stateErr != nil || s["eff"] != fmt.Sprintf("%016x", capabilityMask(t, c))) {
			t.Errorf("%s: %q", e.name, output)
		}
		r := row{attack: "covered /proc", configuration: "CAP_SYS_ADMIN", entrance: e.name, commands: 1}
		if err != nil {
			r.failed = 1
			t.Logf("%s: %v", e.name, err)
		}
		if files := written(); len(files) > 0 {
			t.Errorf("%s wrote to files of the container: %q", e.name, files)
			r.gained = map[string]int{"written to": 1}
		}
		note(r)
	}
	if output, err := wrong(t, "attributes").enter(context.Background(), c, "/victim", hostFile); err != nil || len(written()) == 0 {
		t.Errorf("a launcher that writes to the container's /proc is not seen: %q, %v", output, err)
	}
}

// A terminal is a terminal, whatever stands where the container's terminals are made (CVE-2025-52565).
// (CVE-2025-31133 is about paths that are masked, which exec does not do.)
func TestTerminals(t *testing.T) {
	for _, cover := range []string{"ptmx-fifo", "ptmx-file", "pts"} {
		change := func(*specs.Spec) {}
		if cover == "pts" {
			change = withCapability("CAP_SYS_ADMIN")
		}
		c := newContainer(t, change)
		if _, err := reference().enter(context.Background(), c, "/attacker", "cover", cover); err != nil {
			t.Fatal(err)
		}
		for _, e := range engines(t) {
			s, err := withTerminal(t, e, c)
			r := row{attack: "terminals: " + cover, configuration: "default", entrance: e.name, commands: 1}
			if err != nil {
				t.Logf("%s, %s: %v", cover, e.name, err)
				r.failed = 1
			} else if s["tty"] != "1" {
				t.Errorf("%s, %s: the command has no terminal: %v", cover, e.name, s)
			}
			note(r)
		}
		ctx, cancel := context.WithTimeout(context.Background(), time.Second)
		output, err := wrong(t, "terminal").enter(ctx, c, "/victim", hostFile)
		cancel()
		if s, stateErr := parseState(output); err == nil && (stateErr != nil || s["tty"] == "1") {
			t.Errorf("%s: a launcher that believes the container has a terminal: %q", cover, output)
		}
	}
}

// withTerminal starts a victim with a terminal.
func withTerminal(t testing.TB, e *entrance, c *container) (state, error) {
	t.Helper()
	began := time.Now()
	defer func() {
		if took := time.Since(began); took > answerTime+patience/4 {
			t.Errorf("%s: the answer took %v", e.name, took)
		}
	}()
	p, err := e.runner.Start(context.Background(), c.Container, workload.Command{Args: []string{"/victim", hostFile}, Stdout: true, TTY: true})
	if err != nil {
		return nil, err
	}
	defer p.Close()
	timer := time.AfterFunc(answerTime, p.Kill)
	defer timer.Stop()
	output, err := io.ReadAll(io.LimitReader(p.Stdout(), 1<<16))
	if err != nil {
		return nil, err
	}
	<-p.Exited()
	return parseState(string(output))
}
