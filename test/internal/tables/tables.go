// Package tables writes the parts of docs/compatibility.md that come from runs. Each run owns one part, between two
// comments that name it, and leaves the rest of the document as it is.
package tables

import (
	"errors"
	"fmt"
	"os"
	"regexp"
	"strings"
)

// Replace writes text as the part called name of the document at path. It adds the part at the end if there is none, and
// creates the document if it does not exist.
func Replace(path, name, text string) error {
	document, err := os.ReadFile(path)
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	begin, end := fmt.Sprintf("<!-- begin %s: written by a run, not by hand -->", name), fmt.Sprintf("<!-- end %s -->", name)
	part := begin + "\n" + strings.TrimSpace(text) + "\n" + end
	old := regexp.MustCompile("(?s)" + regexp.QuoteMeta(begin) + ".*?" + regexp.QuoteMeta(end))
	var replaced string
	if old.Match(document) {
		replaced = old.ReplaceAllLiteralString(string(document), part)
	} else {
		replaced = strings.TrimLeft(strings.TrimRight(string(document), "\n")+"\n\n"+part+"\n", "\n")
	}
	return os.WriteFile(path, []byte(replaced), 0o644)
}

// Rows returns the rows of the first table in the part called name, each with its cells. There are none if there is no such
// part, table or document.
func Rows(path, name string) ([][]string, error) {
	document, err := os.ReadFile(path)
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, err
	}
	_, part, _ := strings.Cut(string(document), fmt.Sprintf("<!-- begin %s: ", name))
	part, _, _ = strings.Cut(part, fmt.Sprintf("<!-- end %s -->", name))
	_, body, _ := strings.Cut(part, "\n| --- |") // what follows the heading
	var rows [][]string
	for line := range strings.Lines(body) {
		cells, isRow := strings.CutPrefix(strings.TrimSpace(line), "| ")
		if !isRow {
			if len(rows) > 0 {
				break
			}
			continue
		}
		rows = append(rows, strings.Split(strings.TrimSuffix(cells, " |"), " | "))
	}
	return rows, nil
}

// Cell makes text fit into a cell of a table: on one line, at most 160 characters, with what would end the cell escaped.
func Cell(text string) string {
	text = strings.ReplaceAll(strings.Join(strings.Fields(text), " "), "|", "\\|")
	if runes := []rune(text); len(runes) > 160 {
		text = string(runes[:160]) + "…"
	}
	return text
}
