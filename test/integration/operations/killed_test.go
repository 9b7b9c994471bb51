package operations

import (
	"fmt"
	"testing"

	"github.com/streamshim/streamshim/internal/testutil"
	"github.com/streamshim/streamshim/pkg/session/audit"
)

// TestKillLeavesNoStartWithoutEnd checks that what a SIGKILL of streamshim cuts has an end in the audit log once it runs
// again: as many ends as starts.
func TestKillLeavesNoStartWithoutEnd(t *testing.T) {
	o := start(t, "killed", operatedConfig)
	for range 3 {
		for i := range 6 {
			o.exec("web", i%2 == 0, "sleep", "1000")
		}
		testutil.Eventually(t, "six sessions are there", func() bool { return len(o.sessions()) == 6 })
		if err := o.StopStreamshim(0); err != nil {
			t.Fatal(err)
		}
		if err := o.StartStreamshim(t.Context()); err != nil {
			t.Fatal(err)
		}
		count := func() string {
			starts, ends := 0, 0
			for _, r := range o.audit() {
				switch {
				case r.Event == audit.Start:
					starts++
				case r.Event == audit.End && r.Reason == "interrupted":
					ends++
				}
			}
			return fmt.Sprint(starts, ends)
		}
		testutil.Eventually(t, "each start has an end", func() bool { var s, e int; fmt.Sscan(count(), &s, &e); return s == e && s > 0 })
		t.Log("starts and interrupted ends:", count())
	}
}
