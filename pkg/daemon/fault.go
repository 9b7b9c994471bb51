//go:build handoverfault

package daemon

import (
	"os"
	"strings"
	"time"
)

// takeOverLimit bounds how long a program may take to take over, from its start until it serves.
const takeOverLimit = 5 * time.Second

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
