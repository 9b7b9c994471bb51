package critest

import (
	"context"
	"encoding/json"
	"os"
	"path/filepath"
	"sync"
	"testing"

	"github.com/streamshim/streamshim/test/internal/node"
)

// artefacts is where reports are left for people and CI: $STREAMSHIM_ARTEFACTS, or .artefacts at
// the top of the working copy.
func artefacts(t *testing.T) string {
	t.Helper()
	folder := os.Getenv("STREAMSHIM_ARTEFACTS")
	if folder == "" {
		folder = filepath.Join("..", "..", ".artefacts")
	}
	folder, err := filepath.Abs(folder)
	if err != nil {
		t.Fatal(err)
	}
	return filepath.Join(folder, "critest")
}

func newSuite(t *testing.T, config node.Config) (*node.Node, *Suite) {
	t.Helper()
	node.Require(t)
	if err := requireFreePorts(t.Context()); err != nil {
		t.Fatal(err)
	}
	n := node.StartForTest(t, config)
	suite, err := NewSuite(t.Context(), n, artefacts(t))
	if err != nil {
		t.Fatal(err)
	}
	return n, suite
}

// tidySharedMemory removes at the test's end what critest leaves of it on the host.
func tidySharedMemory(t *testing.T) {
	t.Helper()
	before, err := sharedMemorySegments()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := removeNewSegments(before); err != nil {
			t.Error(err)
		}
	})
}

// TestConformance is the whole suite on containerd alone and with streamshim in between, where nothing may be
// worse. Both run at the same time, on a node each, since critest mostly waits.
func TestConformance(t *testing.T) {
	tidySharedMemory(t)
	n, suite := newSuite(t, node.Config{Name: "critest", Streamshim: node.Binary(t)})
	alone, suiteAlone := newSuite(t, node.Config{Name: "bare"})
	type run func(ctx context.Context, name, endpoint string) (Results, error)
	try := func(name string, run run, n *node.Node) Results {
		results, err := run(t.Context(), name, n.Socket())
		if err != nil {
			t.Error(err)
		}
		return results
	}
	var bare, front Results
	var both sync.WaitGroup
	both.Go(func() { bare = try("containerd", suiteAlone.RunWithoutHost, alone) })
	both.Go(func() { front = try("streamshim", suite.RunWithoutHost, n) })
	both.Wait()
	bare = bare.and(try("containerd", suiteAlone.RunOnHost, alone))
	front = front.and(try("streamshim", suite.RunOnHost, n))
	if t.Failed() {
		return
	}
	t.Logf("containerd alone: %s", bare.Summary())
	t.Logf("streamshim:       %s", front.Summary())

	for _, problem := range append(checkBaseline(bare), compare(bare, front)...) {
		t.Error(problem)
	}
	writeReport(t, bare, front)
}

// writeReport leaves both runs as one markdown table and as JSON.
func writeReport(t *testing.T, bare, front Results) {
	t.Helper()
	text, err := json.MarshalIndent(map[string]Results{"containerd": bare, "streamshim": front}, "", "  ")
	if err != nil {
		t.Fatal(err)
	}
	for name, content := range map[string][]byte{"report.json": text, "report.md": []byte(markdown(bare, front))} {
		path := filepath.Join(artefacts(t), name)
		if err := os.WriteFile(path, content, 0o644); err != nil {
			t.Fatal(err)
		}
		t.Logf("wrote %s", path)
	}
}

// TestStreamingOverWebSocket runs the Streaming specs with critest's WebSocket clients. There is
// nothing to compare with: containerd 2.4.2 passes none of them, since it knows neither
// v5.channel.k8s.io nor SPDY tunnelled in a WebSocket (KEP-4006).
func TestStreamingOverWebSocket(t *testing.T) {
	tidySharedMemory(t)
	n, suite := newSuite(t, node.Config{Name: "critestws", Streamshim: node.Binary(t)})
	results, err := suite.Run(t.Context(), "streamshim-websocket", n.Socket(),
		"-ginkgo.focus", "Streaming", "-websocket-exec", "-websocket-attach", "-websocket-portforward")
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("streamshim, WebSocket: %s", results.Summary())
	for _, spec := range results.Failures() {
		t.Errorf("%s %s: %s", spec.State, spec.Name, firstLine(spec.Message))
	}
	if passed := results.Count(Passed); passed != 5 {
		t.Errorf("%d specs passed, want 5", passed)
	}
}
