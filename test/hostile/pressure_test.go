package hostile

import (
	"context"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/opencontainers/runtime-spec/specs-go"

	"github.com/streamshim/streamshim/internal/testutil"
)

// Whatever is done to a command while it is on its way, it runs as it should or it does not run: never twice, never
// with more than it may have, and nobody waits for ever.

// answerTime bounds the answer to an exec whose start is given up: the timeout and the end of what was started.
const answerTime = startTimeout + 3*time.Second

// outcomes are what has become of commands.
type outcomes struct{ ran, failed int }

// try has a command run, or not, and looks at what has come of it.
func (o *outcomes) try(t testing.TB, e *entrance, c *container) {
	t.Helper()
	for _, wrong := range o.wrongs(t, e, c) {
		t.Errorf("%s: %s", e.name, wrong)
	}
}

// wrongs has a command run, or not, and returns what should not have come of it.
func (o *outcomes) wrongs(t testing.TB, e *entrance, c *container) (wrongs []string) {
	t.Helper()
	before, began := c.runs(t), time.Now()
	output, err := e.enter(context.Background(), c, "/victim", hostFile, "runs=/runs")
	if took := time.Since(began); took > answerTime {
		wrongs = append(wrongs, fmt.Sprintf("the answer took %v: %v", took, err))
	}
	if runs := c.runs(t) - before; runs > 1 || (err == nil && runs != 1) {
		wrongs = append(wrongs, fmt.Sprintf("the command ran %d times (%v)", runs, err))
	}
	if err != nil {
		o.failed++
		return wrongs
	}
	s, err := parseState(output)
	if err != nil { // killed while it wrote it
		o.failed++
		return wrongs
	}
	o.ran++
	for _, wrong := range s.wrongs(t, c) {
		wrongs = append(wrongs, fmt.Sprintf("%s: %v", wrong, s))
	}
	return wrongs
}

// recovers fails the test unless the container is left as it was, and takes commands again.
func recovers(t testing.TB, e *entrance, c *container) {
	t.Helper()
	testutil.Eventually(t, fmt.Sprintf("%s: nothing but the main process is left in the container", e.name), func() bool { return c.processes(t) == 1 })
	var o outcomes
	if o.try(t, e, c); o.ran != 1 {
		t.Errorf("%s: no command runs any more", e.name)
	}
}

// The container signals what enters it, at any moment.
func TestSignals(t *testing.T) {
	for _, attack := range []string{"stop", "stop-later", "kill"} {
		t.Run(attack, func(t *testing.T) {
			c := newContainer(t)
			for _, e := range engines(t) {
				commands := *count * 5
				if attack != "kill" { // the others take the timeout each
					commands = max(1, *count/2)
				}
				r := row{attack: attack, configuration: "default", entrance: e.name}
				signalled := 0
				for round := 0; signalled == 0 && round < 20; round++ { // on a busy machine the attacker comes too late now and then
					c.attacker.begin(attack)
					var o outcomes
					for range commands {
						o.try(t, e, c)
					}
					end := c.attacker.end()
					r.commands += commands
					r.failed, r.seen, r.met = r.failed+o.failed, r.seen+end.seen, end.met
					signalled = end.gained["stop"] + end.gained["kill"]
				}
				note(r)
				if signalled == 0 {
					t.Errorf("%s: nothing was signalled", e.name)
				}
				recovers(t, e, c)
			}
			if attack == "stop" {
				seesNoEnd(t, c)
			}
		})
	}
}

// seesNoEnd shows that the attack works: who just waits for runc exec waits for as long as the container likes.
func seesNoEnd(t testing.TB, c *container) {
	t.Helper()
	c.attacker.begin("stop")
	ctx, cancel := context.WithTimeout(context.Background(), time.Second)
	defer cancel()
	if output, err := reference().enter(ctx, c, "/victim", hostFile); err == nil {
		t.Errorf("a runc exec that the container stops ends: %q", output)
	}
	c.attacker.end()
	testutil.Eventually(t, "what was stopped ends", func() bool { return c.processes(t) == 1 })
}

// The container is frozen while commands enter it.
func TestFreezer(t *testing.T) {
	c := newContainer(t)
	for _, e := range engines(t) {
		var o outcomes
		for range *count * 2 {
			for _, wrong := range o.whileFrozen(t, e, c) {
				t.Errorf("%s: %s", e.name, wrong)
			}
		}
		note(row{attack: "freezer", configuration: "default", entrance: e.name, commands: *count * 2, failed: o.failed})
		recovers(t, e, c)
	}
	// The test would see it: a launcher that starts a command again which takes long, as a frozen one does, runs it twice.
	const tries = 40 // at most; one success is enough
	var o outcomes
	for range tries {
		if slices.ContainsFunc(o.whileFrozen(t, wrong(t, "retries"), c), func(wrong string) bool { return strings.Contains(wrong, "ran 2 times") }) {
			return
		}
	}
	t.Errorf("with a launcher that tries again no command ran twice in %d frozen starts", tries)
}

