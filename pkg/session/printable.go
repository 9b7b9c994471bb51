package session

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"strconv"
	"strings"
	"unicode/utf16"
	"unicode/utf8"
)

// PrintableJSON is json.Marshal, or with an indent json.MarshalIndent, for text that people look at in
// a terminal: it has no character that a terminal obeys or that turns text around, such as U+009B and
// U+202E, which encoding/json leaves as they are. It leaves <, > and & alone, so that commands can be
// searched for.
func PrintableJSON(v any, indent string) ([]byte, error) {
	var text bytes.Buffer
	encoder := json.NewEncoder(&text)
	encoder.SetEscapeHTML(false)
	encoder.SetIndent("", indent)
	if err := encoder.Encode(v); err != nil {
		return nil, err
	}
	line := bytes.TrimSuffix(text.Bytes(), []byte{'\n'})
	if !bytes.ContainsFunc(line, func(r rune) bool { return r > '~' }) {
		return line, nil
	}
	var safe strings.Builder
	for _, r := range string(line) {
		if r < utf8.RuneSelf && r != '\x7f' || strconv.IsPrint(r) {
			safe.WriteRune(r)
			continue
		}
		for _, unit := range utf16.Encode([]rune{r}) {
			fmt.Fprintf(&safe, `\u%04x`, unit)
		}
	}
	return []byte(safe.String()), nil
}

// WriteJSON writes a value as a PrintableJSON of several lines.
func WriteJSON(to io.Writer, v any) error {
	text, err := PrintableJSON(v, "  ")
	if err != nil {
		return err
	}
	_, err = to.Write(append(text, '\n'))
	return err
}

// Printable is one line of text that a terminal does not obey: what is not printable, newlines too, is replaced. The names
// and arguments of sessions are chosen by users.
func Printable(s string) string {
	return strings.Map(func(r rune) rune {
		if strconv.IsPrint(r) {
			return r
		}
		return '\uFFFD'
	}, s)
}
