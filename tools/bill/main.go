// Command bill adds the libraries of the page of "streamshim ui" to a bill of materials (CycloneDX). They are not Go
// modules, so cyclonedx-gomod does not find them. pkg/ui/static/NOTICE names them.
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
	if err := add(os.Args[1], "pkg/ui/static/NOTICE"); err != nil {
		fmt.Fprintln(os.Stderr, "bill:", err)
		os.Exit(1)
	}
}

type component struct {
	Ref      string    `json:"bom-ref"`
	Type     string    `json:"type"`
	Name     string    `json:"name"`
	Version  string    `json:"version"`
	Scope    string    `json:"scope"`
	Licenses []license `json:"licenses"`
	PURL     string    `json:"purl"`
}

type license struct {
	Expression string `json:"expression"` // SPDX
}

// named matches a line of NOTICE: where a library comes from, its name, version and licence.
var named = regexp.MustCompile(`(?m)^(npm|cargo) +(\S+) +(\S+) +((?:MIT|Apache-2\.0)(?: or Apache-2\.0)?)\b`)

func add(file, notice string) error {
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
	names, err := os.ReadFile(notice)
	if err != nil {
		return err
	}
	libraries := named.FindAllStringSubmatch(string(names), -1)
	if len(libraries) == 0 {
		return fmt.Errorf("%s names no library", notice)
	}
	for _, library := range libraries {
		kind, name, version, terms := library[1], library[2], library[3], strings.ReplaceAll(library[4], " or ", " OR ")
		purl := "pkg:" + kind + "/" + strings.ReplaceAll(name, "@", "%40") + "@" + version
		one, err := json.Marshal(component{
			Ref: purl, Type: "library", Name: name, Version: version, Scope: "required", Licenses: []license{{terms}}, PURL: purl,
		})
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
