// Package imports keeps the plan of the house: who may import whom, and how large a package may be
// (docs/architecture.md, whose picture is made from it).
package imports

import (
	"bytes"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

const module = "github.com/streamshim/streamshim/"

// floors are the packages of this module from top to bottom. A package imports from lower floors alone.
var floors = [][]string{
	{"cmd/streamshim", "cmd/kubectl-streamshim"},
	{"pkg/daemon", "pkg/ui"},
	{"pkg/admin", "pkg/check", "pkg/nodeinstall"},
	{"pkg/support", "pkg/metrics", "pkg/tracing", "pkg/session/audit", "pkg/session/limits", "pkg/session/recording"},
	{"pkg/cri", "pkg/execproc"},
	{"pkg/streaming", "pkg/execproc/internal/record"},
	{"pkg/streaming/remotecommand", "pkg/streaming/portforward", "pkg/execproc/internal/ociruntime"},
	{"pkg/streaming/internal/lifetime", "pkg/streaming/internal/bandwidth", "pkg/streaming/remotecommand/internal/relay", "pkg/streaming/remotecommand/internal/drain", "pkg/streaming/remotecommand/internal/stdin", "pkg/streaming/remotecommand/internal/terminal", "pkg/execproc/internal/stdio"},
	{"pkg/streaming/internal/transport", "pkg/streaming/internal/status", "pkg/session/transcript", "pkg/execproc/internal/tree"},
	{"pkg/execproc/internal/reaper", "pkg/portforward", "pkg/session", "pkg/config", "pkg/streaming/internal/spdy", "pkg/streaming/internal/websocket"},
	{"pkg/streaming/internal/spdy/buffer", "pkg/streaming/internal/spdy/control", "pkg/streaming/internal/spdy/direct", "pkg/streaming/internal/spdy/state", "pkg/streaming/internal/websocket/inbox"},
	{"deploy", "pkg/cri/internal/quiet", "pkg/execproc/internal/proc", "pkg/workload", "pkg/asciicast", "pkg/endpoint", "pkg/handover", "pkg/helper", "pkg/rescue", "pkg/streaming/buffers", "pkg/streaming/event", "pkg/streaming/internal/failure", "pkg/streaming/internal/holdback", "pkg/streaming/internal/memory", "pkg/streaming/internal/socket", "pkg/streaming/internal/spdy/frames", "pkg/streaming/internal/websocket/frames", "pkg/streaming/remotecommand/internal/protocol"},
}

// allowed are the packages of this module that each package may import directly. What is not listed
// here may import nothing of it.
var allowed = map[string][]string{
	"cmd/streamshim": {
		"deploy", "pkg/admin", "pkg/asciicast", "pkg/check", "pkg/config", "pkg/daemon", "pkg/endpoint", "pkg/helper", "pkg/nodeinstall",
		"pkg/session", "pkg/session/recording", "pkg/support", "pkg/ui",
	},
	"pkg/ui": {"pkg/admin"},
	"pkg/daemon": {
		"pkg/admin", "pkg/config", "pkg/cri", "pkg/endpoint", "pkg/execproc", "pkg/handover", "pkg/helper", "pkg/metrics", "pkg/portforward",
		"pkg/rescue", "pkg/session", "pkg/session/audit", "pkg/session/limits", "pkg/session/recording", "pkg/streaming", "pkg/streaming/buffers",
		"pkg/streaming/event", "pkg/streaming/portforward", "pkg/streaming/remotecommand", "pkg/tracing", "pkg/workload",
	},
	"cmd/kubectl-streamshim": {"pkg/admin", "pkg/session"},
	"pkg/admin":              {"pkg/asciicast", "pkg/handover", "pkg/rescue", "pkg/session", "pkg/session/recording", "pkg/session/transcript"},
	"pkg/check":              {"pkg/config", "pkg/cri", "pkg/endpoint", "pkg/handover"},
	"pkg/config":             {"pkg/endpoint"},
	"pkg/cri":                {"pkg/cri/internal/quiet", "pkg/endpoint", "pkg/rescue", "pkg/session", "pkg/streaming/portforward", "pkg/streaming/remotecommand", "pkg/workload"},
	"pkg/execproc": {
		"pkg/execproc/internal/ociruntime", "pkg/execproc/internal/proc", "pkg/execproc/internal/reaper", "pkg/execproc/internal/record",
		"pkg/execproc/internal/stdio", "pkg/execproc/internal/tree", "pkg/handover", "pkg/rescue", "pkg/workload",
	},
	"pkg/execproc/internal/ociruntime": {"pkg/execproc/internal/proc", "pkg/execproc/internal/stdio", "pkg/execproc/internal/tree", "pkg/rescue", "pkg/workload"},
	"pkg/execproc/internal/reaper":     {"pkg/execproc/internal/proc", "pkg/rescue"},
	"pkg/execproc/internal/record":     {"pkg/execproc/internal/ociruntime", "pkg/execproc/internal/proc"},
	"pkg/execproc/internal/stdio":      {"pkg/execproc/internal/tree", "pkg/handover", "pkg/rescue", "pkg/workload"},
	"pkg/execproc/internal/tree":       {"pkg/execproc/internal/proc", "pkg/execproc/internal/reaper", "pkg/handover", "pkg/rescue"},
	"pkg/metrics":                      {"pkg/handover", "pkg/session"},
	"pkg/portforward":                  {"pkg/handover", "pkg/rescue", "pkg/workload"},
	"pkg/session":                      {"pkg/handover", "pkg/rescue", "pkg/workload"},
	"pkg/session/audit":                {"pkg/handover", "pkg/rescue", "pkg/session"},
	"pkg/session/limits":               {"pkg/handover", "pkg/session"},
	"pkg/session/recording":            {"pkg/asciicast", "pkg/handover", "pkg/rescue", "pkg/session", "pkg/session/transcript", "pkg/workload"},
	"pkg/session/transcript":           {"pkg/asciicast", "pkg/session"},
	"pkg/nodeinstall":                  {"pkg/endpoint"},
	"pkg/tracing":                      {"pkg/session"},
	"pkg/streaming": {
		"pkg/rescue", "pkg/handover", "pkg/session", "pkg/streaming/buffers", "pkg/streaming/event", "pkg/streaming/internal/lifetime", "pkg/streaming/internal/status",
		"pkg/streaming/internal/transport", "pkg/streaming/internal/websocket", "pkg/streaming/portforward", "pkg/streaming/remotecommand",
	},
	"pkg/streaming/remotecommand": {
		"pkg/rescue", "pkg/handover", "pkg/session", "pkg/streaming/buffers", "pkg/streaming/event", "pkg/streaming/internal/bandwidth",
		"pkg/streaming/internal/holdback", "pkg/streaming/internal/lifetime", "pkg/streaming/internal/spdy", "pkg/streaming/internal/status", "pkg/streaming/internal/transport",
		"pkg/streaming/internal/websocket", "pkg/streaming/remotecommand/internal/drain", "pkg/streaming/remotecommand/internal/protocol",
		"pkg/streaming/remotecommand/internal/relay", "pkg/streaming/remotecommand/internal/stdin", "pkg/streaming/remotecommand/internal/terminal",
		"pkg/workload",
	},
	"pkg/streaming/remotecommand/internal/drain": {"pkg/handover", "pkg/rescue", "pkg/session", "pkg/streaming/event", "pkg/streaming/internal/socket", "pkg/workload"},
	"pkg/streaming/remotecommand/internal/stdin": {
		"pkg/handover", "pkg/rescue", "pkg/streaming/internal/socket", "pkg/streaming/internal/spdy", "pkg/streaming/internal/transport", "pkg/workload",
	},
	"pkg/streaming/remotecommand/internal/terminal": {"pkg/handover", "pkg/workload"},
	"pkg/streaming/remotecommand/internal/relay": {
		"pkg/handover", "pkg/rescue", "pkg/session", "pkg/streaming/buffers", "pkg/streaming/internal/socket", "pkg/streaming/internal/spdy",
		"pkg/streaming/internal/status", "pkg/streaming/internal/transport", "pkg/streaming/remotecommand/internal/protocol", "pkg/workload",
	},
	"pkg/streaming/portforward": {
		"pkg/handover", "pkg/rescue", "pkg/session", "pkg/streaming/event", "pkg/streaming/internal/bandwidth", "pkg/streaming/internal/lifetime",
		"pkg/streaming/internal/spdy", "pkg/streaming/internal/status", "pkg/streaming/internal/transport",
		"pkg/streaming/internal/websocket", "pkg/workload",
	},
	"pkg/streaming/internal/bandwidth": {"pkg/workload"},
	"pkg/streaming/internal/lifetime":  {"pkg/rescue", "pkg/session", "pkg/streaming/buffers", "pkg/streaming/event", "pkg/streaming/internal/socket", "pkg/streaming/internal/transport"},
	"pkg/streaming/internal/status":    {"pkg/session"},
	"pkg/streaming/internal/transport": {"pkg/handover", "pkg/rescue", "pkg/streaming/internal/spdy", "pkg/streaming/internal/websocket", "pkg/workload"},
	"pkg/streaming/internal/spdy": {
		"pkg/handover", "pkg/rescue", "pkg/streaming/internal/failure", "pkg/streaming/internal/memory", "pkg/streaming/internal/socket",
		"pkg/streaming/internal/spdy/buffer", "pkg/streaming/internal/spdy/control", "pkg/streaming/internal/spdy/direct",
		"pkg/streaming/internal/spdy/frames", "pkg/streaming/internal/spdy/state",
	},
	"pkg/streaming/internal/spdy/buffer":  {"pkg/streaming/internal/memory", "pkg/streaming/internal/socket", "pkg/streaming/internal/spdy/frames"},
	"pkg/streaming/internal/spdy/control": {"pkg/streaming/internal/spdy/frames"},
	"pkg/streaming/internal/spdy/direct":  {"pkg/streaming/internal/socket"},
	"pkg/streaming/internal/spdy/state":   {"pkg/streaming/internal/failure", "pkg/streaming/internal/spdy/frames"},
	"pkg/streaming/internal/websocket": {
		"pkg/handover", "pkg/rescue", "pkg/streaming/internal/failure", "pkg/streaming/internal/memory", "pkg/streaming/internal/socket",
		"pkg/streaming/internal/websocket/frames", "pkg/streaming/internal/websocket/inbox",
	},
	"pkg/streaming/internal/websocket/inbox": {"pkg/handover", "pkg/streaming/internal/memory", "pkg/streaming/internal/websocket/frames"},
}

// foreign are libraries that only the packages named may import, directly or not.
var foreign = map[string][]string{
	"google.golang.org/grpc": {"cmd/streamshim", "pkg/check", "pkg/cri", "pkg/cri/internal/quiet", "pkg/daemon", "pkg/tracing"},
	"k8s.io/cri-api":         {"cmd/streamshim", "pkg/daemon", "pkg/check", "pkg/cri"},
	// Metrics and traces are told of things; nobody else counts or traces.
	"github.com/prometheus":    {"cmd/streamshim", "pkg/daemon", "pkg/metrics"},
	"go.opentelemetry.io/otel": {"cmd/streamshim", "pkg/daemon", "pkg/check", "pkg/cri", "pkg/tracing"}, // containerd's client brings it to pkg/cri
	// Peers in tests, no parts of the product.
	"github.com/moby/spdystream": nil,
	"k8s.io/streaming":           nil,
	"k8s.io/cri-streaming":       nil,
	"k8s.io/client-go":           nil,
	"k8s.io/apiserver":           nil,
}

// maxLines is how many lines a package may have without its tests.
const maxLines = 2500

func list(t *testing.T, arguments ...string) []string {
	t.Helper()
	out, err := exec.Command("go", append([]string{"list"}, arguments...)...).Output()
	if err != nil {
		t.Fatalf("go list: %v", err)
	}
	return strings.Split(strings.TrimSpace(string(out)), "\n")
}

// floor is a package's, -1 for one that stands nowhere.
func floor(name string) int {
	return slices.IndexFunc(floors, func(f []string) bool { return slices.Contains(f, name) })
}

func TestImportRules(t *testing.T) {
	for _, line := range list(t, "-f", `{{.ImportPath}} {{join .Imports " "}}`, module+"cmd/...", module+"pkg/...") {
		fields := strings.Fields(line)
		importer := strings.TrimPrefix(fields[0], module)
		if strings.HasSuffix(importer, "test") {
			continue // of tests alone: it is in nobody's list
		}
		if floor(importer) < 0 {
			t.Errorf("%s stands on no floor", importer)
		}
		for _, path := range fields[1:] {
			imported, ours := strings.CutPrefix(path, module)
			if ours && !slices.Contains(allowed[importer], imported) {
				t.Errorf("%s imports %s: not in the plan of the house", importer, imported)
			}
			if ours && floor(imported) <= floor(importer) {
				t.Errorf("%s imports %s, which is on no lower floor", importer, imported)
			}
		}
	}
}

func TestForeignImports(t *testing.T) {
	for _, line := range list(t, "-f", `{{.ImportPath}} {{join .Deps " "}}`, module+"cmd/...", module+"pkg/...") {
		fields := strings.Fields(line)
		importer := strings.TrimPrefix(fields[0], module)
		for library, importers := range foreign {
			if slices.Contains(importers, importer) {
				continue
			}
			for _, path := range fields[1:] {
				if path == library || strings.HasPrefix(path, library+"/") {
					t.Errorf("%s depends on %s", importer, path)
					break
				}
			}
		}
	}
}

func TestPackagesAreSmall(t *testing.T) {
	for _, line := range list(t, "-f", `{{.ImportPath}} {{.Dir}} {{join .GoFiles " "}}`, module+"cmd/...", module+"pkg/...") {
		fields := strings.Fields(line)
		name, lines := strings.TrimPrefix(fields[0], module), 0
		for _, file := range fields[2:] {
			text, err := os.ReadFile(filepath.Join(fields[1], file))
			if err != nil {
				t.Fatal(err)
			}
			lines += bytes.Count(text, []byte("\n"))
		}
		if lines > maxLines {
			t.Errorf("%s has %d lines, it may have %d", name, lines, maxLines)
		}
	}
}

var update = flag.Bool("update", false, "write the picture into docs/architecture.md")

// picture is the house, one line for each floor.
func picture() string {
	var b strings.Builder
	b.WriteString("```\n")
	for i, f := range floors {
		var names []string
		for _, name := range f {
			names = append(names, strings.TrimPrefix(name, "pkg/"))
		}
		fmt.Fprintf(&b, "%d  %s\n", len(floors)-1-i, strings.Join(names, " · "))
	}
	b.WriteString("```\n")
	return b.String()
}

func TestPictureIsOfThisHouse(t *testing.T) {
	const path, begin, end = "../../docs/architecture.md", "<!-- floors: made by test/imports -->\n", "<!-- end of floors -->\n"
	text, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	before, rest, found := strings.Cut(string(text), begin)
	drawn, after, closed := strings.Cut(rest, end)
	if !found || !closed {
		t.Fatalf("%s has no place for the floors", path)
	}
	if *update {
		if err := os.WriteFile(path, []byte(before+begin+picture()+end+after), 0o644); err != nil { //nolint:gosec // a document
			t.Fatal(err)
		}
		return
	}
	if drawn != picture() {
		t.Errorf("the floors in %s are not those of the rules: go test ./test/imports -update", path)
	}
}
