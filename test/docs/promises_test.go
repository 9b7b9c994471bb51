// Package docs tests what documents say about the tree itself.
package docs

import (
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

const top = "../.."

var (
	named    = regexp.MustCompile("`((?:Test|Fuzz)[A-Za-z0-9]+)[^`]*`")
	declared = regexp.MustCompile(`(?m)^func ((?:Test|Fuzz)[A-Za-z0-9]+)\(`)
)

// Each test that docs/security.md names is there, and each row of its tables names one.
func TestPromisesHaveTests(t *testing.T) {
	there := map[string]bool{}
	for _, folder := range []string{"cmd", "pkg", "test", "tools"} {
		err := filepath.WalkDir(filepath.Join(top, folder), func(path string, _ fs.DirEntry, err error) error {
			if err != nil || !strings.HasSuffix(path, "_test.go") {
				return err
			}
			text, err := os.ReadFile(path)
			for _, match := range declared.FindAllStringSubmatch(string(text), -1) {
				there[match[1]] = true
			}
			return err
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	text, err := os.ReadFile(filepath.Join(top, "docs", "security.md"))
	if err != nil {
		t.Fatal(err)
	}
	promises := 0
	inTable := false
	for line := range strings.Lines(string(text)) {
		switch {
		case strings.HasPrefix(line, "| promise | test |"):
			inTable = true
			continue
		case !strings.HasPrefix(line, "|"):
			inTable = false
		}
		tests := named.FindAllStringSubmatch(line, -1)
		for _, match := range tests {
			if !there[match[1]] {
				t.Errorf("there is no %s, which docs/security.md names", match[1])
			}
		}
		if !inTable || strings.HasPrefix(line, "|---") {
			continue
		}
		promises++
		if len(tests) == 0 {
			t.Errorf("a promise without a test: %s", line)
		}
	}
	if promises < 20 {
		t.Errorf("only %d promises were found", promises)
	}
}

var (
	linkTo  = regexp.MustCompile(`\]\(([^)#:\s]*)(?:#([^)]*))?\)`)
	heading = regexp.MustCompile(`(?m)^#+ (.+)$`)
	fence   = regexp.MustCompile("(?ms)^ *```.*?^ *```")
	noWord  = regexp.MustCompile(`[^\p{L}\p{N} _-]`)
)

// Each link in a document leads to a file, or a heading, that is there.
func TestLinks(t *testing.T) {
	texts := map[string]string{}
	for _, pattern := range []string{"*.md", "docs/*.md", "docs/*/*.md", "test/*.md", "test/*/*.md", "deploy/*/*.md"} {
		files, err := filepath.Glob(filepath.Join(top, pattern))
		if err != nil {
			t.Fatal(err)
		}
		for _, file := range files {
			text, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			texts[file] = fence.ReplaceAllString(string(text), "")
		}
	}
	links := 0
	for file, text := range texts {
		for _, match := range linkTo.FindAllStringSubmatch(text, -1) {
			path, anchor := filepath.Join(filepath.Dir(file), match[1]), match[2]
			if match[1] == "" {
				path = file
			}
			links++
			if _, err := os.Stat(path); err != nil {
				t.Errorf("%s links to %s, which is not there", file, match[1])
			} else if anchor != "" && !hasAnchor(texts[path], anchor) {
				t.Errorf("%s links to %s#%s, and there is no such heading", file, match[1], anchor)
			}
		}
	}
	if links < 50 {
		t.Errorf("only %d links are seen", links)
	}
}

// hasAnchor knows how the hosting services make anchors of headings.
func hasAnchor(text, anchor string) bool {
	for _, match := range heading.FindAllStringSubmatch(text, -1) {
		if strings.ReplaceAll(noWord.ReplaceAllString(strings.ToLower(match[1]), ""), " ", "-") == anchor {
			return true
		}
	}
	return false
}

// No program lies in the tree: whoever builds, for whatever architecture, would use a stale one unseen.
func TestNoProgramsAreKept(t *testing.T) {
	out, err := exec.Command("git", "-C", top, "ls-files", "-z", "--cached", "--others", "--exclude-standard").Output()
	if err != nil {
		t.Skip(err) // not a working copy
	}
	files := strings.Split(strings.TrimSuffix(string(out), "\x00"), "\x00")
	for _, name := range files {
		file, err := os.Open(filepath.Join(top, name))
		if err != nil {
			continue // removed and not committed yet
		}
		magic := make([]byte, 4)
		file.Read(magic) //nolint:errcheck // shorter files are no programs
		file.Close()
		if string(magic) == "\x7fELF" {
			t.Errorf("%s is a program", name)
		}
	}
	if len(files) < 100 {
		t.Errorf("git knows %d files only", len(files))
	}
}
