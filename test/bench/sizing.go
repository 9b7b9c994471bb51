package main

import (
	"context"
	"errors"
	"fmt"
	"html"
	"math"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"time"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/streamshim/streamshim/test/internal/node"
	"github.com/streamshim/streamshim/test/internal/tables"
)

// sizing measures what the exec probes of a full node cost at each side.
type sizing struct {
	*bench
	numbers []int // of pods, ascending
	length  time.Duration
	report  string // a document, whose part "sizing" is written; empty is none

	containers []string // IDs, one in each pod
	pods       *account // of all containers, whose last steps of runc are in them
	rows       []load
}

// load is what was measured at one number of pods, one period and one side.
type load struct {
	pods              int
	period            time.Duration
	who               subject
	answered          float64 // per second
	failed            int
	p50, p99          float64 // ms
	cores             float64 // CPU time of the servers and of runc, per second
	runtime, streamer int64   // most memory of containerd with its shims, and of streamshim with its runc, KiB
}

// probePeriods are periodSeconds of the probes: the kubelet's default, and the shortest that it knows.
var probePeriods = []time.Duration{10 * time.Second, time.Second}

const (
	// probeTimeout is timeoutSeconds of the probes. It is long, so that what is late has a number.
	probeTimeout = 10 * time.Second
	// memoryPeriod is how often memory is looked at.
	memoryPeriod = 5 * time.Second
)

// run brings up the pods and measures each number of them, each period and each side.
func (z *sizing) run(ctx context.Context) error {
	for _, number := range z.numbers {
		if err := z.fill(ctx, number); err != nil {
			return err
		}
		for _, period := range probePeriods {
			for _, s := range z.sides {
				l, err := z.measure(ctx, s, period)
				if err != nil {
					return fmt.Errorf("%s: %w", s.name, err)
				}
				z.rows = append(z.rows, l)
				progress("%d pods, a probe each %v, %s: %.1f answered each second, p99 %.0f ms", number, period, s.name, l.answered, l.p99)
			}
		}
	}
	return z.write()
}

// fill adds pods of one small container until there are so many.
func (z *sizing) fill(ctx context.Context, number int) error {
	first := len(z.containers)
	z.containers = append(z.containers, make([]string, number-first)...)
	added := z.containers[first:]
	err := fourAtOnce(len(added), func(i int) error {
		pod, err := z.node.RunPod(ctx, node.PodSpec{Name: fmt.Sprintf("sized-%d", first+i)})
		if err != nil {
			return err
		}
		added[i], err = z.node.RunContainer(ctx, pod, node.ContainerSpec{})
		return err
	})
	if err != nil || z.pods != nil {
		return err
	}
	pid, err := node.ContainerPID(ctx, z.node.Upstream(), z.containers[0])
	if err != nil {
		return err
	}
	one, err := accountOf(pid)
	if err != nil {
		return err
	}
	z.pods = &account{dir: filepath.Dir(one.dir)}
	return nil
}

// measure runs the probes as the kubelet does: each container has a worker that asks each period, unless the last answer is
// not there yet. What is asked in the first period is not counted.
func (z *sizing) measure(ctx context.Context, s side, period time.Duration) (load, error) {
	l := load{pods: len(z.containers), period: period, who: s.name}
	asking, cancel := context.WithTimeout(ctx, period+z.length)
	defer cancel()
	begin := time.Now().Add(period)
	var mu sync.Mutex
	var durations []time.Duration
	var failures []error
	var workers sync.WaitGroup
	for i, container := range z.containers {
		workers.Go(func() {
			phase := time.NewTimer(period * time.Duration(i) / time.Duration(len(z.containers)))
			defer phase.Stop()
			select {
			case <-asking.Done():
				return
			case <-phase.C:
			}
			ticks := time.NewTicker(period)
			defer ticks.Stop()
			for {
				asked := time.Now()
				err := probe(ctx, s, container)
				mu.Lock()
				switch {
				case asked.Before(begin): // not counted
				case err != nil:
					failures = append(failures, err)
				default:
					durations = append(durations, time.Since(asked))
				}
				mu.Unlock()
				select {
				case <-asking.Done():
					return
				case <-ticks.C:
				}
			}
		})
	}
	err := z.watch(asking, begin, &l)
	cancel()
	workers.Wait() // for the last answers, too
	if len(durations) == 0 {
		return l, errors.Join(err, fmt.Errorf("no probe was answered: %w", errors.Join(failures...)))
	}
	if len(failures) > 0 {
		progress("%d probes failed, the first: %v", len(failures), failures[0])
	}
	milliseconds := in(time.Millisecond, durations)
	l.answered, l.failed = float64(len(durations))/z.length.Seconds(), len(failures)
	l.p50, l.p99 = percentile(milliseconds, 50), percentile(milliseconds, 99)
	return l, err
}

func probe(ctx context.Context, s side, container string) error {
	response, err := s.client.ExecSync(ctx, &runtimeapi.ExecSyncRequest{
		ContainerId: container, Cmd: []string{"true"}, Timeout: int64(probeTimeout.Seconds()),
	})
	if err == nil && response.ExitCode != 0 {
		err = fmt.Errorf("true: exit code %d", response.ExitCode)
	}
	return err
}

