package main

import (
	"fmt"
	"io"
	"strconv"
	"strings"
	"unicode/utf8"

	"github.com/spf13/cobra"
)

// addVisible adds the flag --escapes, and returns a function that wraps the output accordingly.
func addVisible(command *cobra.Command) func(io.Writer) io.Writer {
	mode := escapesMode("obey")
	command.Flags().Var(&mode, "escapes", "`obey` them, or show them as text: \\x1b[31m (obey or show)")
	return func(out io.Writer) io.Writer {
		if mode == "show" {
			return &escapeWriter{out: out}
		}
		return out
	}
}

type escapesMode string

func (m *escapesMode) String() string { return string(*m) }
func (m *escapesMode) Type() string   { return "string" }
func (m *escapesMode) Set(s string) error {
	if s != "obey" && s != "show" {
		return fmt.Errorf("%q is neither obey nor show", s)
	}
	*m = escapesMode(s)
	return nil
}

// escapeWriter writes text so that a terminal obeys only line ends and tabs. It writes all other characters that are not
// printable, such as ESC, U+009B and U+202E, as in a Go string. A character may be split between two calls.
type escapeWriter struct {
	out  io.Writer
	rest []byte // the beginning of a split character
}

// Write implements io.Writer.
func (w *escapeWriter) Write(p []byte) (int, error) {
	text := append(w.rest, p...)
	w.rest = nil
	var safe strings.Builder
	for len(text) > 0 {
		if !utf8.FullRune(text) {
			w.rest = append([]byte{}, text...)
			break
		}
		r, size := utf8.DecodeRune(text)
		switch {
		case r == '\n':
			safe.WriteString("\r\n")
		case r == '\r': // without \n it would let what follows overwrite the line
			if len(text) > 1 && text[1] != '\n' {
				safe.WriteString("\\r")
			}
		case r == '\t', strconv.IsPrint(r) && r != utf8.RuneError:
			safe.WriteRune(r)
		case r == utf8.RuneError && size == 1:
			fmt.Fprintf(&safe, "\\x%02x", text[0])
		default:
			safe.WriteString(strings.Trim(strconv.QuoteRune(r), "'"))
		}
		text = text[size:]
	}
	if _, err := io.WriteString(w.out, safe.String()); err != nil {
		return 0, err
	}
	return len(p), nil
}
