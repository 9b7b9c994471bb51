package portforward

import (
	"os"
	"testing"

	"github.com/streamshim/streamshim/test/internal/harness"
)

// The tests share a node; the one that measures streamshim has one of its own.
func TestMain(m *testing.M) { os.Exit(harness.Main(m, "portforward")) }
