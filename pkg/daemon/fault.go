//go:build handoverfault

package daemon

import (
	"os"
	"strings"
	"time"
)

// fault goes wrong at a step of the way to a hand-over, as STREAMSHIM_FAULT says: "exit check", "hang read", "panic resume". It
// is only in programs that tests build.
func fault(step string) {
	how, at, _ := strings.Cut(os.Getenv("STREAMSHIM_FAULT"), " ")
	if at != step {
		return
	}
	switch how {
	case "exit":
		os.Exit(0)
	case "hang":
		time.Sleep(time.Hour)
	case "panic":
		panic("a fault at " + step)
	}
}
