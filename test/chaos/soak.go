package main

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"github.com/streamshim/streamshim/test/internal/node"
	"github.com/streamshim/streamshim/test/internal/wire"
)

// violationKind is which invariant does not hold.
type violationKind string

const (
	wrongOutput  violationKind = "wrong output"            // of a session that says it succeeded
	unexplained  violationKind = "failure without a cause" // of a session, with a healthy client and nothing going on
	slowProbes   violationKind = "slow probes"
	failedProbe  violationKind = "probe failed" // with nothing going on
	burntCPU     violationKind = "too much CPU time"
	failedCall   violationKind = "call of the kubelet's failed"
	leftBehind   violationKind = "left behind"
	faultTrouble violationKind = "not back after a fault" // streamshim or containerd

	// failedControl says nothing about streamshim, but that the soak cannot judge it.
	failedControl violationKind = "runc exec failed"
)

// run is one soak.
type soakRun struct {
	options
	node  *node.Node
	dir   string
	pods  *pods
	log   *os.File
	begin time.Time

	mu         sync.Mutex
	violations map[violationKind]int
	details    []string
	windows    []*window
	counts     map[string]int // of sessions, by kind, fate and outcome
	probes     []sample       // latency
	reference  []sample       // of the same probes, asked of containerd itself
	floor      []sample       // of the same commands, run by `runc exec`
	floorCPU   time.Duration  // of all those
	floorBegan atomic.Int64   // when the one that runs began, since the beginning; 0 when none runs
	notBegun   int            // sessions, because the machine was busy
	forgotten  []*wire.Exec   // see injectLeak
	cpu        time.Duration  // of streamshim itself
	calls      []sample
	samples    []usage
}

// sample is something measured at a time since the beginning.
type sample struct {
	at     time.Duration
	took   time.Duration
	failed bool
	// excused samples fell into a window in which nobody could have answered.
	excused bool
}

func say(format string, args ...any) { fmt.Printf(time.Now().Format("15:04:05 ")+format+"\n", args...) }

// note writes to the log of events.
func (s *soakRun) note(format string, args ...any) {
	s.mu.Lock()
	defer s.mu.Unlock()
	fmt.Fprintf(s.log, "%8.3f ", time.Since(s.begin).Seconds())
	fmt.Fprintf(s.log, format+"\n", args...)
}

// maxDetails bounds the report.
const maxDetails = 40

func (s *soakRun) violated(kind violationKind, format string, args ...any) {
	text := fmt.Sprintf("%8.3f %s: %s", time.Since(s.begin).Seconds(), kind, fmt.Sprintf(format, args...))
	s.mu.Lock()
	s.violations[kind]++
	telling := len(s.details) < maxDetails
	if telling {
		s.details = append(s.details, text)
	}
	fmt.Fprintln(s.log, text)
	s.mu.Unlock()
	if telling {
		say("VIOLATION %s", text)
	}
}

// random is the source of decisions of one part: the same for the same seed, whatever the others do.
func (s *soakRun) random(part string, number int) *rand.Rand {
	h := s.seed
	for _, c := range part {
		h = h*1099511628211 + uint64(c)
	}
	return rand.New(rand.NewPCG(h, uint64(number))) //nolint:gosec // decisions, not secrets
}

// dirs that are on small file systems of their own, so that they can be full.
var disks = map[string]string{"state": "16m", "audit": "4m", "recordings": "16m"}

// soak runs once and returns the violations.
func soak(ctx context.Context, o options) (map[violationKind]int, error) {
	program, err := filepath.Abs(o.program)
	if err != nil {
		return nil, err
	}
	if err := node.Ready(""); err != nil {
		return nil, err
	}
	if err := os.MkdirAll(o.output, 0o755); err != nil {
		return nil, err
	}
	log, err := os.Create(filepath.Join(o.output, "events.log"))
	if err != nil {
		return nil, err
	}
	defer log.Close() //nolint:errcheck // a lost line is seen
	s := &soakRun{
		options: o, log: log, begin: time.Now(),
		violations: map[violationKind]int{}, counts: map[string]int{},
	}
	say("soak of %v, seed %d, %d sessions", o.duration, o.seed, o.sessions)
	done, err := s.bringUp(ctx, program)
	if err != nil {
		return nil, err
	}
	err = s.run(ctx)
	s.report()
	if len(s.violations) > 0 || err != nil {
		s.keepLogs()
	}
	return s.violations, errors.Join(err, done())
}