// whileFrozen is wrongs for a container that is frozen at some moment of the start, for a tenth of a second.
func (o *outcomes) whileFrozen(t testing.TB, e *entrance, c *container) (wrongs []string) {
	t.Helper()
	var freeze sync.WaitGroup
	freeze.Go(func() {
		time.Sleep(time.Duration(rand.IntN(40)) * time.Millisecond) // any moment of a start
		c.runc(t, "pause", c.ContainerID)
		time.Sleep(100 * time.Millisecond) // a start stands still meanwhile
		c.runc(t, "resume", c.ContainerID)
	})
	wrongs = o.wrongs(t, e, c)
	freeze.Wait()
	return wrongs
}

// The container has room for only so many processes, or so much memory: each start fails at another step.
func TestLimits(t *testing.T) {
	many := int64(1000)
	c := newContainer(t, func(s *specs.Spec) { s.Linux.Resources.Pids = &specs.LinuxPids{Limit: &many} })
	for _, e := range engines(t) {
		for _, wrong := range withFewProcesses(t, e, c) {
			t.Errorf("%s: %s", e.name, wrong)
		}
		recovers(t, e, c)
	}
	// The test would see it: a launcher that goes on when it cannot fork, and below one that leaves the container's
	// cgroups out.
	if wrongs := withFewProcesses(t, wrong(t, "goes-on"), c); !slices.ContainsFunc(wrongs, func(wrong string) bool {
		return strings.Contains(wrong, "other capabilities")
	}) {
		t.Errorf("a launcher that goes on without its child starts no command with other capabilities: %q", wrongs)
	}
	for _, e := range engines(t) {
		o, wrongs := withLittleMemory(t, e)
		for _, wrong := range wrongs {
			t.Errorf("%s: %s", e.name, wrong)
		}
		if o.failed == 0 {
			t.Errorf("%s: the container's memory limit does not bind what enters it", e.name)
		}
	}
	if o, _ := withLittleMemory(t, wrong(t, "none")); o.failed > 0 {
		t.Errorf("the container's memory limit binds a launcher that is not in its cgroup: %d commands failed", o.failed)
	}
}

// withFewProcesses has a command run for each limit of processes from one upwards.
func withFewProcesses(t testing.TB, e *entrance, c *container) (wrongs []string) {
	t.Helper()
	var o outcomes
	const limits = 13 // with which each start has room
	for pids := range limits {
		c.runc(t, "update", "--pids-limit", fmt.Sprint(pids+1), c.ContainerID)
		wrongs = append(wrongs, o.wrongs(t, e, c)...)
	}
	c.runc(t, "update", "--pids-limit", "1000", c.ContainerID)
	note(row{attack: "pids.max", configuration: "default", entrance: e.name, commands: limits, failed: o.failed})
	return wrongs
}

// withLittleMemory has a command run for each of some limits of memory.
func withLittleMemory(t testing.TB, e *entrance) (o outcomes, wrongs []string) {
	t.Helper()
	limits := []int64{600, 700, 800, 1000, 1500, 3000, 6000, 12000}
	for _, kilobytes := range limits {
		// One for each: the kernel may well end the main process.
		c := newContainer(t)
		// What the start of the main process has used is given back a little later; until then the kernel refuses.
		testutil.Eventually(t, fmt.Sprintf("a memory limit of %d KiB", kilobytes), func() bool {
			_, err := runCommand(context.Background(), runc(), "--root", c.Root, "update", "--memory", fmt.Sprint(kilobytes<<10), c.ContainerID)
			return err == nil
		})
		wrongs = append(wrongs, o.wrongs(t, e, c)...)
	}
	note(row{attack: "memory limit", configuration: "default", entrance: e.name, commands: len(limits), failed: o.failed})
	return o, wrongs
}

// While a container stops everything that enters it, commands in others are answered as ever.
func TestStoppedContainerDoesNotStallOthers(t *testing.T) {
	const execs = 40
	hostile, other := newContainer(t), newContainer(t)
	for _, e := range engines(t) {
		var o outcomes
		for range 3 { // and for the native engine to know the container
			o.try(t, e, other)
		}
		hostile.attacker.begin("stop")
		var stopped sync.WaitGroup
		for range execs {
			stopped.Go(func() {
				_, _ = e.enter(context.Background(), hostile, "/victim", hostFile) // it fails, or not: others matter
			})
		}
		var took []time.Duration
		for range 10 {
			began := time.Now()
			o.try(t, e, other)
			took = append(took, time.Since(began))
		}
		stopped.Wait()
		gained := hostile.attacker.end().gained
		slices.Sort(took)
		t.Logf("%s: %d were stopped; others were answered within %v to %v", e.name, gained["stop"], took[0], took[len(took)-1])
		note(row{attack: "stop, others", configuration: "default", entrance: e.name, commands: 10, failed: o.failed, seen: gained["stop"]})
		if gained["stop"] == 0 {
			t.Errorf("%s: nobody was stopped", e.name)
		}
		// The median, and not far from startTimeout, for which one that waited would wait: forty processes start at first, on a
		// machine that may have two CPUs.
		if middle := took[len(took)/2]; o.failed > 0 || middle > startTimeout*2/3 {
			t.Errorf("%s: commands in another container took %v; %d failed", e.name, took, o.failed)
		}
		recovers(t, e, hostile)
	}
}
