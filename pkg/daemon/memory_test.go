package daemon

import (
	"math"
	"os"
	"path/filepath"
	"testing"

	"github.com/streamshim/streamshim/pkg/config"
)

func TestCgroupMemory(t *testing.T) {
	for _, test := range []struct {
		name, membership string
		files            map[string]string
		want             int64
	}{
		{"none", "0::/\n", nil, math.MaxInt64},
		{"version 2", "0::/system.slice/streamshim.service\n",
			map[string]string{"system.slice/streamshim.service/memory.max": "300\n"}, 300},
		{"the slice has less", "0::/system.slice/streamshim.service\n",
			map[string]string{"system.slice/streamshim.service/memory.max": "300\n", "system.slice/memory.max": "200\n"}, 200},
		{"version 2 without a limit", "0::/a\n", map[string]string{"a/memory.max": "max\n"}, math.MaxInt64},
		{"version 1", "4:cpu,cpuacct:/x\n3:memory:/a/b\n0::/y\n",
			map[string]string{"memory/a/b/memory.limit_in_bytes": "700\n", "memory/a/memory.limit_in_bytes": "9223372036854771712\n"}, 700},
		{"version 1 without a limit", "3:memory:/a\n",
			map[string]string{"memory/a/memory.limit_in_bytes": "9223372036854771712\n"}, math.MaxInt64},
	} {
		t.Run(test.name, func(t *testing.T) {
			root := t.TempDir()
			for name, text := range test.files {
				if err := os.MkdirAll(filepath.Join(root, filepath.Dir(name)), 0o755); err != nil {
					t.Fatal(err)
				}
				if err := os.WriteFile(filepath.Join(root, name), []byte(text), 0o600); err != nil {
					t.Fatal(err)
				}
			}
			membership := filepath.Join(root, "membership")
			if err := os.WriteFile(membership, []byte(test.membership), 0o600); err != nil {
				t.Fatal(err)
			}
			if got := cgroupMemory(membership, root); got != test.want {
				t.Errorf("%d, want %d", got, test.want)
			}
		})
	}
}

func TestBudgets(t *testing.T) {
	for _, test := range []struct {
		configured, memory int64
		want               budgets
	}{
		{-1, 2 << 30, budgets{128 << 20, 64 << 20, 64 << 20}},
		{-1, 512 << 20, budgets{64 << 20, 64 << 20, 64 << 20}},
		{-1, 8 << 30, budgets{512 << 20, 256 << 20, 256 << 20}},
		{-1, 256 << 30, budgets{1 << 30, 512 << 20, 512 << 20}},
		{0, 2 << 30, budgets{}},
		{5, 2 << 30, budgets{5, 5, 5}},
	} {
		c := config.Default()
		c.Limits.Buffers, c.Limits.SyncOutput, c.Limits.RecordingBuffers = test.configured, test.configured, test.configured
		if got := budgetsOf(c, test.memory); got != test.want {
			t.Errorf("%d of %d: %d, want %d", test.configured, test.memory, got, test.want)
		}
	}
	if (budgets{1, 0, 3}).sum() != 0 || (budgets{1, 2, 3}).sum() != 6 {
		t.Error("the sum of budgets")
	}
}
