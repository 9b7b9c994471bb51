// Package matrix runs critest's streaming specs and the tests of real nodes against other versions of what a node is
// made of than the newest: older containerds and runcs, Debian's crun, gVisor. "make matrix" runs it.
package matrix

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/streamshim/streamshim/internal/testutil"
	"github.com/streamshim/streamshim/test/critest"
	"github.com/streamshim/streamshim/test/internal/node"
	"github.com/streamshim/streamshim/test/internal/tables"
)

const (
	// variable lists what to try, such as "containerd-1.7 crun"; "all" is everything. "oldest" is a short run of a node whose
	// containerd and runc are both the oldest, for CI.
	variable = "STREAMSHIM_MATRIX"
	oldest   = "oldest"
	// debiansCrun is the crun that is installed here.
	debiansCrun = "crun"
	// part is the part of docs/compatibility.md that a run writes.
	part = "matrix"
	// streamingSpecs is how many critest has.
	streamingSpecs = 5
)

// packages are the tests of real nodes that say something about the runtime.
var packages = []string{"./test/integration/exec", "./test/integration/attach", "./test/integration/portforward", "./test/integration/cri"}

// skipped are those of their tests that measure streamshim alone, thousands of times over.
const skipped = "LeaksNothing|LeaveNothing|IdleTerminalsAreSmall"

// relayedPackages are those for a runtime whose processes cannot be started from the node.
var relayedPackages = []string{"./test/integration/relay"}

// row is a line of the table.
type row struct {
	name, version         string
	starter               string // who starts commands
	bare, spdy, websocket string // critest's streaming specs
	tests                 string
}

func (r row) cells() []string {
	return []string{r.name, r.version, r.starter, r.bare, r.spdy, r.websocket, r.tests, time.Now().UTC().Format(time.DateOnly)}
}

// all returns the names of everything that can be tried.
func all(t *testing.T) []string {
	t.Helper()
	modules, err := filepath.Glob("*/go.mod")
	if err != nil {
		t.Fatal(err)
	}
	names := []string{debiansCrun}
	for _, module := range modules {
		names = append(names, filepath.Dir(module))
	}
	slices.Sort(names)
	return names
}

func TestMatrix(t *testing.T) {
	wanted := strings.Fields(os.Getenv(variable))
	if len(wanted) == 0 {
		t.Skip("make matrix runs it")
	}
	if wanted[0] == "all" {
		wanted = all(t)
	}
	node.Require(t)
	for _, name := range wanted {
		t.Run(name, func(t *testing.T) {
			r := try(t, name)
			// Each row as soon as it is known: all of them together take hours.
			if path := os.Getenv("STREAMSHIM_MATRIX_REPORT"); path != "" && name != oldest && !t.Failed() {
				if err := report(path, r, all(t)); err != nil {
					t.Error(err)
				}
			}
		})
	}
}

// report writes a row into the document's table and leaves those of other runs there, as long as there still are such names.
func report(path string, r row, names []string) error {
	old, err := tables.Rows(path, part)
	if err != nil {
		return err
	}
	rows := [][]string{r.cells()}
	for _, cells := range old {
		if cells[0] != r.name && slices.Contains(names, cells[0]) {
			rows = append(rows, cells)
		}
	}
	slices.SortFunc(rows, func(a, b []string) int { return strings.Compare(a[0], b[0]) })
	text := fmt.Sprintf(`## Other versions of the runtime

By `+"`make matrix`"+`. Each row is a node of which one part is another than in the other tables, and the rest the newest (containerd
2.4, runc 1.5). Commands started by: whose child a command of exec is. critest: how many of its %d streaming specs pass at the
runtime's own endpoint, and through streamshim over each transport (for gVisor without port-forward, which containerd cannot do
there). Tests: those of %s through streamshim; for
gVisor, those of %s.

| | version | commands started by | critest, bare | critest, SPDY | critest, WebSocket | tests | on |
| --- | --- | --- | --- | --- | --- | --- | --- |
`, streamingSpecs, strings.Join(packages, ", "), strings.Join(relayedPackages, ", "))
	for _, cells := range rows {
		text += "| " + strings.Join(cells, " | ") + " |\n"
	}
	return tables.Replace(path, part, text)
}

