package main

import (
	"fmt"
	"math"
	"slices"
	"time"
)

// figure is one line of the table.
type figure struct {
	id, title, unit string
	digits          int // after the point
	// bar is what the ratio of streamshim to containerd may be: at most, or at least when higher is
	// better. Zero means that there is none.
	bar    float64
	higher bool
	// added makes the difference the figure instead of the ratio, and limit its bar.
	added bool
	limit float64
	// most is what streamshim's own figure may be, and calm names another of its figures, of which this one may be
	// calmTimes as much.
	most float64
	calm string
	// floor is the id of the bare copy's figure, which streamshim is to reach to within 15 %.
	floor bool
}

// calmTimes is how many times slower probes may be while many sessions end.
const calmTimes = 3

// within is how close to the floor a throughput is to come.
const within = 0.85

// figures are all there are, in the table's order.
var figures = []figure{
	{id: "exec.p50", title: "exec round trip, p50", unit: "ms", digits: 1, bar: 0.65},
	{id: "exec.p99", title: "exec round trip, p99", unit: "ms", digits: 1},
	{id: "exec.cpu", title: "CPU per exec", unit: "ms", digits: 1, bar: 0.65},
	{id: "sync.p50", title: "ExecSync, p50", unit: "ms", digits: 1, bar: 0.65},
	{id: "sync.p99", title: "ExecSync, p99", unit: "ms", digits: 1},
	{id: "sync.cpu", title: "CPU per ExecSync", unit: "ms", digits: 1, bar: 0.65},
	{id: "seccomp.p50", title: "exec with a seccomp profile, p50", unit: "ms", digits: 1},
	{id: "seccomp.cpu", title: "CPU per exec with a seccomp profile", unit: "ms", digits: 1},
	{id: "storm.p99", title: "50 execs at once, p99", unit: "ms", digits: 0},
	{id: "cut300.quiet", title: "300 sessions cut at once: probe before, p50", unit: "ms", digits: 0},
	{id: "cut300.p50", title: "300 sessions cut at once: probe, p50", unit: "ms", digits: 0, calm: "cut300.quiet"},
	{id: "cut300.max", title: "300 sessions cut at once: longest probe", unit: "ms", digits: 0, most: 1000},
	{id: "cut300.gone", title: "300 sessions cut at once: commands gone after", unit: "s", digits: 1, most: 15},
	{id: "cut300.cpu", title: "300 sessions cut at once: the server's CPU", unit: "s", digits: 2, most: 1.5},
	{id: "cut300.memory", title: "300 sessions cut at once: the server's peak memory", unit: "MiB", digits: 0, most: 150},
	{id: "cut300tty.quiet", title: "300 terminals cut at once: probe before, p50", unit: "ms", digits: 0},
	{id: "cut300tty.p50", title: "300 terminals cut at once: probe, p50", unit: "ms", digits: 0, calm: "cut300tty.quiet"},
	{id: "cut300tty.max", title: "300 terminals cut at once: longest probe", unit: "ms", digits: 0, most: 1000},
	{id: "cut300tty.gone", title: "300 terminals cut at once: commands gone after", unit: "s", digits: 1, most: 15},
	{id: "cut300tty.cpu", title: "300 terminals cut at once: the server's CPU", unit: "s", digits: 2, most: 1.5},
	{id: "cut300tty.memory", title: "300 terminals cut at once: the server's peak memory", unit: "MiB", digits: 0, most: 150},
	{id: "cut1000.quiet", title: "1000 sessions cut at once: probe before, p50", unit: "ms", digits: 0},
	{id: "cut1000.p50", title: "1000 sessions cut at once: probe, p50", unit: "ms", digits: 0, calm: "cut1000.quiet"},
	{id: "cut1000.max", title: "1000 sessions cut at once: longest probe", unit: "ms", digits: 0, most: 1000},
	{id: "cut1000.gone", title: "1000 sessions cut at once: commands gone after", unit: "s", digits: 1, most: 15},
	{id: "cut1000.cpu", title: "1000 sessions cut at once: the server's CPU", unit: "s", digits: 2, most: 5},
	{id: "cut1000.memory", title: "1000 sessions cut at once: the server's peak memory", unit: "MiB", digits: 0, most: 150},
	{id: "hog.cpu", title: "a probe that times out beside 20 processes full of descriptors: the server's CPU", unit: "s", digits: 2, most: 0.2},
	{id: "hog.late", title: "the same: answered after the timeout", unit: "s", digits: 1},
	{id: "stdout.rate", title: "stdout", unit: "GB/s", digits: 2, bar: 2.5, higher: true, floor: true},
	{id: "stdout.cpu", title: "stdout, CPU", unit: "s/GB", digits: 2, bar: 0.35},
	{id: "stdin.rate", title: "stdin", unit: "GB/s", digits: 2, bar: 2.5, higher: true, floor: true},
	{id: "stdin.cpu", title: "stdin, CPU", unit: "s/GB", digits: 2, bar: 0.35},
	{id: "down.rate", title: "port-forward, from the pod", unit: "GB/s", digits: 2, bar: 2, higher: true, floor: true},
	{id: "down.cpu", title: "port-forward, from the pod, CPU", unit: "s/GB", digits: 2, bar: 0.5},
	{id: "up.rate", title: "port-forward, to the pod", unit: "GB/s", digits: 2, bar: 2, higher: true, floor: true},
	{id: "up.cpu", title: "port-forward, to the pod, CPU", unit: "s/GB", digits: 2, bar: 0.5},
	{id: "short.p50", title: "short connection through an open tunnel, p50", unit: "ms", digits: 2, bar: 0.7},
	{id: "short.rate", title: "short connections, 16 at once", unit: "1/s", digits: 0, higher: true},
	{id: "key.p50", title: "keystroke echo with 200 idle sessions, p50", unit: "µs", digits: 0, bar: 0.7},
	{id: "key.p99", title: "keystroke echo with 200 idle sessions, p99", unit: "µs", digits: 0},
	{id: "idle.tty", title: "memory per idle terminal session", unit: "KiB", digits: 0, bar: 0.2},
	{id: "idle.forward", title: "memory per idle forwarded connection", unit: "KiB", digits: 0},
	{id: "call.small", title: "forwarded call, small (Version), p50", unit: "µs", digits: 0, added: true, limit: 150},
	{id: "call.large", title: "forwarded call, large (ListContainers), p50", unit: "µs", digits: 0, added: true},
}

