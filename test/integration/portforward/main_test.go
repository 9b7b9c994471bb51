package portforward

import (
	"os"
	"testing"

	"github.com/streamshim/streamshim/test/internal/harness"
)

// The tests share a node, one after the other, because one of them measures streamshim.
func TestMain(m *testing.M) { os.Exit(harness.Main(m, "portforward")) }
