// Package exec tests what users see of exec at the edges of a session, and what containers and probes see of it, with stock
// client-go and crictl on a real node.
package exec

import (
	"os"
	"testing"

	"github.com/streamshim/streamshim/test/internal/harness"
)

func TestMain(m *testing.M) {
	if os.Getenv(clientVariable) != "" {
		os.Exit(clientMain())
	}
	os.Exit(harness.Main(m, "exec"))
}