// subject is who was measured.
type subject string

const (
	containerd subject = "containerd"
	streamshim subject = "streamshim"
	bareCopy   subject = "floor"
)

// results are the values of every figure, one for each round.
type results map[string]map[subject][]float64

func (r results) add(id string, who subject, value float64) {
	if r[id] == nil {
		r[id] = map[subject][]float64{}
	}
	r[id][who] = append(r[id][who], value)
}

func (r results) median(id string, who subject) float64 { return median(r[id][who]) }

// ratio is the median of the rounds' ratios: both sides of a round were measured within seconds, so
// that other load on the machine weighs on both.
func (r results) ratio(id string, who, base subject) float64 {
	return r.pairwise(id, who, base, func(a, b float64) float64 { return a / b })
}

func (r results) difference(id string, who, base subject) float64 {
	return r.pairwise(id, who, base, func(a, b float64) float64 { return a - b })
}

func (r results) pairwise(id string, who, base subject, join func(a, b float64) float64) float64 {
	a, b := r[id][who], r[id][base]
	joined := make([]float64, min(len(a), len(b)))
	for i := range joined {
		joined[i] = join(a[i], b[i])
	}
	return median(joined)
}

// verdict of a figure; empty when it has no bar. ok is false when a bar is missed.
func (r results) verdict(f figure) (text string, ok bool) {
	switch {
	case f.limit > 0:
		ok = r.difference(f.id, streamshim, containerd) <= f.limit
		text = fmt.Sprintf("≤ +%.0f %s", f.limit, f.unit)
	case f.most > 0:
		ok = r.median(f.id, streamshim) <= f.most
		text = fmt.Sprintf("≤ %.*f %s", f.digits, f.most, f.unit)
	case f.calm != "":
		ok = r.median(f.id, streamshim) <= calmTimes*r.median(f.calm, streamshim)
		text = fmt.Sprintf("≤ %d times that before", calmTimes)
	case f.bar > 0 && f.higher:
		ok = r.ratio(f.id, streamshim, containerd) >= f.bar
		text = fmt.Sprintf("≥ %.2f", f.bar)
	case f.bar > 0:
		ok = r.ratio(f.id, streamshim, containerd) <= f.bar
		text = fmt.Sprintf("≤ %.2f", f.bar)
	default:
		return "", true
	}
	if f.floor {
		ok = ok && r.ratio(f.id, streamshim, bareCopy) >= within
		text += fmt.Sprintf(", %.2f of floor", within)
	}
	return text, ok
}

// median of no values is NaN, which no bar accepts.
func median(values []float64) float64 { return percentile(values, 50) }

func percentile(values []float64, percent float64) float64 {
	if len(values) == 0 {
		return math.NaN()
	}
	sorted := slices.Sorted(slices.Values(values))
	at := percent / 100 * float64(len(sorted)-1)
	below := int(at)
	if below+1 == len(sorted) {
		return sorted[below]
	}
	return sorted[below] + (at-float64(below))*(sorted[below+1]-sorted[below])
}

// in converts durations to numbers of a unit.
func in(unit time.Duration, durations []time.Duration) []float64 {
	values := make([]float64, len(durations))
	for i, d := range durations {
		values[i] = float64(d) / float64(unit)
	}
	return values
}
