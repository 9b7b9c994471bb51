// Package matrix runs critest's streaming specs and the tests of real nodes against other versions of what a node is
// made of than the newest: containerd 1.7 to 2.3, runc 1.1 to 1.4, Debian's crun. "make matrix" runs it.
package matrix

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/streamshim/streamshim/test/critest"
	"github.com/streamshim/streamshim/test/internal/node"
	"github.com/streamshim/streamshim/test/internal/tables"
)

// variable lists what to try, such as "containerd-1.7 crun"; "all" is everything.
const variable = "STREAMSHIM_MATRIX"

// packages are the tests of real nodes that say something about the runtime.
var packages = []string{"./test/integration/exec", "./test/integration/attach", "./test/integration/portforward", "./test/integration/cri"}

// row is a line of the table.
type row struct {
	name                  string
	bare, spdy, websocket string // critest's streaming specs
	tests                 string
}

func TestMatrix(t *testing.T) {
	wanted := strings.Fields(os.Getenv(variable))
	if len(wanted) == 0 {
		t.Skip("make matrix runs it")
	}
	if wanted[0] == "all" {
		folders, err := filepath.Glob("*/go.mod")
		if err != nil {
			t.Fatal(err)
		}
		wanted = []string{"crun"}
		for _, folder := range folders {
			wanted = append(wanted, filepath.Dir(folder))
		}
	}
	node.Require(t)
	started := time.Now()
	var rows []row
	for _, name := range wanted {
		t.Run(name, func(t *testing.T) { rows = append(rows, try(t, name)) })
	}
	path := os.Getenv("STREAMSHIM_MATRIX_REPORT")
	if path == "" || t.Failed() {
		return
	}
	var text strings.Builder
	fmt.Fprintf(&text, `## Other versions of the runtime

By `+"`make matrix`"+` on %s, in %.0f minutes. Each row is one part of the node in another version, the rest being the newest. critest's streaming
specs: how many pass, at the runtime's own endpoint and through streamshim. Integration tests: those of %s through streamshim.

| | critest, bare | critest, SPDY | critest, WebSocket | integration tests |
| --- | --- | --- | --- | --- |
`, time.Now().UTC().Format(time.DateOnly), time.Since(started).Minutes(), strings.Join(packages, ", "))
	for _, r := range rows {
		fmt.Fprintf(&text, "| %s | %s | %s | %s | %s |\n", r.name, r.bare, r.spdy, r.websocket, r.tests)
	}
	if err := tables.Replace(path, "matrix", text.String()); err != nil {
		t.Error(err)
	}
}

func try(t *testing.T, name string) row {
	programs, title := assemble(t, name)
	result := row{name: title}
	t.Run("critest", func(t *testing.T) {
		n := node.StartForTest(t, node.Config{Name: "matrix", Streamshim: node.Binary(t), Programs: programs})
		output, err := filepath.Abs("../../.artefacts/matrix/" + name)
		if err != nil {
			t.Fatal(err)
		}
		suite, err := critest.NewSuite(t.Context(), n, output)
		if err != nil {
			t.Fatal(err)
		}
		specs := func(name, endpoint string, arguments ...string) critest.Results {
			results, err := suite.Run(t.Context(), name, endpoint, append([]string{"-ginkgo.focus", "Streaming"}, arguments...)...)
			if err != nil {
				t.Fatal(err)
			}
			return results
		}
		result.bare = specs("bare", n.ContainerdSocket()).Summary()
		for _, through := range []struct {
			cell    *string
			results critest.Results
		}{
			{&result.spdy, specs("spdy", n.Socket())},
			{&result.websocket, specs("websocket", n.Socket(), "-websocket-exec", "-websocket-attach", "-websocket-portforward")},
		} {
			*through.cell = through.results.Summary()
			for _, spec := range through.results.Failures() {
				t.Errorf("%s %s: %s", spec.State, spec.Name, spec.Message)
			}
			if passed := through.results.Count(critest.Passed); passed != 5 {
				t.Errorf("%d specs passed, want 5", passed)
			}
		}
	})
	t.Run("integration", func(t *testing.T) { result.tests = integration(t, programs) })
	return result
}