// bringUp starts the node. The folder is always the same, so that a run that was killed is cleaned up after.
func (s *soakRun) bringUp(ctx context.Context, program string) (done func() error, err error) {
	s.dir = filepath.Join(memoryFolder(), "streamshim-chaos")
	if err := node.Cleanup(s.dir, nil); err != nil {
		return nil, err
	}
	unmount := func() error {
		var errs []error
		for name := range disks {
			if err := unix.Unmount(filepath.Join(s.dir, name), unix.MNT_DETACH); err != nil && !errors.Is(err, unix.EINVAL) && !errors.Is(err, unix.ENOENT) {
				errs = append(errs, fmt.Errorf("unmount %s: %w", name, err))
			}
		}
		return errors.Join(errs...)
	}
	if err := unmount(); err != nil {
		return nil, err
	}
	for name, size := range disks {
		path := filepath.Join(s.dir, name)
		if err := os.MkdirAll(path, 0o700); err != nil {
			return nil, err
		}
		if err := unix.Mount("tmpfs", path, "tmpfs", 0, "size="+size); err != nil {
			return nil, fmt.Errorf("mount %s: %w", path, err)
		}
	}
	config := filepath.Join(s.dir, "config.toml")
	if err := os.WriteFile(config, []byte(s.configuration()), 0o600); err != nil {
		return nil, errors.Join(err, unmount())
	}
	s.node, err = node.Start(ctx, node.Config{Dir: s.dir, Streamshim: program, StreamshimArgs: []string{
		"--config", config, "--log-level", "info", "--state-dir", filepath.Join(s.dir, "state"),
	}})
	if err != nil {
		return nil, errors.Join(err, unmount())
	}
	return func() error {
		return errors.Join(s.node.Close(), unmount(), os.RemoveAll(s.dir))
	}, nil
}

func (s *soakRun) configuration() string {
	return fmt.Sprintf(`metrics_address = %q
profiling = true
[audit]
destination = "file"
file = %q
max_size = 500000
max_files = 2
[recording]
directory = %q
non_tty = true
max_size = 100000
max_files = 200
max_total = 8000000
[[recording.rule]]
namespaces = ["recorded"]
[limits]
spare_descriptors = 80
buffers = 16000000
[shutdown]
drain = "1s"
`, metricsAddress, filepath.Join(s.dir, "audit/audit.log"), filepath.Join(s.dir, "recordings"))
}

// memoryFolder is a folder on a tmpfs, as /run is on a node.
func memoryFolder() string {
	for _, folder := range []string{"/run", "/dev/shm"} {
		var stat unix.Statfs_t
		if err := unix.Statfs(folder, &stat); err == nil && stat.Type == unix.TMPFS_MAGIC {
			return folder
		}
	}
	return os.TempDir()
}

// run is the soak from the first pod to the account of what is left.
func (s *soakRun) run(ctx context.Context) error {
	var err error
	if s.pods, err = newPods(ctx, s); err != nil {
		return err
	}
	defer s.pods.close()
	if err := s.warmUp(ctx); err != nil {
		return fmt.Errorf("the first sessions, before any fault: %w", err)
	}
	before, err := s.settledAccount(ctx, nil)
	if err != nil {
		return err
	}
	say("before: %s", before)

	s.begin = time.Now()
	running, stop := context.WithTimeout(ctx, s.duration)
	defer stop()
	var parts sync.WaitGroup
	crowd := newCrowd(ctx, s)
	for _, part := range []func(context.Context){
		crowd.run, s.probeForever, s.probeContainerd, s.probeDirectly, s.callForever, s.watch, s.killPods, s.injectFaults, s.injectStalls, s.tell,
	} {
		parts.Go(func() { part(running) })
	}
	parts.Wait()
	if ctx.Err() != nil {
		return ctx.Err()
	}
	say("sessions end")
	crowd.end()
	if err := s.pods.removeHostile(ctx); err != nil {
		s.violated(faultTrouble, "the hostile pods cannot be removed: %v", err)
	}
	if err := s.pods.removeUnknown(ctx); err != nil {
		s.violated(faultTrouble, "pods cannot be removed that were made while containerd was killed: %v", err)
	}
	after, err := s.settledAccount(ctx, &before)
	if err != nil {
		return err
	}
	say("after:  %s", after)
	for _, difference := range after.above(before, s.pods.interrupted()) {
		s.violated(leftBehind, "%s", difference)
	}
	s.judgeProbes()
	s.judgeCPU()
	return nil
}

