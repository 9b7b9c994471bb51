package tables

import (
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
)

func TestReplace(t *testing.T) {
	path := filepath.Join(t.TempDir(), "doc.md")
	read := func() string {
		text, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		return string(text)
	}
	for _, part := range [][2]string{{"a", "first\n"}, {"b", "second $1"}, {"a", "third \\0\n\n"}} {
		if err := Replace(path, part[0], part[1]); err != nil {
			t.Fatal(err)
		}
	}
	const want = `<!-- begin a: written by a run, not by hand -->
third \0
<!-- end a -->

<!-- begin b: written by a run, not by hand -->
second $1
<!-- end b -->
`
	if got := read(); got != want {
		t.Errorf("%s", got)
	}
	if err := os.WriteFile(path, []byte("# By hand\n\n"+want+"\nalso by hand\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	if err := Replace(path, "b", "fourth"); err != nil {
		t.Fatal(err)
	}
	if got := read(); !strings.HasPrefix(got, "# By hand\n\n<!-- begin a") || !strings.Contains(got, "\nfourth\n") ||
		strings.Contains(got, "second") || !strings.HasSuffix(got, "\nalso by hand\n") {
		t.Errorf("%s", got)
	}
}

func TestCell(t *testing.T) {
	if got := Cell("a|b\n  c"); got != `a\|b c` {
		t.Errorf("%q", got)
	}
	if got := Cell(strings.Repeat("ä", 200)); len([]rune(got)) != 161 {
		t.Errorf("%q", got)
	}
}

func TestRows(t *testing.T) {
	path := filepath.Join(t.TempDir(), "doc.md")
	if rows, err := Rows(path, "b"); err != nil || rows != nil {
		t.Errorf("without a document: %q, %v", rows, err)
	}
	for _, part := range [][2]string{
		{"a", "| | |\n| --- | --- |\n| other | 1 |\n"},
		{"b", "About it.\n\n| | seen |\n| --- | --- |\n| first | 1 of 2 |\n| second |  |\n\n| | |\n| --- | --- |\n| third | 3 |\n"},
	} {
		if err := Replace(path, part[0], part[1]); err != nil {
			t.Fatal(err)
		}
	}
	rows, err := Rows(path, "b")
	if want := [][]string{{"first", "1 of 2"}, {"second", ""}}; err != nil || !reflect.DeepEqual(rows, want) {
		t.Errorf("%q, %v, want %q", rows, err, want)
	}
}
