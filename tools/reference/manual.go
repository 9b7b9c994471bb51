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
streamshim reads this file, or the one that \fB\-\-config\fR names. It is TOML of at most 1 MiB. Without a file all keys
have their defaults. Flags of \fBstreamshim serve\fR override the file. A mistake is rejected with its line and
what was probably meant. \fBstreamshim check\fR reads the file without serving.
.PP
A duration is written as "90s" or "1h30m". \fBsystemctl reload streamshim\fR (SIGHUP) applies the keys marked [reload]
without touching live sessions. The log names other changed keys, which need a restart. If the file has a mistake, the old
configuration stays.
`

// manual returns the manual page streamshim-config(5).
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

// roff escapes text so that the formatter does not interpret it.
func roff(text string) string {
	lines := strings.Split(strings.NewReplacer(`\`, `\e`, "-", `\-`, "^", `\(ha`, "~", `\(ti`, "`", `\(ga`).Replace(text), "\n")
	for i, line := range lines {
		if strings.HasPrefix(line, ".") || strings.HasPrefix(line, "'") {
			lines[i] = `\&` + line
		}
	}
	return strings.Join(lines, "\n")
}
