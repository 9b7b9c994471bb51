package nodeinstall

import (
	"context"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func write(t *testing.T, path, text string) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(text), 0o640); err != nil {
		t.Fatal(err)
	}
}

func read(t *testing.T, path string) string {
	t.Helper()
	text, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}

const (
	shim       = "unix:///run/streamshim/streamshim.sock"
	containerd = "unix:///run/containerd/containerd.sock"
)

// One line is changed, in YAML and in JSON, and nothing else.
func TestSetKey(t *testing.T) {
	for _, test := range []struct{ name, text, want string }{
		{"YAML", "kind: KubeletConfiguration\ncontainerRuntimeEndpoint: " + containerd + " # ours\nport: 1\n", "kind: KubeletConfiguration\ncontainerRuntimeEndpoint: \"" + shim + "\" # ours\nport: 1\n"},
		{"empty", "containerRuntimeEndpoint: \"\"\n", "containerRuntimeEndpoint: \"" + shim + "\"\n"},
		{"missing", "port: 1", "port: 1\ncontainerRuntimeEndpoint: \"" + shim + "\"\n"},
		{"JSON", "{\n  \"containerRuntimeEndpoint\": \"" + containerd + "\",\n  \"port\": 1\n}\n", "{\n  \"containerRuntimeEndpoint\": \"" + shim + "\",\n  \"port\": 1\n}\n"},
		{"JSON without", "{\"port\": 1}", "{\n  \"containerRuntimeEndpoint\": \"" + shim + "\",\"port\": 1}"},
		{"empty JSON", "{ }", "{\n  \"containerRuntimeEndpoint\": \"" + shim + "\" }"},
		{"in a comment", "# containerRuntimeEndpoint: x\nport: 1\n", "# containerRuntimeEndpoint: x\nport: 1\ncontainerRuntimeEndpoint: \"" + shim + "\"\n"},
	} {
		got, err := setKey([]byte(test.text), shim)
		if err != nil || string(got) != test.want {
			t.Errorf("%s: %v\n%s\nexpected\n%s", test.name, err, got, test.want)
		}
	}
	for _, text := range []string{"nested:\n  containerRuntimeEndpoint: x\n", "{\"port\": 1, \"containerRuntimeEndpoint\": \"x\"}", "a: [\n"} {
		if got, err := setKey([]byte(text), shim); err == nil {
			t.Errorf("%q was changed to %q", text, got)
		}
	}
}

// nothingRuns is a node without k3s and rke2; active is one with this unit.
type nothingRuns struct {
	Services
	active string
}

func (n nothingRuns) Active(_ context.Context, unit string) bool { return unit == n.active }

func TestPlainKubelet(t *testing.T) {
	root := t.TempDir()
	file := filepath.Join(root, defaultKubeletConfig)
	write(t, file, "port: 1\n")
	k, err := FindKubelet(t.Context(), nothingRuns{}, Kubelet{}, root, filepath.Join(root, "proc"))
	if err != nil || k.Kind != Plain || k.File != file || k.Service != "kubelet.service" {
		t.Fatalf("%+v, %v", k, err)
	}
	if got, err := k.Endpoint(); err != nil || got != containerd {
		t.Errorf("the default: %q, %v", got, err)
	}
	if err := k.SetEndpoint(shim); err != nil {
		t.Fatal(err)
	}
	if got, err := k.Endpoint(); err != nil || got != shim {
		t.Errorf("%q, %v", got, err)
	}
	if info, err := os.Stat(file); err != nil || info.Mode().Perm() != 0o640 {
		t.Errorf("the mode is %v, %v", info.Mode(), err)
	}

	// kubeadm's flags win, and are what is changed.
	flags := filepath.Join(filepath.Dir(file), kubeadmFlags)
	write(t, flags, `KUBELET_KUBEADM_ARGS="--v=2 --container-runtime-endpoint=/run/crio/crio.sock --node-ip=1.2.3.4"`)
	if got, err := k.Endpoint(); err != nil || got != "unix:///run/crio/crio.sock" {
		t.Errorf("%q, %v", got, err)
	}
	if err := k.SetEndpoint(shim); err != nil {
		t.Fatal(err)
	}
	if got := read(t, flags); got != `KUBELET_KUBEADM_ARGS="--v=2 --container-runtime-endpoint=`+shim+` --node-ip=1.2.3.4"` {
		t.Error(got)
	}
}

// What the running kubelet was given is what counts; a flag that nobody can change from here is an error.
func TestRunningKubelet(t *testing.T) {
	root := t.TempDir()
	proc := filepath.Join(root, "proc")
	write(t, filepath.Join(proc, "7/comm"), "kubelet\n")
	write(t, filepath.Join(root, "k.json"), `{"containerRuntimeEndpoint": "unix:///run/crio/crio.sock"}`)
	line := "kubelet\x00--config=" + root + "/k.json\x00--kubeconfig\x00/x/kubeconfig\x00--hostname-override=n1\x00"
	write(t, filepath.Join(proc, "7/cmdline"), line)
	k, err := FindKubelet(t.Context(), nothingRuns{}, Kubelet{}, root, proc)
	if err != nil || k.File != root+"/k.json" || k.Kubeconfig != "/x/kubeconfig" || k.Hostname != "n1" {
		t.Fatalf("%+v, %v", k, err)
	}
	if got, err := k.Endpoint(); err != nil || got != "unix:///run/crio/crio.sock" {
		t.Errorf("%q, %v", got, err)
	}
	write(t, filepath.Join(proc, "7/cmdline"), line+"--container-runtime-endpoint=/run/crio/crio.sock\x00")
	if k, err = FindKubelet(t.Context(), nothingRuns{}, Kubelet{}, root, proc); err != nil {
		t.Fatal(err)
	}
	if _, err := k.Endpoint(); err == nil || !strings.Contains(err.Error(), "systemctl cat") {
		t.Errorf("%v", err)
	}
}

func TestK3s(t *testing.T) {
	for active, file := range map[string]string{
		"k3s.service": "etc/rancher/k3s", "k3s-agent.service": "etc/rancher/k3s",
		"rke2-server.service": "etc/rancher/rke2", "rke2-agent.service": "etc/rancher/rke2",
	} {
		root := t.TempDir()
		k, err := FindKubelet(t.Context(), nothingRuns{active: active}, Kubelet{}, root, root)
		if err != nil || k.Service != active || k.File != filepath.Join(root, file, "config.yaml.d", dropIn) {
			t.Fatalf("%+v, %v", k, err)
		}
		if got, err := k.Endpoint(); err != nil || got != k3sRuntime {
			t.Errorf("%q, %v", got, err)
		}
		if err := k.SetEndpoint(shim); err != nil {
			t.Fatal(err)
		}
		if got := read(t, k.File); !strings.Contains(got, "kubelet-arg+:\n- container-runtime-endpoint="+shim+"\n") {
			t.Error(got)
		}
		if got, err := k.Endpoint(); err != nil || got != shim {
			t.Errorf("%q, %v", got, err)
		}
		if err := k.SetEndpoint(k3sRuntime); err != nil {
			t.Fatal(err)
		}
		if _, err := os.Stat(k.File); !os.IsNotExist(err) {
			t.Errorf("the drop-in was left: %v", err)
		}
	}
}
