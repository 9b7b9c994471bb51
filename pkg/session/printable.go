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

// PrintableJSON is json.Marshal, or json.MarshalIndent if there is an indent, for text shown in a terminal. It
// escapes characters that control a terminal or reverse text, such as U+009B and U+202E, which encoding/json
// leaves as they are. It leaves <, > and & alone, so that commands can be searched for.
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

// WriteJSON writes a value as indented PrintableJSON.
func WriteJSON(to io.Writer, v any) error {
	text, err := PrintableJSON(v, "  ")
	if err != nil {
		return err
	}
	_, err = to.Write(append(text, '\n'))
	return err
}

// Printable returns s as one line that is safe for a terminal. It replaces everything unprintable, including
// newlines. Users choose the names and arguments of sessions.
func Printable(s string) string {
	return strings.Map(func(r rune) rune {
		if strconv.IsPrint(r) {
			return r
		}
		return '\uFFFD'
	}, s)
}
