// Package imports keeps the rules of who may import whom (docs/architecture.md).
package imports

import (
	"os/exec"
	"slices"
	"strings"
	"testing"
)

const module = "github.com/streamshim/streamshim/"

// allowed are the packages of this module that each package may import directly. What is not listed
// here may import nothing of it.
var allowed = map[string][]string{
	"cmd/streamshim": {
		"deploy", "pkg/admin", "pkg/asciicast", "pkg/check", "pkg/config", "pkg/cri", "pkg/endpoint", "pkg/execproc", "pkg/helper", "pkg/nodeinstall", "pkg/portforward",
		"pkg/metrics", "pkg/session", "pkg/session/audit", "pkg/session/limits", "pkg/session/recording", "pkg/streaming", "pkg/support", "pkg/tracing",
		"pkg/workload",
	},
	"cmd/kubectl-streamshim": {"pkg/admin", "pkg/session"},
	"pkg/admin":              {"pkg/asciicast", "pkg/session", "pkg/session/recording", "pkg/session/transcript"},
	"pkg/execproc":           {"pkg/workload"},
	"pkg/portforward":        {"pkg/workload"},
	"pkg/session":            {"pkg/workload"},
	"pkg/session/audit":      {"pkg/session"},
	"pkg/session/limits":     {"pkg/session"},
	"pkg/session/recording":  {"pkg/asciicast", "pkg/session", "pkg/session/transcript", "pkg/workload"},
	"pkg/session/transcript": {"pkg/asciicast", "pkg/session"},
	"pkg/check":              {"pkg/config", "pkg/cri", "pkg/endpoint"},
	"pkg/config":             {"pkg/endpoint"},
	"pkg/metrics":            {"pkg/session"},
	"pkg/nodeinstall":        {"pkg/endpoint"},
	"pkg/tracing":            {"pkg/session"},
	"pkg/cri":                {"pkg/endpoint", "pkg/session", "pkg/streaming", "pkg/workload"},
	"pkg/streaming": {
		"pkg/session", "pkg/streaming/internal/socket", "pkg/streaming/internal/spdy", "pkg/streaming/internal/websocket",
		"pkg/workload",
	},
	"pkg/streaming/internal/spdy":      {"pkg/streaming/internal/memory"},
	"pkg/streaming/internal/websocket": {"pkg/streaming/internal/memory", "pkg/streaming/internal/socket"},
}

// foreign are libraries that only the packages named may import, directly or not.
var foreign = map[string][]string{
	"google.golang.org/grpc": {"cmd/streamshim", "pkg/check", "pkg/cri", "pkg/tracing"},
	"k8s.io/cri-api":         {"cmd/streamshim", "pkg/check", "pkg/cri"},
	// Metrics and traces are told of things; nobody else counts or traces.
	"github.com/prometheus":    {"cmd/streamshim", "pkg/metrics"},
	"go.opentelemetry.io/otel": {"cmd/streamshim", "pkg/check", "pkg/cri", "pkg/tracing"}, // containerd's client brings it to pkg/cri
	// Peers in tests, no parts of the product.
	"github.com/moby/spdystream": nil,
	"k8s.io/streaming":           nil,
	"k8s.io/cri-streaming":       nil,
	"k8s.io/client-go":           nil,
	"k8s.io/apiserver":           nil,
}

func list(t *testing.T, arguments ...string) []string {
	t.Helper()
	out, err := exec.Command("go", append([]string{"list"}, arguments...)...).Output()
	if err != nil {
		t.Fatalf("go list: %v", err)
	}
	return strings.Split(strings.TrimSpace(string(out)), "\n")
}

func TestImportRules(t *testing.T) {
	for _, line := range list(t, "-f", `{{.ImportPath}} {{join .Imports " "}}`, module+"cmd/...", module+"pkg/...") {
		fields := strings.Fields(line)
		importer := strings.TrimPrefix(fields[0], module)
		for _, path := range fields[1:] {
			imported, ours := strings.CutPrefix(path, module)
			if ours && !slices.Contains(allowed[importer], imported) {
				t.Errorf("%s imports %s: not in the plan of the house", importer, imported)
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
