package portforward

import (
	"os"
	"testing"

	"github.com/streamshim/streamshim/test/internal/harness"
)

// The tests share a node. The test that measures streamshim has its own streamshim.
func TestMain(m *testing.M) { os.Exit(harness.Main(m, "portforward")) }
