// Command reference generates the documentation of the configuration from pkg/config: the sample deploy/config.toml,
// docs/configuration.md and the manual page streamshim-config(5). "make generate" runs it at the top of the working copy.
package main

import (
	"fmt"
	"os"
	"path/filepath"
)

func main() {
	if err := run("."); err != nil {
		fmt.Fprintln(os.Stderr, "reference:", err)
		os.Exit(1)
	}
}

func run(top string) error {
	files, err := generate(filepath.Join(top, "pkg", "config"))
	if err != nil {
		return err
	}
	for name, text := range files {
		if err := os.WriteFile(filepath.Join(top, name), []byte(text), 0o644); err != nil {
			return err
		}
	}
	return nil
}
