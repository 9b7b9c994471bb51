//go:build !handoverfault

package daemon

// fault is where tests have a program go wrong, see fault.go.
func fault(string) {}
