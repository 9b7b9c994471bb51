package upgrade

import (
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/streamshim/streamshim/internal/testutil"
	"github.com/streamshim/streamshim/test/internal/harness"
	"github.com/streamshim/streamshim/test/internal/node"
)

// TestProgramsThatCannotTakeOver checks that the old program keeps serving, and says why, if the new one fails at any step
// before it takes over. Sessions notice a pause at most.
func TestProgramsThatCannotTakeOver(t *testing.T) {
	good, faulty := build(t, "first"), build(t, "faulty", "-tags", "handoverfault")
	shim := harness.StartInstalled(t, "", good)
	container := harness.RunContainer(t, node.ContainerSpec{})
	l := newLoad(t, shim, container)
	for _, transport := range harness.Transports {
		l.terminal(transport)
		l.echo(transport)
		l.silent(transport)
	}
	l.probe()
	l.await(6)
	pid, children := shim.PID(), len(harness.Zombies(shim.PID()))
	descriptors := harness.Descriptors(pid)
	script := func(text string) string {
		path := filepath.Join(t.TempDir(), "script")
		if err := os.WriteFile(path, []byte("#!/bin/sh\n"+text), 0o755); err != nil {
			t.Fatal(err)
		}
		return path
	}
	fault := func(fault string) string {
		return script("STREAMSHIM_FAULT='" + fault + "' exec " + faulty + ` "$@"` + "\n")
	}
	for _, test := range []struct{ name, program, want string }{
		{"no program", script("exit 0\n"), "it has ended"},
		{"fails", script("echo out of luck >&2; exit 1\n"), "out of luck"},
		{"is of no format", func() string { path := script(""); os.WriteFile(path, []byte{0, 1, 2, 3}, 0o755); return path }(), "exec format error"},
		{"says nonsense", script("echo nonsense >&5; sleep 100\n"), "its answer is none"},
		{"hangs at once", script("exec sleep 100\n"), "it has not started within"},
		{"does not know the flag", script("exec " + faulty + " serve --unknown\n"), "unknown flag"},
		{"exits at its start", fault("exit start"), "it has ended"},
		{"panics at its start", fault("panic start"), "panic: a fault at start"},
		{"exits before it has read the configuration", fault("exit check"), "it has ended"},
		{"hangs before it has read the configuration", fault("hang check"), "it has not started within"},
		{"panics before it has read the configuration", fault("panic check"), "panic: a fault at check"},
		{"exits instead of reading the state", fault("exit read"), "it has ended"},
		{"hangs instead of reading the state", fault("hang read"), "it has not read the state within"},
		{"panics while it reads the state", fault("panic read"), "panic: a fault at read"},
	} {
		t.Run(strings.ReplaceAll(test.name, " ", "-"), func(t *testing.T) {
			begin := logSize(t, shim)
			shim.Install(t, test.program)
			out, err := shim.Upgrade(t)
			if err == nil || !strings.Contains(out, test.want) || !strings.Contains(out, "streamshim first goes on as it was") {
				t.Errorf("%v: %s; want %q", err, out, test.want)
			}
			if log := logFrom(t, shim, begin); !strings.Contains(log, "this one goes on") {
				t.Errorf("the log does not say so: %s", log)
			}
			if shim.MustSync(t, container, "echo served") != "served\n" {
				t.Error("it does not serve")
			}
		})
	}
	// A configuration that the new program refuses, as the old one would.
	file := filepath.Join(shim.Folder, "config.toml")
	text, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	os.WriteFile(file, []byte("a mistake"), 0o600)
	if out, err := shim.Upgrade(t); err == nil {
		t.Errorf("a configuration with a mistake: %s", out)
	}
	shim.Install(t, good)
	if out, err := shim.Upgrade(t); err == nil || !strings.Contains(out, "config.toml:1") {
		t.Errorf("a configuration with a mistake: %v: %s", err, out)
	}
	os.WriteFile(file, text, 0o600)
	testutil.Eventually(t, "nothing of the programs is left", func() bool {
		return len(harness.Zombies(pid)) <= children && harness.Descriptors(pid) <= descriptors+5
	})
	shim.Install(t, faulty)
	if out, err := shim.Upgrade(t); err != nil || !strings.Contains(out, "streamshim faulty has taken over from first: 6 sessions go on") {
		t.Errorf("after all that: %v: %s", err, out)
	}
	l.finish()
}

// TestProgramThatDiesAfterTakingOver checks that a new program that dies after it has taken over is a crash, and that
// "streamshim upgrade" says so.
func TestProgramThatDiesAfterTakingOver(t *testing.T) {
	good, faulty := build(t, "first"), build(t, "faulty", "-tags", "handoverfault")
	shim := harness.StartInstalled(t, "", good)
	path := filepath.Join(t.TempDir(), "script")
	if err := os.WriteFile(path, []byte("#!/bin/sh\nSTREAMSHIM_FAULT='panic resume' exec "+faulty+" \"$@\"\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	shim.Install(t, path)
	ended := shim.Ended
	done := make(chan string, 1)
	go func() {
		out, err := shim.Upgrade(t)
		if err == nil {
			out = "success: " + out
		}
		done <- out
	}()
	<-ended
	shim.Install(t, good)
	shim.Start(t) // as systemd does
	if out := <-done; !strings.Contains(out, "ended after it had taken over") {
		t.Error(out)
	}
}

// TestKillAfterUpgrade checks that SIGKILL after a hand-over has the same effect as without one: no client takes it for
// success, and the next start ends what is left.
func TestKillAfterUpgrade(t *testing.T) {
	first, second := build(t, "first"), build(t, "second")
	shim := harness.StartInstalled(t, "", first)
	container := harness.RunContainer(t, node.ContainerSpec{})
	var clients []*session
	l := newLoad(t, shim, container)
	mark := harness.Unique("killed")
	for _, transport := range harness.Transports {
		s := l.exec(transport, false, harness.Marked(mark, "echo ready; cat")...)
		if line, err := s.out.ReadString('\n'); line != "ready\n" {
			t.Fatal(line, err)
		}
		clients = append(clients, s)
	}
	shim.Install(t, second)
	if out, err := shim.Upgrade(t); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	shim.Stop(t, syscall.SIGKILL)
	for _, s := range clients {
		go func() { s.in.Write([]byte("x")) }()
		select {
		case err := <-s.ended:
			if err == nil {
				t.Error("a client takes the end of streamshim for success")
			}
		case <-time.After(testutil.Patience):
			t.Error("a client does not end")
		}
	}
	shim.Start(t)
	testutil.Eventually(t, "the commands have ended", func() bool { return len(harness.WithMark(mark)) == 0 })
	l.finish()
}
