package main

import (
	"math"
	"os"
	"slices"
	"strings"
	"testing"
	"time"
)

func TestVerdicts(t *testing.T) {
	figureOf := func(id string) figure {
		for _, f := range figures {
			if f.id == id {
				return f
			}
		}
		t.Fatalf("no figure %s", id)
		return figure{}
	}
	for _, test := range []struct {
		id                  string
		theirs, ours, floor []float64
		want                bool
	}{
		{"exec.p50", []float64{20, 20}, []float64{13, 13}, nil, true},
		{"exec.p50", []float64{20, 20}, []float64{13.2, 13.2}, nil, false},
		{"exec.p50", nil, []float64{1}, nil, false}, // nothing to compare with
		{"stdout.rate", []float64{1}, []float64{2.6}, []float64{3}, true},
		{"stdout.rate", []float64{1}, []float64{2.6}, []float64{4}, false},
		{"stdout.rate", []float64{1}, []float64{2.4}, []float64{2}, false},
		{"stdout.rate", []float64{1}, []float64{2.6}, nil, false}, // the floor was not measured
		{"call.small", []float64{100}, []float64{240}, nil, true},
		{"call.small", []float64{100}, []float64{260}, nil, false},
		{"cut1000.cpu", []float64{1}, []float64{5}, nil, true},
		{"cut1000.cpu", []float64{1}, []float64{5.1}, nil, false},
		{"cut1000.gone", []float64{1}, nil, nil, false},         // some commands stayed
		{"cut300.p50", []float64{1}, []float64{10}, nil, false}, // nothing is known of before
		{"exec.p99", []float64{1}, []float64{100}, nil, true},   // no bar
	} {
		r := results{test.id: {containerd: test.theirs, streamshim: test.ours, bareCopy: test.floor}}
		if _, ok := r.verdict(figureOf(test.id)); ok != test.want {
			t.Errorf("%s: containerd %v, streamshim %v, floor %v: met %v", test.id, test.theirs, test.ours, test.floor, ok)
		}
	}
}

// While sessions end, probes may take three times as long as before, whatever containerd takes.
func TestVerdictOfCalm(t *testing.T) {
	i := slices.IndexFunc(figures, func(f figure) bool { return f.id == "cut300.p50" })
	for during, want := range map[float64]bool{30: true, 30.1: false} {
		r := results{}
		r.add("cut300.quiet", streamshim, 10)
		r.add("cut300.p50", streamshim, during)
		if _, ok := r.verdict(figures[i]); ok != want {
			t.Errorf("%v after 10: met %v", during, ok)
		}
	}
}

// Other load on the machine in one round weighs on both sides of it, and not on the ratio.
func TestRatioOfRounds(t *testing.T) {
	r := results{}
	for _, load := range []float64{1, 10, 3} {
		r.add("x", containerd, 20*load)
		r.add("x", streamshim, 10*load)
	}
	if got := r.ratio("x", streamshim, containerd); got != 0.5 {
		t.Errorf("ratio %v", got)
	}
	if got := percentile([]float64{4, 1, 3, 2}, 50); got != 2.5 {
		t.Errorf("median %v", got)
	}
	if got := percentile([]float64{4, 1, 3, 2}, 100); got != 4 {
		t.Errorf("maximum %v", got)
	}
	if !math.IsNaN(median(nil)) {
		t.Error("the median of nothing is a number")
	}
}

func TestReport(t *testing.T) {
	b := &bench{results: results{}}
	b.results.add("exec.p50", containerd, 20)
	b.results.add("exec.p50", streamshim, 19)
	b.results.add("call.small", containerd, 100)
	b.results.add("call.small", streamshim, 200)
	table := b.table()
	for _, want := range []string{"| exec round trip, p50 | ms | 20.0 | 19.0 | 0.95 |", "**missed**", "| +100 |", "| met |"} {
		if !strings.Contains(table, want) {
			t.Errorf("no %q in\n%s", want, table)
		}
	}
	if plot := b.plot(); !strings.Contains(plot, "exec round trip, p50") || strings.Contains(plot, "NaN") {
		t.Errorf("plot:\n%s", plot)
	}
}

// TestAccount counts the CPU time of this very process.
func TestAccount(t *testing.T) {
	own, err := accountOf(os.Getpid())
	if err != nil {
		t.Fatal(err)
	}
	before, err := own.used()
	if err != nil {
		t.Fatal(err)
	}
	for begin := time.Now(); time.Since(begin) < 20*time.Millisecond; {
		_ = median([]float64{3, 1, 2})
	}
	after, err := own.used()
	if err != nil || after <= before {
		t.Errorf("CPU time %v, then %v, %v", before, after, err)
	}
	if kib, err := own.memory(); err != nil || kib <= 0 {
		t.Errorf("memory %d KiB, %v", kib, err)
	}
}
