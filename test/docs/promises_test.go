// Package docs tests what documents say about the tree itself.
package docs

import (
	"io/fs"
	"os"
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
