package ociruntime

import (
	"encoding/json"
	"slices"
	"testing"

	"github.com/opencontainers/runtime-spec/specs-go"

	"github.com/streamshim/streamshim/pkg/workload"
)

// TestProcessSpecIsTheContainers checks that all but the command is the container's, even what is added to the spec one
// day.
func TestProcessSpecIsTheContainers(t *testing.T) {
	text := `{
		"terminal": true, "consoleSize": {"height": 1, "width": 2}, "args": ["main"], "commandLine": "main",
		"user": {"uid": 1, "gid": 2, "umask": 18, "additionalGids": [3]}, "env": ["A=1", "B=2", "A=3"], "cwd": "/x",
		"capabilities": {"bounding": ["CAP_KILL"]}, "rlimits": [{"type": "RLIMIT_NOFILE", "hard": 1, "soft": 1}],
		"noNewPrivileges": true, "apparmorProfile": "p", "oomScoreAdj": 5, "scheduler": {"policy": "SCHED_BATCH"},
		"selinuxLabel": "l", "ioPriority": {"class": "IOPRIO_CLASS_IDLE", "priority": 0}, "execCPUAffinity": {"initial": "0"}
	}`
	var container specs.Process
	if err := json.Unmarshal([]byte(text), &container); err != nil {
		t.Fatal(err)
	}
	before, _ := json.Marshal(container)
	spec, err := ProcessSpec(&container, workload.Command{Args: []string{"c"}, Env: []string{"A=4", "C=", "A=5"}, Size: workload.Size{Width: 8, Height: 9}})
	if err != nil {
		t.Fatal(err)
	}
	after, _ := json.Marshal(container)
	if string(before) != string(after) {
		t.Errorf("the container's own spec was changed: %s", after)
	}
	if want := []string{"A=5", "B=2", "C="}; !slices.Equal(spec.Env, want) {
		t.Errorf("env %q, want %q", spec.Env, want)
	}
	if spec.Terminal || spec.ConsoleSize != nil || spec.CommandLine != "" || !slices.Equal(spec.Args, []string{"c"}) {
		t.Errorf("%+v", spec)
	}
	spec.Args, spec.Env, spec.CommandLine = container.Args, container.Env, container.CommandLine
	spec.Terminal, spec.ConsoleSize = container.Terminal, container.ConsoleSize
	if rest, _ := json.Marshal(spec); string(rest) != string(before) {
		t.Errorf("%s\nwant %s", rest, before)
	}
	for _, bad := range []workload.Command{{}, {Args: []string{"a\x00b"}}, {Args: []string{"a"}, Env: []string{"novalue"}}, {Args: []string{"a"}, Env: []string{"=v"}}} {
		if _, err := ProcessSpec(&container, bad); err == nil {
			t.Errorf("%+v was taken", bad)
		}
	}
}
