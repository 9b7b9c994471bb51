package tables

import (
	"os"
	"path/filepath"
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
