// Package attach tests what users see of attach, with stock client-go on a real node.
package attach

import (
	"os"
	"testing"

	"github.com/streamshim/streamshim/test/internal/harness"
)

func TestMain(m *testing.M) { os.Exit(harness.Main(m, "attach")) }
