package main

import (
	"fmt"
	"strings"

	"github.com/streamshim/streamshim/pkg/config"
)

const manualHead = `.\" Written by "make generate" from the comments in pkg/config. Edit those.
.nh
.TH "STREAMSHIM-CONFIG" "5" "Nov 2026" "streamshim" "File Formats"
.SH NAME
streamshim\-config \- configuration file of streamshim
.SH SYNOPSIS
\fI` + config.DefaultFile + `\fR
.SH DESCRIPTION
streamshim reads this file, or the one that \fB\-\-config\fR names, which is TOML of at most 1 MiB. Without a file
everything has its default. Flags of \fBstreamshim serve\fR win over the file. A mistake is refused with its line and
what was probably meant; \fBstreamshim check\fR reads the file without serving.
.PP
A duration is written as "90s" or "1h30m". Keys marked [reload] are taken over by
\fBsystemctl reload streamshim\fR (SIGHUP) without touching live sessions; for others the log names those that need a
restart. A file with a mistake is refused then too, and the old configuration stays.
`

// manual is the manual page streamshim-config(5).
func manual(tables []table) string {
	var b strings.Builder
	b.WriteString(manualHead)
	for _, t := range tables {
		switch {
		case t.name == "":
			b.WriteString(".SH TOP LEVEL\n")
		case t.list:
			fmt.Fprintf(&b, ".SH [[%s]]\n%s For instance:\n.PP\n.nf\n.RS\n[[%s]]\n%s\n.RE\n.fi\n", t.name, roff(t.text), t.name, roff(examples[t.name]))
		default:
			fmt.Fprintf(&b, ".SH [%s]\n%s\n", t.name, roff(t.text))
		}
		for _, k := range t.keys {
			about := k.typeName
			if k.value != "" {
				about += ", default " + k.value + human(k.value)
			}
			if k.reload {
				about += " [reload]"
			}
			fmt.Fprintf(&b, ".TP\n\\fB%s\\fR (%s)\n%s\n", roff(k.name), roff(about), roff(k.text))
		}
	}
	b.WriteString(".SH SEE ALSO\n\\fBstreamshim\\fR(8), \\fBstreamshim\\-serve\\fR(8)\n")
	return b.String()
}

// roff keeps text from being taken for requests of the formatter.
func roff(text string) string {
	lines := strings.Split(strings.NewReplacer(`\`, `\e`, "-", `\-`, "^", `\(ha`, "~", `\(ti`, "`", `\(ga`).Replace(text), "\n")
	for i, line := range lines {
		if strings.HasPrefix(line, ".") || strings.HasPrefix(line, "'") {
			lines[i] = `\&` + line
		}
	}
	return strings.Join(lines, "\n")
}