// assemble makes a folder of links to the programs of a node, of which one is another version, and says which.
func assemble(t *testing.T, name string) (folder, title string) {
	t.Helper()
	folder = t.TempDir()
	link := func(from string) {
		target := filepath.Join(folder, filepath.Base(from))
		if err := os.Remove(target); err != nil && !errors.Is(err, os.ErrNotExist) {
			t.Fatal(err)
		}
		if err := os.Symlink(from, target); err != nil {
			t.Fatal(err)
		}
	}
	linkAll := func(from string) {
		entries, err := os.ReadDir(from)
		if err != nil || len(entries) == 0 {
			t.Fatalf("%s: %v", from, err)
		}
		for _, entry := range entries {
			path, err := filepath.EvalSymlinks(filepath.Join(from, entry.Name()))
			if err != nil {
				t.Fatal(err)
			}
			link(path)
		}
	}
	linkAll(node.DefaultPrograms())
	if name == "crun" { // the node calls its runtime runc
		crun, err := exec.LookPath("crun")
		if err != nil {
			t.Fatal(err)
		}
		version, err := exec.Command(crun, "--version").Output()
		if err != nil {
			t.Fatal(err)
		}
		target := filepath.Join(folder, "runc")
		if err := os.Remove(target); err != nil {
			t.Fatal(err)
		}
		if err := os.Symlink(crun, target); err != nil {
			t.Fatal(err)
		}
		first, _, _ := strings.Cut(string(version), "\n")
		return folder, first
	}
	build := exec.Command("./build.sh", name)
	build.Stderr = os.Stderr
	out, err := build.Output()
	if err != nil {
		t.Fatal(err)
	}
	fields := strings.Fields(string(out)) // containerd-1.7 v1.7.35 FOLDER
	if len(fields) != 3 {
		t.Fatalf("build.sh says %q", out)
	}
	linkAll(fields[2])
	what, _, _ := strings.Cut(name, "-")
	return folder, what + " " + fields[1]
}

// integration runs the packages with the programs and returns how many tests passed.
func integration(t *testing.T, programs string) string {
	t.Helper()
	command := exec.Command("go", append([]string{"test", "-json", "-p", "1", "-count", "1", "-timeout", "60m"}, packages...)...)
	command.Dir = "../.."
	command.Env = append(os.Environ(), "STREAMSHIM_REAL=required", "STREAMSHIM_PROGRAMS="+programs)
	var complaints bytes.Buffer
	command.Stderr = &complaints
	out, err := command.Output()
	counts := map[string]int{}
	said := map[string]*strings.Builder{}
	for line := range bytes.Lines(out) {
		var event struct{ Action, Package, Test, Output string }
		if json.Unmarshal(line, &event) != nil {
			continue // what a test prints past the framework
		}
		key := event.Package + " " + event.Test
		if event.Action == "output" {
			if said[key] == nil {
				said[key] = &strings.Builder{}
			}
			said[key].WriteString(event.Output)
			continue
		}
		if event.Test != "" && !strings.Contains(event.Test, "/") {
			counts[event.Action]++
		}
		if event.Action == "fail" && said[key] != nil {
			t.Errorf("%s:\n%s", key, said[key])
		}
	}
	if err != nil || counts["pass"] == 0 {
		t.Errorf("go test: %v: %s", err, complaints.String())
	}
	text := fmt.Sprintf("%d passed", counts["pass"])
	for _, action := range []string{"fail", "skip"} {
		if counts[action] != 0 {
			text += fmt.Sprintf(", %d %s", counts[action], map[string]string{"fail": "failed", "skip": "skipped"}[action])
		}
	}
	return text
}
