package main

import (
	"cmp"
	"fmt"
	"html"
	"maps"
	"math"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"
)

// report prints what was done and seen, and writes report.txt and soak.svg.
func (s *soakRun) report() {
	s.mu.Lock()
	defer s.mu.Unlock()
	var t strings.Builder
	fmt.Fprintf(&t, "seed %d, %v, %d sessions at most, %g begin each second at most\n", s.seed, s.duration, s.options.sessions, s.rate)
	t.WriteString("\nfaults:\n")
	faults := map[string]int{}
	for _, w := range s.windows {
		faults[w.name]++
	}
	for _, name := range slices.Sorted(maps.Keys(faults)) {
		fmt.Fprintf(&t, "  %4d %s\n", faults[name], name)
	}
	t.WriteString("\nsessions:\n")
	fmt.Fprintf(&t, "  %4d not begun, because the machine was busy\n", s.notBegun)
	for _, name := range slices.Sorted(maps.Keys(s.counts)) {
		fmt.Fprintf(&t, "  %4d %s\n", s.counts[name], name)
	}
	t.WriteString("\n")
	for _, kind := range []struct {
		name    string
		samples []sample
	}{{"probes", s.probes}, {"the same probes, asked of containerd", s.reference}, {"the same commands, by runc exec", s.floor}, {"calls", s.calls}} {
		excused, failed := 0, 0
		for _, one := range kind.samples {
			if one.excused {
				excused++
			} else if one.failed {
				failed++
			}
		}
		fmt.Fprintf(&t, "%s: %d, p50 %v, p90 %v, p99 %v, longest %v; %d failed; not counted are %d, while nobody could answer\n",
			kind.name, len(kind.samples), milliseconds(kind.samples, 50), milliseconds(kind.samples, 90), milliseconds(kind.samples, 99),
			milliseconds(kind.samples, 100), failed, excused)
	}
	each, floor := s.cpuOfCommand()
	fmt.Fprintf(&t, "CPU: streamshim itself %v, for each session and probe %v; runc exec %v each\n",
		s.cpu.Round(time.Millisecond), each.Round(time.Millisecond/10), floor.Round(time.Millisecond/10))
	t.WriteString("\n" + s.sparklines())
	if len(s.violations) == 0 {
		t.WriteString("\nno violation\n")
	} else {
		t.WriteString("\nviolations:\n")
		for _, kind := range slices.Sorted(maps.Keys(s.violations)) {
			fmt.Fprintf(&t, "  %4d %s\n", s.violations[kind], kind)
		}
		for _, detail := range s.details {
			fmt.Fprintf(&t, "  %s\n", detail)
		}
	}
	fmt.Print("\n", t.String(), "\n")
	for name, text := range map[string]string{"report.txt": t.String(), "soak.svg": s.plot()} {
		if err := os.WriteFile(filepath.Join(s.output, name), []byte(text), 0o644); err != nil {
			say("write %s: %v", name, err)
		}
	}
}

func milliseconds(samples []sample, percent int) time.Duration {
	return percentile(samples, percent).Round(time.Millisecond)
}

// columns is the width of the plot in the terminal.
const columns = 100

// sparklines are the most of each thing in each column's time.
func (s *soakRun) sparklines() string {
	column := func(at time.Duration) int {
		return min(max(int(float64(at)/float64(s.duration)*columns), 0), columns-1)
	}
	var probes, memory, sessions [columns]float64
	for _, p := range s.probes {
		if !p.excused {
			probes[column(p.at)] = math.Max(probes[column(p.at)], p.took.Seconds()*1000)
		}
	}
	for n, u := range s.samples {
		i := column(u.at)
		if n > 0 { // a short soak has fewer samples than columns
			for empty := i; empty > 0 && memory[empty] == 0; empty-- {
				memory[empty], sessions[empty] = float64(u.rss)/(1<<20), float64(u.sessions)
			}
		}
		memory[i] = math.Max(memory[i], float64(u.rss)/(1<<20))
		sessions[i] = math.Max(sessions[i], float64(u.sessions))
	}
	var t strings.Builder
	for _, line := range []struct {
		name, unit string
		values     []float64
	}{{"longest probe", "ms", probes[:]}, {"memory", "MiB", memory[:]}, {"sessions", "", sessions[:]}} {
		most := slices.Max(line.values)
		fmt.Fprintf(&t, "%-14s ", line.name)
		for _, v := range line.values {
			t.WriteRune([]rune(" ▁▂▃▄▅▆▇█")[int(math.Ceil(8*v/cmp.Or(most, 1)))])
		}
		fmt.Fprintf(&t, " at most %.0f %s\n", most, line.unit)
	}
	marks := slices.Repeat([]rune{' '}, columns)
	for _, w := range s.windows {
		marks[column(w.begin.Sub(s.begin))] = '^'
	}
	fmt.Fprintf(&t, "%-14s %s\n", "faults", string(marks))
	return t.String()
}

