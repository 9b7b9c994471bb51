package upgrade

import (
	"context"
	"flag"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"k8s.io/client-go/tools/remotecommand"

	"github.com/streamshim/streamshim/internal/testutil"
	"github.com/streamshim/streamshim/test/internal/harness"
	"github.com/streamshim/streamshim/test/internal/node"
)

// For a proof: -sessions 200 -times 20 -pace 400 -size 1024 -apart 20s. Thirty sessions at a pace of 1 keep two cores busy, as do
// the large ones without long times between the hand-overs, and then the pauses measure how long a program waits for a core.
var (
	sessions = flag.Int("sessions", 30, "sessions that are live at the same time, about")
	times    = flag.Int("times", 6, "hand-overs in a row")
	pace     = flag.Int("pace", 1, "how many times longer each session pauses between two blocks, lines or commands")
	size     = flag.Int("size", 24, "MiB that one session of each transport moves to its client, and one more to its command, through all hand-overs")
	apart    = flag.Duration("apart", 400*time.Millisecond, "the longest time between two hand-overs")
)

// pauses returns those of the hand-overs in a streamshim's log, and how much of each the old program took, both sorted.
func pauses(t *testing.T, shim *harness.Streamshim) (whole, old []time.Duration) {
	t.Helper()
	log, err := os.ReadFile(shim.Log)
	if err != nil {
		t.Fatal(err)
	}
	durations := func(pattern string) (all []time.Duration) {
		for _, found := range regexp.MustCompile(pattern).FindAllStringSubmatch(string(log), -1) {
			d, err := time.ParseDuration(found[1])
			if err != nil {
				t.Fatal(err)
			}
			all = append(all, d)
		}
		slices.Sort(all)
		return all
	}
	return durations(`has taken over".* pause=(\S+)`), durations(`stand still for the other program".* after=(\S+)`)
}

// TestNoSessionNoticesAnUpgrade has two programs take over from each other again and again, with sessions of all kinds.
// None may end, no byte may be lost, no probe may fail, and nothing may be left behind.
func TestNoSessionNoticesAnUpgrade(t *testing.T) {
	first, second := build(t, "first"), build(t, "second")
	metrics := harness.UnusedAddress(t)
	recordings := t.TempDir()
	shim := harness.StartInstalled(t, fmt.Sprintf("metrics_address = %q\n[recording]\ndirectory = %q\nnon_tty = true\n[[recording.rule]]\nnamespaces = ['*']\n", metrics, recordings), first)
	pid := shim.PID()
	container, ticks := harness.RunContainer(t, node.ContainerSpec{}), counter(t)
	pod := harness.NewPod(t, harness.Shared.Node, node.PodSpec{Name: harness.Unique("echo")})
	inContainer := processesIn(t, shim, container)
	testutil.Eventually(t, "no children and no zombies", func() bool { return len(harness.Children(pid)) == 0 })
	descriptors, goroutines := harness.Descriptors(pid), harness.Goroutines(t, metrics)

	l := newLoad(t, shim, container)
	kinds := []func(transport string){
		l.terminal, l.echo, l.upload, l.count, l.silent, l.short,
		func(transport string) { l.attach(transport, ticks) },
		func(transport string) { l.forward(pod, transport, 3) },
	}
	expected := int64(0)
	for i := range *sessions {
		kinds[i%len(kinds)](harness.Transports[i/len(kinds)%2])
		if expected++; i%len(kinds) == len(kinds)-1 {
			expected += 2
		}
	}
	block := l.putBlock()
	for _, transport := range harness.Transports {
		l.largeOutput(transport, block)
		l.largeInput(transport, block)
		expected += 2
	}
	l.probe()
	l.await(expected)
	t.Logf("%d sessions and connections are live", expected)

	var carried []string
	for i := range *times {
		time.Sleep(rand.N(*apart))
		waiting := shim.ExecURL(t, container, remotecommand.StreamOptions{Stdout: io.Discard}, "sh", "-c", "exit 9")
		shim.Install(t, []string{second, first}[i%2])
		out, err := shim.Upgrade(t)
		if err != nil {
			t.Fatalf("hand-over %d: %v: %s", i, err, out)
		}
		l.handovers.Add(1)
		carried = append(carried, strings.TrimSpace(out))
		// A URL that was issued before stays good.
		ctx, cancel := context.WithTimeout(t.Context(), testutil.Patience)
		err = harness.Stream(ctx, harness.Transports[i%2], waiting.String(), remotecommand.StreamOptions{Stdout: io.Discard})
		cancel()
		if harness.ExitCodeOf(err) != 9 {
			t.Errorf("the URL of before hand-over %d: %v", i, err)
		}
		if t.Failed() {
			break
		}
	}
	t.Logf("%s", strings.Join(carried, "\n"))
	l.finish()
	all, old := pauses(t, shim)
	if len(all) < *times || len(old) < *times {
		t.Errorf("%d and %d hand-overs are in the log, of %d", len(all), len(old), *times)
	} else {
		t.Logf("%d MB moved; pauses: median %v, %v of it by the old program; p99 %v", l.moved.Load()>>20, all[len(all)/2], old[len(old)/2], all[len(all)*99/100])
	}
	if shim.PID() != pid {
		t.Errorf("process %d instead of %d", shim.PID(), pid)
	}
	testutil.Eventually(t, "no children and no zombies are left", func() bool { return len(harness.Children(pid)) == 0 })
	testutil.Eventually(t, "no process is left in the container", func() bool { return processesIn(t, shim, container) == inContainer })
	testutil.Eventually(t, fmt.Sprintf("descriptors are back to about %d", descriptors), func() bool { return harness.Descriptors(pid) <= descriptors+5 })
	testutil.Eventually(t, fmt.Sprintf("goroutines are back to about %d", goroutines), func() bool { return harness.Goroutines(t, metrics) <= goroutines+5 })
	testutil.Eventually(t, "no files are left", func() bool { return len(harness.Glob(filepath.Join(shim.Folder, "state", "exec", "*"))) == 0 })
}

