package main

import (
	"bytes"
	"context"
	"fmt"
	"io/fs"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/prometheus/common/expfmt"
	"github.com/prometheus/common/model"
	"golang.org/x/sys/unix"
)

// describe says of a process in a container what it is and since when.
func describe(process string, status []byte) string {
	command, _ := os.ReadFile(process + "/cmdline") //nolint:errcheck // it may have ended meanwhile
	var parent, state string
	for line := range strings.Lines(string(status)) {
		if value, ok := strings.CutPrefix(line, "PPid:"); ok {
			parent = strings.TrimSpace(value)
		}
		if value, ok := strings.CutPrefix(line, "State:"); ok {
			state = strings.TrimSpace(value)
		}
	}
	var up unix.Timespec
	unix.ClockGettime(unix.CLOCK_BOOTTIME, &up) //nolint:errcheck // cannot fail for this clock
	stat, _ := os.ReadFile(process + "/stat")   //nolint:errcheck // as above
	fields := strings.Fields(string(stat[bytes.LastIndexByte(stat, ')')+1:]))
	begun := "?"
	const start = 19 // of the fields behind the name, in ticks of 10 ms since boot
	if len(fields) > start {
		ticks, _ := strconv.ParseInt(fields[start], 10, 64) //nolint:errcheck // then it is since boot
		begun = time.Now().Add(time.Duration(ticks)*10*time.Millisecond - time.Duration(up.Nano())).Format(time.TimeOnly)
	}
	return fmt.Sprintf("%q, child of %s, %s, since %s; ", bytes.ReplaceAll(command, []byte{0}, []byte{' '}), parent, state, begun)
}

// metricsAddress is streamshim's. The node lock of the tests, or the machine of one's own, keeps it free.
const metricsAddress = "127.0.0.1:29464"

// account is what could be left behind.
type account struct {
	sessions    int // live ones in streamshim
	descriptors int // of streamshim
	goroutines  int
	children    int    // of streamshim, zombies too
	members     int    // processes in the stable containers, without zombies: to reap orphans is the container's task
	programs    string // what those are
	records     int    // files in the state directory
	mounts      int    // below the node's folder
	namespaces  int    // network namespaces that CNI made for this node
	buffered    int64  // bytes of unread data
	heap        int64
	rss         int64
}

// What an account may have above the one before: descriptors and goroutines of connections that are on their way
// out or are kept for the next call, memory of pools and caches.
const (
	moreDescriptors = 6
	moreGoroutines  = 12
	moreHeap        = 6 << 20
	moreRSS         = 64 << 20
)

func (a account) String() string {
	return fmt.Sprintf("%d sessions, %d descriptors, %d goroutines, %d children, %d processes in containers, %d records, %d mounts, %d network namespaces, heap %.1f MiB, RSS %.1f MiB",
		a.sessions, a.descriptors, a.goroutines, a.children, a.members, a.records, a.mounts, a.namespaces, float64(a.heap)/(1<<20), float64(a.rss)/(1<<20))
}

// above lists what a has more than before, beyond what it may.
// Interrupted is how many pods were being made when containerd was killed: of each it may leave a network namespace
// and two mounts, which nobody knows of afterwards.
func (a account) above(before account, interrupted int) []string {
	var found []string
	for _, one := range []struct {
		what              string
		now, before, more int64
		details           string
	}{
		{"sessions", int64(a.sessions), int64(before.sessions), 0, ""},
		{"descriptors", int64(a.descriptors), int64(before.descriptors), moreDescriptors, ""},
		{"goroutines", int64(a.goroutines), int64(before.goroutines), moreGoroutines, ""},
		{"child processes", int64(a.children), int64(before.children), 0, ""},
		{"processes in containers", int64(a.members), int64(before.members), 0, "(" + a.programs + ")"},
		{"records", int64(a.records), int64(before.records), 0, ""},
		{"mounts", int64(a.mounts), int64(before.mounts), 2 * int64(interrupted), ""},
		{"network namespaces", int64(a.namespaces), int64(before.namespaces), int64(interrupted), ""},
		{"buffered bytes", a.buffered, before.buffered, 0, ""},
		{"heap bytes", a.heap, before.heap, moreHeap, ""},
		{"RSS bytes", a.rss, before.rss, moreRSS, ""},
	} {
		if one.now > one.before+one.more {
			found = append(found, fmt.Sprintf("%d %s, before there were %d %s", one.now, one.what, one.before, one.details))
		}
	}
	return found
}

