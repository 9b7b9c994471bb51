package upgrade

import (
	"strings"
	"testing"

	"github.com/streamshim/streamshim/test/internal/harness"
	"github.com/streamshim/streamshim/test/internal/node"
)

// TestDryRun checks that a dry run prints what a hand-over would cost and what the last one did, and changes nothing:
// neither sessions nor metrics.
func TestDryRun(t *testing.T) {
	first, second := build(t, "first"), build(t, "second")
	metrics := harness.UnusedAddress(t)
	shim := harness.StartInstalled(t, "metrics_address = '"+metrics+"'\n", first)
	container := harness.RunContainer(t, node.ContainerSpec{})
	l := newLoad(t, shim, container)
	l.terminal("SPDY")
	l.echo("WebSocket")
	l.await(2)
	shim.Install(t, second)
	dryRun := func(parts ...string) string {
		t.Helper()
		out, err := shim.Upgrade(t, "--dry-run")
		if err != nil {
			t.Fatalf("%v: %s", err, out)
		}
		for _, part := range parts {
			if !strings.Contains(out, part) {
				t.Errorf("%q does not say %q", out, part)
			}
		}
		return out
	}
	const expected = "all would stand still for about "
	out := dryRun("streamshim second would take over from first: 2 sessions would go on, 0 would end", expected)
	if strings.Contains(out, "the last hand-over") || strings.Contains(out, expected+"0s") || strings.Contains(out, "state of about 0;") {
		t.Error(out)
	}
	if out, err := shim.Upgrade(t); err != nil || !strings.Contains(out, " descriptors)") {
		t.Fatalf("%v: %s", err, out)
	}
	pause := harness.Metric(t, metrics, "streamshim_handover_pause_seconds")
	if pause == 0 {
		t.Error("the pause has not been measured")
	}
	dryRun("streamshim second would take over from second: 2 sessions", "the last hand-over, from first to second at ", " with 2 sessions (state of ")
	if after := harness.Metric(t, metrics, "streamshim_handover_pause_seconds"); after != pause {
		t.Errorf("after a dry run the last pause was %v, before %v", after, pause)
	}
	l.finish()
}