// processesIn names the processes that run in a container, without zombies: the container's main process reaps none.
func processesIn(t *testing.T, shim *harness.Streamshim, container string) string {
	t.Helper()
	return shim.MustSync(t, container, `for p in /proc/[0-9]*; do
		while read -r key value; do
			case "$key $value" in
			Name:*) name=$value;;
			"State: Z"*) ;;
			State:*) echo $name;;
			esac
		done <$p/status
	done`)
}

// TestReloadTakesOver checks that at SIGHUP another program takes over if one is installed, and that otherwise the
// configuration is reloaded.
func TestReloadTakesOver(t *testing.T) {
	first, second := build(t, "first"), build(t, "second")
	shim := harness.StartInstalled(t, "", first)
	container := harness.RunContainer(t, node.ContainerSpec{})
	l := newLoad(t, shim, container)
	l.terminal("SPDY")
	l.await(1)
	reload := func(want string) {
		t.Helper()
		begin := logSize(t, shim)
		if err := syscall.Kill(shim.PID(), syscall.SIGHUP); err != nil {
			t.Fatal(err)
		}
		testutil.Eventually(t, want, func() bool { return strings.Contains(logFrom(t, shim, begin), want) })
	}
	reload("the configuration was read again")
	shim.Install(t, first)
	reload("the configuration was read again") // the same build in another file
	shim.Install(t, second)
	reload("this program has taken over")
	if !strings.Contains(logFrom(t, shim, 0), "from=first version=second reason=reload") {
		t.Error("not the other program")
	}
	reload("the configuration was read again")
	l.finish()
}

func logSize(t *testing.T, shim *harness.Streamshim) int { return len(logFrom(t, shim, 0)) }

func logFrom(t *testing.T, shim *harness.Streamshim, begin int) string {
	t.Helper()
	text, err := os.ReadFile(shim.Log)
	if err != nil {
		t.Fatal(err)
	}
	return string(text[begin:])
}

// environment returns what a process was started with.
func environment(t *testing.T, pid int) []string {
	t.Helper()
	text, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/environ")
	if err != nil {
		t.Fatal(err)
	}
	return strings.Split(strings.TrimSuffix(string(text), "\x00"), "\x00")
}

// TestUpgradeKeepsTheProcess checks that a process keeps what it has from its start: arguments, limits, umask, working
// directory, and its connection to systemd.
func TestUpgradeKeepsTheProcess(t *testing.T) {
	first, second := build(t, "first"), build(t, "second")
	shim := harness.StartInstalled(t, "", first)
	look := func() map[string]string {
		pid := strconv.Itoa(shim.PID())
		seen := map[string]string{}
		for _, name := range []string{"cmdline", "limits", "oom_score_adj", "cgroup"} {
			text, err := os.ReadFile(filepath.Join("/proc", pid, name))
			if err != nil {
				t.Fatal(err)
			}
			seen[name] = string(text)
		}
		status, err := os.ReadFile(filepath.Join("/proc", pid, "status"))
		if err != nil {
			t.Fatal(err)
		}
		for line := range strings.Lines(string(status)) {
			name, value, _ := strings.Cut(line, ":")
			if slices.Contains([]string{"Umask", "PPid", "SigBlk", "SigIgn", "NoNewPrivs", "CapBnd", "NSpid"}, name) {
				seen[name] = value
			}
		}
		for _, link := range []string{"cwd", "ns/net", "ns/mnt", "fd/0", "fd/1", "fd/2"} {
			target, err := os.Readlink(filepath.Join("/proc", pid, link))
			if err != nil {
				t.Fatal(err)
			}
			seen[link] = target
		}
		return seen
	}
	before, environmentBefore := look(), environment(t, shim.PID())
	shim.Install(t, second)
	if out, err := shim.Upgrade(t); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	after := look()
	for name := range before {
		if before[name] != after[name] {
			t.Errorf("%s: %q, was %q", name, after[name], before[name])
		}
	}
	for _, variable := range environmentBefore {
		if !slices.Contains(environment(t, shim.PID()), variable) {
			t.Errorf("%s is gone", variable)
		}
	}
}