// settleTime is longer than a session needs to be given up whose client was lost (55 s), and a command to be killed
// after it.
const settleTime = 100 * time.Second

// settleTimeOfTeeth is for a run in which no client is lost.
const settleTimeOfTeeth = 30 * time.Second

// settledAccount waits until no more is there than before, or, without a before, until nothing changes any more.
func (s *soakRun) settledAccount(ctx context.Context, before *account) (account, error) {
	deadline := time.Now().Add(settleTime)
	if s.teeth && before != nil {
		deadline = time.Now().Add(settleTimeOfTeeth)
	}
	last := account{}
	for {
		now, err := s.takeAccount(ctx)
		if err != nil {
			return now, err
		}
		if before == nil {
			same := now
			same.heap, same.rss = last.heap, last.rss
			// The main processes of the containers are all that may be there.
			if same == last && now.sessions == 0 && now.children == 0 && now.members == 2*stablePods {
				return now, nil
			}
		} else if len(now.above(*before, s.pods.interrupted())) == 0 {
			return now, nil
		}
		if time.Now().After(deadline) || !pause(ctx, time.Second) {
			return now, ctx.Err()
		}
		last = now
	}
}

func (s *soakRun) takeAccount(ctx context.Context) (account, error) {
	pid := s.node.PID("streamshim")
	if pid == 0 {
		return account{}, fmt.Errorf("streamshim does not run")
	}
	// Two collections: the first one moves what pools hold aside.
	for range 2 {
		if _, err := get(ctx, "/debug/pprof/heap?gc=1"); err != nil {
			return account{}, err
		}
	}
	metrics, err := scrape(ctx)
	if err != nil {
		return account{}, err
	}
	a := account{
		sessions:   int(metrics["streamshim_sessions_live"]),
		goroutines: int(metrics["go_goroutines"]),
		buffered:   int64(metrics["streamshim_buffered_bytes"]),
		heap:       int64(metrics["go_memstats_heap_alloc_bytes"]),
	}
	if a.descriptors, err = countDescriptors(pid); err != nil {
		return a, err
	}
	a.rss = residentMemory(pid)
	processes, err := filepath.Glob("/proc/[0-9]*")
	if err != nil {
		return a, err
	}
	for _, process := range processes {
		status, err := os.ReadFile(process + "/status")
		if err != nil {
			continue // it has ended meanwhile
		}
		if bytes.Contains(status, []byte("\nPPid:\t"+strconv.Itoa(pid)+"\n")) {
			a.children++
		}
		if bytes.Contains(status, []byte("\nState:\tZ")) {
			continue
		}
		cgroup, err := os.ReadFile(process + "/cgroup")
		if err != nil {
			continue // as above
		}
		for _, p := range s.pods.stable {
			if bytes.Contains(cgroup, []byte(p.shell)) || bytes.Contains(cgroup, []byte(p.lab)) {
				a.members++
				a.programs += describe(process, status)
			}
		}
	}
	err = filepath.WalkDir(filepath.Join(s.dir, "state"), func(_ string, entry fs.DirEntry, err error) error {
		if err == nil && !entry.IsDir() {
			a.records++
		}
		return nil
	})
	if err != nil {
		return a, err
	}
	// Pods of victims and hostile pods come and go: their mounts are those of containerd's.
	mounts, err := os.ReadFile("/proc/self/mounts")
	if err != nil {
		return a, err
	}
	live := s.pods.all()
	for line := range strings.Lines(string(mounts)) {
		if !strings.Contains(line, " "+s.dir+"/") {
			continue
		}
		ours := false
		for _, p := range live {
			if p.kind != stable && !p.dead() {
				ours = ours || strings.Contains(line, p.sandbox) || strings.Contains(line, p.shell) || p.lab != "" && strings.Contains(line, p.lab)
			}
		}
		switch {
		case strings.Contains(line, "/cni-"):
			a.namespaces++
		case !ours:
			a.mounts++
		}
	}
	// One for each victim and hostile pod that lives.
	for _, p := range live {
		if p.kind != stable && !p.dead() {
			a.namespaces--
		}
	}
	return a, nil
}

