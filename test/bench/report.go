package main

import (
	"fmt"
	"html"
	"math"
	"strings"
)

// table is the results as a markdown table.
func (b *bench) table() string {
	var t strings.Builder
	t.WriteString("| figure | unit | containerd | streamshim | ratio | floor | of floor | bar | |\n")
	t.WriteString("|---|---|---:|---:|---:|---:|---:|---|---|\n")
	for _, f := range figures {
		if len(b.results[f.id][streamshim]) == 0 {
			continue
		}
		ratio := fmt.Sprintf("%.2f", b.results.ratio(f.id, streamshim, containerd))
		if f.added {
			ratio = fmt.Sprintf("%+.0f", b.results.difference(f.id, streamshim, containerd))
		}
		floor, ofFloor := "", ""
		if len(b.results[f.id][bareCopy]) > 0 {
			floor = fmt.Sprintf("%.*f", f.digits, b.results.median(f.id, bareCopy))
			ofFloor = fmt.Sprintf("%.2f", b.results.ratio(f.id, streamshim, bareCopy))
		}
		bar, ok := b.results.verdict(f)
		word := ""
		if bar != "" {
			word = map[bool]string{true: "met", false: "**missed**"}[ok]
		}
		fmt.Fprintf(&t, "| %s | %s | %.*f | %.*f | %s | %s | %s | %s | %s |\n", f.title, f.unit,
			f.digits, b.results.median(f.id, containerd), f.digits, b.results.median(f.id, streamshim),
			ratio, floor, ofFloor, bar, word)
	}
	return t.String()
}

// plot draws how many times better than containerd streamshim is, one bar for each figure that is a
// ratio, on a logarithmic scale, with a mark where the figure's own bar lies.
func (b *bench) plot() string {
	const (
		left, width, row, top = 380.0, 520.0, 24.0, 46.0
		least, most           = 0.5, 32.0 // times better
	)
	x := func(better float64) float64 {
		better = math.Max(least, math.Min(most, better))
		return left + width*math.Log(better/least)/math.Log(most/least)
	}
	var shown []figure
	for _, f := range figures {
		if !f.added && !math.IsNaN(b.results.ratio(f.id, streamshim, containerd)) {
			shown = append(shown, f)
		}
	}
	height := top + row*float64(len(shown)) + 12
	var s strings.Builder
	fmt.Fprintf(&s, `<svg xmlns="http://www.w3.org/2000/svg" width="%.0f" height="%.0f" font-family="sans-serif" font-size="13">`+"\n", left+width+70, height)
	s.WriteString(`<rect width="100%" height="100%" fill="white"/>` + "\n")
	fmt.Fprintf(&s, `<text x="10" y="18" font-weight="bold">times better than containerd (log scale); the mark is the bar</text>`+"\n")
	for better := least; better <= most; better *= 2 {
		fmt.Fprintf(&s, `<line x1="%.1f" x2="%.1f" y1="%.1f" y2="%.1f" stroke="#ddd"/><text x="%.1f" y="%.1f" text-anchor="middle" fill="#666">%g</text>`+"\n",
			x(better), x(better), top-8, height-8, x(better), top-12, better)
	}
	for i, f := range shown {
		y := top + row*float64(i)
		better := b.results.ratio(f.id, streamshim, containerd)
		bar := f.bar
		if !f.higher {
			better, bar = 1/better, 1/bar
		}
		colour := "#3a7d44"
		if _, ok := b.results.verdict(f); !ok {
			colour = "#c8553d"
		} else if f.bar == 0 {
			colour = "#7a8b99"
		}
		from, to := x(1), x(better)
		fmt.Fprintf(&s, `<text x="%.1f" y="%.1f" text-anchor="end">%s</text>`+"\n", left-8, y+15, html.EscapeString(f.title))
		fmt.Fprintf(&s, `<rect x="%.1f" y="%.1f" width="%.1f" height="%.1f" fill="%s"/>`+"\n", math.Min(from, to), y+3, math.Abs(to-from), row-8, colour)
		fmt.Fprintf(&s, `<text x="%.1f" y="%.1f">%.1f</text>`+"\n", math.Max(from, to)+5, y+15, better)
		if f.bar > 0 {
			fmt.Fprintf(&s, `<line x1="%.1f" x2="%.1f" y1="%.1f" y2="%.1f" stroke="black" stroke-width="2"/>`+"\n", x(bar), x(bar), y, y+row-2)
		}
	}
	s.WriteString("</svg>\n")
	return s.String()
}
