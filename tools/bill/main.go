// Command bill adds the libraries in the page of "streamshim ui" to a bill of materials (CycloneDX): they come from npm
// and are no Go modules, so that cyclonedx-gomod does not know them. pkg/ui/vendor.sh names them.
package main

import (
	"encoding/json"
	"fmt"
	"os"
	"regexp"
	"strings"
)

func main() {
	if len(os.Args) != 2 {
		fmt.Fprintln(os.Stderr, "usage: bill FILE.cdx.json, in the top folder")
		os.Exit(2)
	}
	if err := add(os.Args[1], "pkg/ui/vendor.sh"); err != nil {
		fmt.Fprintln(os.Stderr, "bill:", err)
		os.Exit(1)
	}
}

type component struct {
	Ref     string `json:"bom-ref"`
	Type    string `json:"type"`
	Name    string `json:"name"`
	Version string `json:"version"`
	Scope   string `json:"scope"`
	PURL    string `json:"purl"`
}

var unpacked = regexp.MustCompile(`(?m)^unpack (\S+) (\S+) [0-9a-f]{64}$`)

func add(file, script string) error {
	text, err := os.ReadFile(file)
	if err != nil {
		return err
	}
	var bill map[string]json.RawMessage
	if err := json.Unmarshal(text, &bill); err != nil {
		return fmt.Errorf("%s: %w", file, err)
	}
	var components []json.RawMessage
	if err := json.Unmarshal(bill["components"], &components); err != nil {
		return fmt.Errorf("components of %s: %w", file, err)
	}
	names, err := os.ReadFile(script)
	if err != nil {
		return err
	}
	libraries := unpacked.FindAllStringSubmatch(string(names), -1)
	if len(libraries) == 0 {
		return fmt.Errorf("%s names no library", script)
	}
	for _, library := range libraries {
		purl := "pkg:npm/" + strings.ReplaceAll(library[1], "@", "%40") + "@" + library[2]
		one, err := json.Marshal(component{Ref: purl, Type: "library", Name: library[1], Version: library[2], Scope: "required", PURL: purl})
		if err != nil {
			return err
		}
		components = append(components, one)
	}
	if bill["components"], err = json.Marshal(components); err != nil {
		return err
	}
	if text, err = json.MarshalIndent(bill, "", "  "); err != nil {
		return err
	}
	return os.WriteFile(file, append(text, '\n'), 0o644)
}