func countDescriptors(pid int) (int, error) {
	entries, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", pid))
	return len(entries), err
}

// residentMemory is 0 when the process is gone.
func residentMemory(pid int) int64 {
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/statm", pid))
	if err != nil {
		return 0
	}
	fields := strings.Fields(string(text))
	if len(fields) < 2 {
		return 0
	}
	pages, err := strconv.ParseInt(fields[1], 10, 64)
	if err != nil {
		return 0
	}
	return pages * int64(os.Getpagesize())
}

func get(ctx context.Context, path string) ([]byte, error) {
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+metricsAddress+path, nil)
	if err != nil {
		return nil, err
	}
	request.Close = true // no connection that stays
	response, err := http.DefaultClient.Do(request)
	if err != nil {
		return nil, err
	}
	defer response.Body.Close() //nolint:errcheck // only read
	var body bytes.Buffer
	_, err = body.ReadFrom(response.Body)
	return body.Bytes(), err
}

// scrape returns the sums of all metrics over their labels.
func scrape(ctx context.Context) (map[string]float64, error) {
	text, err := get(ctx, "/metrics")
	if err != nil {
		return nil, err
	}
	parser := expfmt.NewTextParser(model.UTF8Validation)
	families, err := parser.TextToMetricFamilies(bytes.NewReader(text))
	if err != nil {
		return nil, err
	}
	sums := map[string]float64{}
	for name, family := range families {
		for _, metric := range family.Metric {
			sums[name] += metric.GetGauge().GetValue() + metric.GetCounter().GetValue()
		}
	}
	return sums, nil
}

// usage is what streamshim has at a time.
type usage struct {
	at          time.Duration
	rss         int64
	descriptors int
	goroutines  int
	sessions    int
}

// watch samples streamshim until the context ends.
func (s *soakRun) watch(ctx context.Context) {
	var used time.Duration // by the one that runs now
	var counted int        // its pid
	every(ctx, time.Second, func() {
		pid := s.node.PID("streamshim")
		if pid == 0 {
			return
		}
		if pid != counted {
			counted, used = pid, 0
		}
		before := used
		used = max(used, cpuTime(pid))
		one := usage{at: time.Since(s.begin), rss: residentMemory(pid)}
		one.descriptors, _ = countDescriptors(pid) //nolint:errcheck // 0 when it is gone
		if metrics, err := scrape(ctx); err == nil {
			one.goroutines, one.sessions = int(metrics["go_goroutines"]), int(metrics["streamshim_sessions_live"])
		}
		s.mu.Lock()
		defer s.mu.Unlock()
		s.samples = append(s.samples, one)
		s.cpu += used - before
	})
}

// cpuTime is what a process itself has used, 0 when it is gone.
func cpuTime(pid int) time.Duration {
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return 0
	}
	_, rest, _ := strings.Cut(string(text), ") ") // the name is streamshim's own and has no such end
	fields := strings.Fields(rest)
	const user, system = 14 - 3, 15 - 3 // counted from the third, proc_pid_stat(5)
	if len(fields) <= system {
		return 0
	}
	var ticks int64
	for _, field := range []string{fields[user], fields[system]} {
		n, err := strconv.ParseInt(field, 10, 64)
		if err != nil {
			return 0
		}
		ticks += n
	}
	return time.Duration(ticks) * 10 * time.Millisecond // USER_HZ is 100 on every architecture that Go runs on
}
