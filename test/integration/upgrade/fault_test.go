package upgrade

import (
	"fmt"
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
	// A program that is checked and whose interpreter is gone when it is to be executed.
	vanishing := filepath.Join(t.TempDir(), "script")
	interpreter := filepath.Join(t.TempDir(), "sh")
	shell, err := os.ReadFile("/bin/sh")
	if err == nil {
		err = os.WriteFile(interpreter, shell, 0o755)
	}
	if err == nil {
		err = os.WriteFile(vanishing, []byte("#!"+interpreter+"\nrm "+interpreter+"; exec "+faulty+` "$@"`+"\n"), 0o755)
	}
	if err != nil {
		t.Fatal(err)
	}
	for _, test := range []struct{ name, program, want string }{
		{"no program", script("exit 0\n"), "it has ended"},
		{"fails", script("echo out of luck >&2; exit 1\n"), "out of luck"},
		{"is of no format", func() string { path := script(""); os.WriteFile(path, []byte{0, 1, 2, 3}, 0o755); return path }(), "exec format error"},
		{"says nonsense", script("echo nonsense >&5; sleep 100\n"), "its answer is none"},
		{"does not know the flag", script("exec " + faulty + " serve --unknown\n"), "unknown flag"},
		{"exits at its start", fault("exit start"), "it has ended"},
		{"hangs at its start", fault("hang start"), "it has not started within"},
		{"panics at its start", fault("panic start"), "panic: a fault at start"},
		{"exits before it has read the configuration", fault("exit check"), "it has ended"},
		{"hangs before it has read the configuration", fault("hang check"), "it has not started within"},
		{"panics before it has read the configuration", fault("panic check"), "panic: a fault at check"},
		{"exits before it has made its parts", fault("exit parts"), "it has ended"},
		{"hangs before it has made its parts", fault("hang parts"), "it has not started within"},
		{"panics before it has made its parts", fault("panic parts"), "panic: a fault at parts"},
		{"exits while it waits for the state", script(`echo '{"program":"x"}' >&5; exit 0`), "it has ended"},
		{"exits instead of reading the state", fault("exit read"), "it has ended"},
		{"hangs instead of reading the state", fault("hang read"), "it has not read the state within"},
		{"panics while it reads the state", fault("panic read"), "panic: a fault at read"},
		{"is another file by then", script(`touch -d @1 "$0"; exec ` + faulty + ` "$@"`), "is not the file any more that was checked"},
		{"cannot be executed by then", vanishing, "no such file or directory"},
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

// TestProgramThatDiesAfterTakingOver checks that a new program that exits, hangs or panics after it has taken over is a crash, at
// whichever step: it ends by itself, "streamshim upgrade" says so, and no client takes the end for success.
func TestProgramThatDiesAfterTakingOver(t *testing.T) {
	good, faulty := build(t, "first"), build(t, "faulty", "-tags", "handoverfault")
	shim := harness.StartInstalled(t, "", good)
	l := newLoad(t, shim, harness.RunContainer(t, node.ContainerSpec{}))
	for _, step := range []string{"received", "build", "resume", "serve"} {
		for _, how := range []string{"exit", "hang", "panic"} {
			t.Run(how+"-"+step, func(t *testing.T) {
				var clients []*session
				for _, transport := range harness.Transports {
					s := l.exec(transport, false, "sh", "-c", "echo ready; cat")
					if line, err := s.out.ReadString('\n'); line != "ready\n" {
						t.Fatal(line, err)
					}
					clients = append(clients, s)
				}
				path := filepath.Join(t.TempDir(), "script")
				if err := os.WriteFile(path, []byte("#!/bin/sh\nSTREAMSHIM_FAULT='"+how+" "+step+"' exec "+faulty+" \"$@\"\n"), 0o755); err != nil {
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
				testutil.Receive(t, "the end of the program", ended)
				shim.Install(t, good)
				shim.Start(t) // as systemd does
				if out := testutil.Receive(t, "the answer", done); !strings.Contains(out, "ended after it had taken over") {
					t.Error(out)
				}
				for _, s := range clients {
					if err := testutil.Receive(t, "the end of a client", s.ended); err == nil {
						t.Error("a client takes the end of streamshim for success")
					}
				}
			})
		}
	}
	l.finish()
}

// TestHandOverThatPanics checks that a panic of the old program, with all sessions standing still, costs none of them.
func TestHandOverThatPanics(t *testing.T) {
	faulty := build(t, "faulty", "-tags", "handoverfault")
	for _, step := range []string{"freeze", "execute"} {
		t.Run(step, func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "script")
			if err := os.WriteFile(path, []byte("#!/bin/sh\nSTREAMSHIM_FAULT='panic "+step+"' exec "+faulty+" \"$@\"\n"), 0o755); err != nil {
				t.Fatal(err)
			}
			shim := harness.StartInstalled(t, "", path)
			container := harness.RunContainer(t, node.ContainerSpec{})
			l := newLoad(t, shim, container)
			for _, transport := range harness.Transports {
				l.terminal(transport)
				l.echo(transport)
			}
			l.probe()
			l.await(4)
			for range 2 {
				if out, err := shim.Upgrade(t); err == nil || !strings.Contains(out, "panic: a fault at "+step) || !strings.Contains(out, "streamshim faulty goes on as it was") {
					t.Errorf("%v: %s", err, out)
				}
			}
			l.finish()
		})
	}
}

// TestConfigurationThatIsDamagedMeanwhile checks that a configuration that was good when the new program was checked, and cannot
// be read when it has been executed, costs no session: that of the program before stays in force.
func TestConfigurationThatIsDamagedMeanwhile(t *testing.T) {
	first, second := build(t, "first"), build(t, "second")
	metrics := harness.UnusedAddress(t)
	shim := harness.StartInstalled(t, fmt.Sprintf("metrics_address = %q\nnotify_watch = true\n", metrics), first)
	l := newLoad(t, shim, harness.RunContainer(t, node.ContainerSpec{}))
	for _, transport := range harness.Transports {
		l.terminal(transport)
		l.echo(transport)
	}
	l.await(4)
	file, path := filepath.Join(shim.Folder, "config.toml"), filepath.Join(t.TempDir(), "script")
	text, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	script := "#!/bin/sh\n[ -z \"$STREAMSHIM_HANDOVER\" ] || echo 'a mistake' >" + file + "\nexec " + second + " \"$@\"\n"
	if err := os.WriteFile(path, []byte(script), 0o755); err != nil {
		t.Fatal(err)
	}
	shim.Install(t, path)
	if out, err := shim.Upgrade(t); err != nil || !strings.Contains(out, "4 sessions go on") {
		t.Errorf("%v: %s", err, out)
	}
	if log := logFrom(t, shim, 0); !strings.Contains(log, "that of the program before stays in force") {
		t.Error("the log does not tell")
	}
	harness.Goroutines(t, metrics) // at the address of the configuration that is not there any more
	// The next hand-over is refused, and one with a good configuration is not.
	shim.Install(t, first)
	if out, err := shim.Upgrade(t); err == nil || !strings.Contains(out, "config.toml:1") {
		t.Errorf("a configuration with a mistake: %v: %s", err, out)
	}
	if err := os.WriteFile(file, text, 0o600); err != nil {
		t.Fatal(err)
	}
	if out, err := shim.Upgrade(t); err != nil {
		t.Errorf("%v: %s", err, out)
	}
	l.finish()
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