// watch measures CPU time and memory from begin until the context ends.
func (z *sizing) watch(ctx context.Context, begin time.Time, l *load) error {
	select {
	case <-ctx.Done():
		return context.Cause(ctx)
	case <-time.After(time.Until(begin)):
	}
	all := append(accounts{z.pods}, z.servers...)
	before, err := all.used()
	if err != nil {
		return err
	}
	looks := time.NewTicker(memoryPeriod)
	defer looks.Stop()
	for ended := false; !ended; {
		select {
		case <-ctx.Done():
			ended = true
		case <-looks.C:
			if err := z.look(l); err != nil {
				return err
			}
		}
	}
	after, err := all.used()
	l.cores = (after - before).Seconds() / time.Since(begin).Seconds()
	return errors.Join(err, z.look(l))
}

func (z *sizing) look(l *load) error {
	for i, most := range []*int64{&l.runtime, &l.streamer} { // as newBench makes the accounts
		now, err := z.servers[i].memory()
		if err != nil {
			return err
		}
		*most = max(*most, now)
	}
	return nil
}

// write prints the table and stores it with the plot.
func (z *sizing) write() error {
	var t strings.Builder
	fmt.Fprintf(&t, "On %s with %d CPUs, by `make sizing`: pods of one small container (a shell that sleeps) beside the pause container. Each container has an exec "+
		"probe (`true`); each line is %v of it. Both sides are on the same node, one after the other.\n\n", time.Now().UTC().Format(time.DateOnly), runtime.NumCPU(), z.length)
	t.WriteString("| pods | a probe each | through | asked for, per s | answered, per s | failed | p50, ms | p99, ms | CPU, cores | CPU per probe, ms | containerd and shims, MiB | streamshim, MiB |\n")
	t.WriteString("|---:|---:|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|\n")
	for _, l := range z.rows {
		streamer := fmt.Sprintf("%.0f", float64(l.streamer)/1024)
		if l.who == containerd {
			streamer = "" // it runs, but nothing goes through it
		}
		fmt.Fprintf(&t, "| %d | %v | %s | %.1f | %.1f | %d | %.0f | %.0f | %.2f | %.1f | %.0f | %s |\n", l.pods, l.period, l.who,
			l.asked(), l.answered, l.failed, l.p50, l.p99, l.cores, l.each(), float64(l.runtime)/1024, streamer)
	}
	fmt.Print(t.String())
	if z.report == "" {
		return nil
	}
	picture := strings.TrimSuffix(z.report, filepath.Ext(z.report)) + ".svg"
	fmt.Fprintf(&t, "\n![CPU time and latency of probes](%s)\n", filepath.Base(picture))
	return errors.Join(
		tables.Replace(z.report, "sizing", t.String()),
		os.WriteFile(picture, []byte(z.plot()), 0o644),
	)
}

func (l load) asked() float64 { return float64(l.pods) / l.period.Seconds() }

// each is the CPU time for each answered probe in milliseconds.
func (l load) each() float64 { return l.cores * 1000 / l.answered }

// plot draws two bars for each line of the table: CPU time, and the 99th percentile.
func (z *sizing) plot() string {
	const left, width, row, top = 260.0, 300.0, 22.0, 40.0
	panels := []struct {
		title, format string
		value         func(load) float64
	}{
		{"CPU, cores", "%.2f", func(l load) float64 { return l.cores }},
		{"p99 of a probe, ms", "%.0f", func(l load) float64 { return l.p99 }},
	}
	var s strings.Builder
	fmt.Fprintf(&s, `<svg xmlns="http://www.w3.org/2000/svg" width="%.0f" height="%.0f" font-family="sans-serif" font-size="13">`+"\n",
		left+float64(len(panels))*(width+80), top+row*float64(len(z.rows))+10)
	s.WriteString(`<rect width="100%" height="100%" fill="white"/>` + "\n")
	for i, p := range panels {
		x, most := left+float64(i)*(width+80), 0.0
		for _, l := range z.rows {
			most = math.Max(most, p.value(l))
		}
		fmt.Fprintf(&s, `<text x="%.1f" y="24" font-weight="bold">%s</text>`+"\n", x, p.title)
		for j, l := range z.rows {
			y, colour := top+row*float64(j), map[subject]string{containerd: "#7a8b99", streamshim: "#3a7d44"}[l.who]
			if i == 0 {
				fmt.Fprintf(&s, `<text x="%.1f" y="%.1f" text-anchor="end">%s</text>`+"\n", left-8, y+14,
					html.EscapeString(fmt.Sprintf("%d pods, each %v, %s", l.pods, l.period, l.who)))
			}
			long := width * p.value(l) / most
			fmt.Fprintf(&s, `<rect x="%.1f" y="%.1f" width="%.1f" height="%.1f" fill="%s"/><text x="%.1f" y="%.1f">`+p.format+"</text>\n",
				x, y+2, long, row-7, colour, x+long+5, y+14, p.value(l))
		}
	}
	s.WriteString("</svg>\n")
	return s.String()
}

// parseNumbers reads "110 250".
func parseNumbers(text string) ([]int, error) {
	var numbers []int
	for _, field := range strings.Fields(text) {
		number, err := strconv.Atoi(field)
		if err != nil || number < 1 || number > 250 || len(numbers) > 0 && number <= numbers[len(numbers)-1] {
			return nil, fmt.Errorf("-sizing: %q: numbers of pods from 1 to 250, ascending", text)
		}
		numbers = append(numbers, number)
	}
	return numbers, nil
}
