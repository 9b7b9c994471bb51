package daemon

import (
	"errors"
	"os"
	"path/filepath"
	"reflect"
	"testing"

	"github.com/streamshim/streamshim/pkg/config"
	"github.com/streamshim/streamshim/pkg/handover"
)

// TestConfigurationOfThePredecessor checks that a configuration comes back as it was, and that keys which an older program did not
// know have their defaults.
func TestConfigurationOfThePredecessor(t *testing.T) {
	file := filepath.Join(t.TempDir(), "config.toml")
	if err := os.WriteFile(file, []byte(`
log_level = "warn"
notify_watch = true
[exec]
idle_timeout = "5m"
helpers = ["tar"]
[recording]
directory = "/r"
[[recording.rule]]
namespaces = ["shop"]
pod_labels = {a = "b"}
[limits]
sessions_per_pod = 7
[[deny]]
kinds = ["attach"]
tty = true
message = "no"
`), 0o600); err != nil {
		t.Fatal(err)
	}
	c := config.Default()
	if err := c.Read(file, func(*config.Config) {}); err != nil {
		t.Fatal(err)
	}
	lost := errors.New("it cannot be read")
	state := handover.NewState("before")
	p := &predecessor{state: state}
	if _, err := p.configuration(lost); !errors.Is(err, lost) {
		t.Errorf("of a program that has left none: %v", err)
	}
	if _, err := (*predecessor)(nil).configuration(lost); !errors.Is(err, lost) {
		t.Errorf("without a predecessor: %v", err)
	}
	if err := state.Put(configPart, c); err != nil {
		t.Fatal(err)
	}
	if got, err := p.configuration(lost); err != nil || !reflect.DeepEqual(got, c) {
		t.Errorf("%v: %+v, want %+v", err, got, c)
	}
	if err := state.Put(configPart, map[string]any{"LogLevel": "debug"}); err != nil {
		t.Fatal(err)
	}
	want := config.Default()
	want.LogLevel = "debug"
	if got, err := p.configuration(lost); err != nil || !reflect.DeepEqual(got, want) {
		t.Errorf("of an older program: %v: %+v, want %+v", err, got, want)
	}
	state.Parts[configPart] = []byte("nonsense")
	if _, err := p.configuration(lost); !errors.Is(err, lost) {
		t.Errorf("one that cannot be read either: %v", err)
	}
}
