package fleet

import "testing"

// plugin is kubectl streamshim in this cluster.
func plugin(t *testing.T, f *fleet) { t.Helper() }