// tell says now and then how it goes.
func (s *soakRun) tell(ctx context.Context) {
	every(ctx, 30*time.Second, func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		total := 0
		for _, n := range s.counts {
			total += n
		}
		var rss int64
		live := 0
		if n := len(s.samples); n > 0 {
			rss, live = s.samples[n-1].rss, s.samples[n-1].sessions
		}
		say("%3.0f s: %d sessions have ended, %d live; %d probes, the last ones took %v; %d MiB",
			time.Since(s.begin).Seconds(), total, live, len(s.probes), latest(s.probes), rss>>20)
	})
}

func latest(samples []sample) time.Duration {
	longest := time.Duration(0)
	for _, p := range samples[max(0, len(samples)-20):] {
		longest = max(longest, p.took)
	}
	return longest.Round(time.Millisecond)
}

// every calls do at fixed times until the context ends; a call that takes longer loses the times it missed.
func every(ctx context.Context, interval time.Duration, do func()) {
	ticker := time.NewTicker(interval)
	defer ticker.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-ticker.C:
			if ctx.Err() == nil { // both may have come
				do()
			}
		}
	}
}

// pause waits, and says whether the context goes on.
func pause(ctx context.Context, d time.Duration) bool {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-ctx.Done():
		return false
	case <-timer.C:
		return true
	}
}

// between is a duration of at least low and less than high.
func between(r *rand.Rand, low, high time.Duration) time.Duration {
	return low + time.Duration(r.Int64N(int64(high-low)))
}

func (s *soakRun) keepLogs() {
	for _, name := range []string{"streamshim", "containerd"} {
		if text, err := os.ReadFile(s.node.LogPath(name)); err == nil {
			_ = os.WriteFile(filepath.Join(s.output, name+".log"), text, 0o644) //nolint:errcheck // the report says the rest
		}
	}
}

// window is a time in which something is going on that explains failures.
type window struct {
	name       string
	begin, end time.Time // end is zero as long as it lasts
	excuses    excuse
}

// excuse is what a fault explains.
type excuse struct {
	probes   bool     // that probes are not answered, or with an error
	failures bool     // that probes are answered with an error, but in time
	sessions bool     // that sessions fail
	starts   []string // that sessions cannot be begun, with one of these in the error
	upstream bool     // that what needs the upstream fails: its calls, attach, the first exec in a container
	calls    bool     // that no CRI call is answered
}

// recovery is how long after a fault its consequences are excused; on a busy machine it is as long as several commands
// take.
const recovery = 3 * time.Second

func (s *soakRun) openWindow(name string, e excuse) (end func()) {
	w := &window{name: name, begin: time.Now(), excuses: e}
	s.mu.Lock()
	s.windows = append(s.windows, w)
	s.mu.Unlock()
	s.note("fault begins: %s", name)
	say("fault: %s", name)
	return func() {
		s.mu.Lock()
		w.end = time.Now()
		s.mu.Unlock()
		s.note("fault ends: %s", name)
	}
}

// excused names the last fault between these times that explains it, if there is one.
func (s *soakRun) excused(begin, end time.Time, explains func(excuse) bool) string {
	s.mu.Lock()
	defer s.mu.Unlock()
	after := recovery + probeFactor*s.floorAt(begin.Sub(s.begin), end.Sub(s.begin))
	var names []string
	for _, w := range s.windows {
		if w.begin.After(end) || (!w.end.IsZero() && w.end.Add(after).Before(begin)) || !explains(w.excuses) {
			continue
		}
		names = append(names, w.name)
	}
	if len(names) == 0 {
		return ""
	}
	return names[len(names)-1]
}
