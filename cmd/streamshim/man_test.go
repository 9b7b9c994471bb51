package main

import (
	"flag"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/spf13/cobra/doc"
)

var update = flag.Bool("update", false, "write the manual pages in deploy/man")

// TestManPages keeps deploy/man in step with the commands. "make generate" writes it.
func TestManPages(t *testing.T) {
	root := newCommand()
	root.DisableAutoGenTag = true
	date := time.Date(2026, time.November, 1, 0, 0, 0, 0, time.UTC) // else every month would differ
	pages := t.TempDir()
	header := &doc.GenManHeader{Section: "8", Date: &date, Source: "streamshim", Manual: "System Administration"}
	if err := doc.GenManTree(root, header, pages); err != nil {
		t.Fatal(err)
	}
	kept := filepath.Join("..", "..", "deploy", "man")
	if *update {
		for name := range contents(t, kept) {
			if err := os.Remove(filepath.Join(kept, name)); err != nil {
				t.Fatal(err)
			}
		}
		if err := os.CopyFS(kept, os.DirFS(pages)); err != nil {
			t.Fatal(err)
		}
	}
	want, got := contents(t, pages), contents(t, kept)
	for name, text := range want {
		if got[name] != text {
			t.Errorf("deploy/man/%s is not what the command says; please run make generate", name)
		}
	}
	for name := range got {
		if _, ok := want[name]; !ok {
			t.Errorf("deploy/man/%s has no command any more; please run make generate", name)
		}
	}
}

// contents are the pages of section 8; tools/reference writes that of section 5.
func contents(t *testing.T, folder string) map[string]string {
	t.Helper()
	entries, err := os.ReadDir(folder)
	if err != nil {
		t.Fatal(err)
	}
	files := make(map[string]string)
	for _, entry := range entries {
		if !strings.HasSuffix(entry.Name(), ".8") {
			continue
		}
		text, err := os.ReadFile(filepath.Join(folder, entry.Name()))
		if err != nil {
			t.Fatal(err)
		}
		files[entry.Name()] = string(text)
	}
	return files
}
