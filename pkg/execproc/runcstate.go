package execproc

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
)

// defaultRuncRoot is where runc keeps its states when it is not told.
const defaultRuncRoot = "/run/runc"

// maxRuncState limits the state file that is read; a large seccomp profile makes it 100 KiB.
const maxRuncState = 4 << 20

// runcState is what the native engine must know of state.json, which runc writes for a container and
// reads for each exec (opencontainers/runc, libcontainer/container_linux.go, type State).
type runcState struct {
	cgroups    map[string]string // by controller; "" for version 2
	namespaces map[string]string // by type ("NEWNET"): what an exec joins
	newKeyring bool              // the container has a session keyring of its own
	seccomp    bool              // it has a seccomp profile
}

// plainState are the parts of a state, and plainConfig those of its config, whose meaning for an exec is
// known here: they are looked at below, say what the process's spec says too, or matter only when the
// container is created. A state with anything else was written by a runc that knows more than this
// file, or asks for something that the native engine does not do.
var (
	plainState = []string{
		"id", "init_process_pid", "init_process_start", "created", "config", "rootless", "cgroup_paths", "namespace_paths",
		"external_descriptors", "intel_rdt_path", "intel_rdt_mon_path",
	}
	plainConfig = []string{
		"no_pivot_root", "parent_death_signal", "rootfs", "umask", "readonlyfs", "rootPropagation", "mounts", "devices",
		"netDevices", "mount_label", "hostname", "domainname", "namespaces", "capabilities", "networks", "routes",
		"cgroups", "apparmor_profile", "process_label", "rlimits", "oom_score_adj", "uid_mappings", "gid_mappings",
		"mask_paths", "readonly_paths", "sysctl", "seccomp", "no_new_privileges", "Hooks", "version", "labels",
		"no_new_keyring", "time_offsets",
	}
)

// readRuncState reads the state of a container that runc runs. An error says why the native engine
// should keep its hands off.
func readRuncState(c Container) (runcState, error) {
	root := c.Root
	if root == "" {
		root = defaultRuncRoot
	}
	path := filepath.Join(root, c.ID, "state.json")
	info, err := os.Stat(path)
	if err != nil {
		return runcState{}, fmt.Errorf("no state of runc: %w", err)
	}
	if info.Size() > maxRuncState {
		return runcState{}, fmt.Errorf("runc's state has %d bytes", info.Size())
	}
	data, err := os.ReadFile(path)
	if err != nil {
		return runcState{}, fmt.Errorf("read runc's state: %w", err)
	}
	return parseRuncState(data, c)
}

func parseRuncState(data []byte, c Container) (runcState, error) {
	var parts map[string]json.RawMessage
	var state struct {
		ID         string            `json:"id"`
		Pid        int               `json:"init_process_pid"`
		Start      uint64            `json:"init_process_start"`
		Rootless   bool              `json:"rootless"`
		Cgroups    map[string]string `json:"cgroup_paths"`
		Namespaces map[string]string `json:"namespace_paths"`
		RDT        string            `json:"intel_rdt_path"`
		Config     json.RawMessage   `json:"config"`
	}
	var config struct {
		NoNewKeyring bool `json:"no_new_keyring"`
		Seccomp      *struct {
			Listener string `json:"listener_path"`
		} `json:"seccomp"`
	}
	var configParts map[string]json.RawMessage
	for _, into := range []any{&parts, &state} {
		if err := json.Unmarshal(data, into); err != nil {
			return runcState{}, fmt.Errorf("runc's state: %w", err)
		}
	}
	for _, into := range []any{&configParts, &config} {
		if err := json.Unmarshal(state.Config, into); err != nil {
			return runcState{}, fmt.Errorf("runc's state: config: %w", err)
		}
	}
	if err := onlyPlain(parts, plainState); err != nil {
		return runcState{}, err
	}
	if err := onlyPlain(configParts, plainConfig); err != nil {
		return runcState{}, err
	}
	switch {
	case state.ID != c.ID || state.Pid != c.InitPid:
		return runcState{}, fmt.Errorf("runc's state is of container %q with process %d", state.ID, state.Pid)
	case c.InitStartTime != 0 && state.Start != c.InitStartTime:
		return runcState{}, errors.New("runc's state is of another main process")
	case state.Rootless:
		return runcState{}, errors.New("the container is rootless")
	case state.RDT != "":
		return runcState{}, errors.New("the container uses Intel RDT")
	case config.Seccomp != nil && config.Seccomp.Listener != "":
		return runcState{}, errors.New("the container's seccomp profile notifies an agent")
	case len(state.Cgroups) == 0:
		return runcState{}, errors.New("the container has no cgroup")
	}
	return runcState{cgroups: state.Cgroups, namespaces: state.Namespaces, newKeyring: !config.NoNewKeyring, seccomp: config.Seccomp != nil}, nil
}

func onlyPlain(parts map[string]json.RawMessage, plain []string) error {
	known := make(map[string]bool, len(plain))
	for _, name := range plain {
		known[name] = true
	}
	for name, value := range parts {
		switch string(value) {
		case "null", `""`, "false", "0", "[]", "{}":
			continue // not in use
		}
		if !known[name] {
			return fmt.Errorf("runc's state has %q, which the native engine does not know", name)
		}
	}
	return nil
}
