//go:build !handoverfault

package daemon

import "time"

// takeOverLimit bounds how long a program may take to take over, from its start until it serves.
const takeOverLimit = 30 * time.Second

// fault is where tests have a program go wrong, see fault.go.
func fault(string) {}
