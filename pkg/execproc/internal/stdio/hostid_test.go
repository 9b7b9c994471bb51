package stdio

import (
	"testing"

	"github.com/opencontainers/runtime-spec/specs-go"
)

func TestHostID(t *testing.T) {
	mappings := []specs.LinuxIDMapping{{ContainerID: 0, HostID: 1000, Size: 10}, {ContainerID: 100, HostID: 5000, Size: 1}}
	for _, test := range []struct {
		id       uint32
		mappings []specs.LinuxIDMapping
		want     int // -1: an error
	}{{7, nil, 7}, {0, mappings, 1000}, {9, mappings, 1009}, {10, mappings, -1}, {100, mappings, 5000}, {101, mappings, -1}} {
		got, err := hostID(test.id, test.mappings)
		if (err != nil) != (test.want < 0) || (err == nil && got != test.want) {
			t.Errorf("%d: %d, %v", test.id, got, err)
		}
	}
}