// plot draws latency, memory and sessions over time, with the faults behind them.
func (s *soakRun) plot() string {
	const left, width, high, gap = 70.0, 1000.0, 170.0, 46.0
	x := func(at time.Duration) float64 {
		return left + width*math.Min(math.Max(float64(at)/float64(s.duration), 0), 1)
	}
	panels := []string{"probe latency, ms (log)", "resident memory, MiB", "live sessions"}
	bottom := gap + float64(len(panels))*(high+gap)
	var t strings.Builder
	fmt.Fprintf(&t, `<svg xmlns="http://www.w3.org/2000/svg" width="%.0f" height="%.0f" font-family="sans-serif" font-size="12">`+"\n", left+width+20, bottom)
	t.WriteString(`<rect width="100%" height="100%" fill="white"/>` + "\n")
	fmt.Fprintf(&t, `<text x="10" y="16" font-weight="bold">make chaos, seed %d, %v</text>`+"\n", s.seed, s.duration)
	for i, w := range s.windows {
		from, to := x(w.begin.Sub(s.begin)), x(w.end.Sub(s.begin))
		fmt.Fprintf(&t, `<rect x="%.1f" y="%.0f" width="%.1f" height="%.0f" fill="#f3d9c9"/>`, from, gap, math.Max(to-from, 1), bottom-2*gap)
		fmt.Fprintf(&t, `<text x="%.1f" y="%.0f" font-size="9" fill="#a0522d">%s</text>`+"\n", from, bottom-gap+12+float64(i%3)*10, html.EscapeString(w.name))
	}
	frame := func(i int, least, most float64) (y func(float64) float64) {
		top := gap + float64(i)*(high+gap)
		fmt.Fprintf(&t, `<text x="%.0f" y="%.0f">%s</text>`, left, top-4, panels[i])
		fmt.Fprintf(&t, `<rect x="%.0f" y="%.0f" width="%.0f" height="%.0f" fill="none" stroke="#999"/>`, left, top, width, high)
		fmt.Fprintf(&t, `<text x="%.0f" y="%.0f" text-anchor="end">%.0f</text><text x="%.0f" y="%.0f" text-anchor="end">%.0f</text>`+"\n",
			left-4, top+10, most, left-4, top+high, least)
		return func(v float64) float64 { return top + high*(1-math.Min(math.Max((v-least)/(most-least), 0), 1)) }
	}
	const least, most = 1.0, 30000.0
	linear := frame(0, least, most)
	logarithmic := func(v float64) float64 {
		return linear(least + (most-least)*math.Log(math.Max(v, least)/least)/math.Log(most/least))
	}
	fmt.Fprintf(&t, `<line x1="%.0f" x2="%.0f" y1="%.1f" y2="%.1f" stroke="#c00" stroke-dasharray="4"/>`+"\n", left, left+width, logarithmic(1000), logarithmic(1000))
	for _, p := range s.probes {
		colour := "#3a7d44"
		if p.excused {
			colour = "#bbb"
		}
		fmt.Fprintf(&t, `<circle cx="%.1f" cy="%.1f" r="1.3" fill="%s"/>`, x(p.at), logarithmic(p.took.Seconds()*1000), colour)
	}
	line := func(panel int, value func(usage) float64) {
		highest := 1.0
		for _, u := range s.samples {
			highest = math.Max(highest, value(u))
		}
		y := frame(panel, 0, highest)
		t.WriteString(`<polyline fill="none" stroke="#1f4e79" points="`)
		for _, u := range s.samples {
			fmt.Fprintf(&t, "%.1f,%.1f ", x(u.at), y(value(u)))
		}
		t.WriteString(`"/>` + "\n")
	}
	line(1, func(u usage) float64 { return float64(u.rss) / (1 << 20) })
	line(2, func(u usage) float64 { return float64(u.sessions) })
	t.WriteString("</svg>\n")
	return t.String()
}