func try(t *testing.T, name string) row {
	programs, version := assemble(t, name)
	result := row{name: name, version: version}
	handler, tests := "", packages
	var options []string
	if name == "gvisor" {
		handler, tests = node.GVisorHandler, relayedPackages
		// containerd cannot forward ports into gVisor, and critest would wait a minute for each (TestPortForward of relay).
		options = []string{"-runtime-handler", handler, "-ginkgo.skip", "portforward"}
	}
	good := t.Run("critest", func(t *testing.T) {
		// Rows may be tried at the same time, but for critest, which has ports of the host: each has a node of its own name.
		kind, number, _ := strings.Cut(name, "-")
		n := node.StartForTest(t, node.Config{Name: kind[:1] + strings.ReplaceAll(number, ".", ""), Streamshim: node.Binary(t), Programs: programs})
		result.starter = starter(t, n, handler)
		output, err := filepath.Abs("../../.artefacts/matrix/" + name)
		if err != nil {
			t.Fatal(err)
		}
		suite, err := critest.NewSuite(t.Context(), n, output)
		if err != nil {
			t.Fatal(err)
		}
		specs := func(name, endpoint string, arguments ...string) critest.Results {
			arguments = append(append(arguments, options...), "-ginkgo.focus", "Streaming")
			results, err := suite.Run(t.Context(), name, endpoint, arguments...)
			if err != nil {
				t.Fatal(err)
			}
			return results
		}
		bare := specs("bare", n.ContainerdSocket())
		result.bare = passed(bare)
		want := streamingSpecs
		if handler != "" {
			want = bare.Count(critest.Passed)
		}
		for _, through := range []struct {
			cell    *string
			results critest.Results
		}{
			{&result.spdy, specs("spdy", n.Socket())},
			{&result.websocket, specs("websocket", n.Socket(), "-websocket-exec", "-websocket-attach", "-websocket-portforward")},
		} {
			*through.cell = passed(through.results)
			if count := through.results.Count(critest.Passed); count < want || count == 0 {
				t.Errorf("%d specs passed, want %d", count, want)
				for _, spec := range through.results.Failures() {
					t.Errorf("%s %s: %s", spec.State, spec.Name, spec.Message)
				}
			}
		}
	})
	if name == oldest || !good {
		return result
	}
	t.Run("integration", func(t *testing.T) { result.tests = integration(t, programs, tests) })
	return result
}

func passed(results critest.Results) string { return strconv.Itoa(results.Count(critest.Passed)) }

// starter tells whose child a command of exec is.
func starter(t *testing.T, n *node.Node, handler string) string {
	t.Helper()
	pod, err := n.RunPod(t.Context(), node.PodSpec{Handler: handler})
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := n.RemovePod(t.Context(), pod); err != nil {
			t.Error(err)
		}
	}()
	container, err := n.RunContainer(t.Context(), pod, node.ContainerSpec{})
	if err != nil {
		t.Fatal(err)
	}
	// The mark is in the command line of the shell, not of what looks for it.
	command := n.Crictl("exec", "-i", container, "sh", "-c", "ps -o args | grep 'matrix[-]mark'; cat /proc/version; read line; : matrix-mark")
	input, err := command.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	var said testutil.Buffer
	command.Stdout = &said
	if err := command.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := errors.Join(input.Close(), command.Wait()); err != nil {
			t.Error(err)
		}
	}()
	testutil.Eventually(t, "the command runs", func() bool { return strings.Contains(said.String(), "version") })
	child := regexp.MustCompile(fmt.Sprintf(`(?m)^PPid:\t%d$`, n.PID("streamshim")))
	processes, err := filepath.Glob("/proc/[0-9]*")
	if err != nil {
		t.Fatal(err)
	}
	for _, process := range processes {
		arguments, _ := os.ReadFile(process + "/cmdline") //nolint:errcheck // it may have ended
		status, _ := os.ReadFile(process + "/status")     //nolint:errcheck // as above
		if bytes.Contains(arguments, []byte("read line; : matrix-mark")) && bytes.HasPrefix(arguments, []byte("sh\x00")) && child.Match(status) {
			return "streamshim"
		}
	}
	return "containerd, relayed"
}

// assemble makes a folder of links to the programs of a node, of which some are another version, and says which version.
func assemble(t *testing.T, name string) (folder, version string) {
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
	built := func(name string) (version string) {
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
		return fields[1]
	}
	linkAll(node.DefaultPrograms())
	switch name {
	case oldest:
		return folder, built("containerd-1.7") + ", " + built("runc-1.1")
	case debiansCrun:
		crun, err := exec.LookPath("crun")
		if err != nil {
			t.Fatal(err)
		}
		said, err := exec.Command(crun, "--version").Output()
		if err != nil {
			t.Fatal(err)
		}
		runc := filepath.Join(folder, "runc")   // the node calls its runtime so
		if err := os.Remove(runc); err != nil { // it is a link, and what it points to must stay
			t.Fatal(err)
		}
		// crun refuses a hybrid cgroup hierarchy whose v2 part has controllers. The wrapper hides that part.
		wrapper := "#!/bin/sh\nexec unshare -m sh -c 'umount /sys/fs/cgroup/unified 2>/dev/null; exec \"$0\" \"$@\"' " + crun + " \"$@\"\n"
		if err := os.WriteFile(runc, []byte(wrapper), 0o755); err != nil {
			t.Fatal(err)
		}
		first, _, _ := strings.Cut(string(said), "\n")
		version := strings.TrimPrefix(first, "crun version ") + ", Debian's"
		if strings.HasPrefix(version, "1.8.") { // it refuses the OCI specification of containerd 2 ("unknown version specified")
			version += ", with containerd " + built("containerd-1.7")
		}
		return folder, version
	}
	return folder, built(name)
}

// integration runs the packages with the programs and returns how many tests passed.
func integration(t *testing.T, programs string, packages []string) string {
	t.Helper()
	command := exec.Command("go", append([]string{"test", "-json", "-p", "1", "-count", "1", "-timeout", "60m", "-skip", skipped}, packages...)...)
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
