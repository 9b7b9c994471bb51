// Package fleet tests what a fleet gets: the image, the chart, and the DaemonSet that moves a node's
// kubelet to streamshim and back, with a real API server, scheduler, controller-manager, kubelet and
// containerd. "make fleet" runs it, because the programs it needs besides take minutes to build.
package fleet

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/streamshim/streamshim/test/internal/kubernetes"
	"github.com/streamshim/streamshim/test/internal/node"
)

const (
	top       = "../.."
	chart     = top + "/deploy/helm/streamshim"
	namespace = "streamshim-system"
	// kubeVersion is the test cluster's; a helm that is built without flags takes it for 1.20.
	kubeVersion = "1.36.0"
)

func need(t *testing.T) {
	t.Helper()
	if os.Getenv("STREAMSHIM_FLEET") == "" {
		t.Skip("make fleet runs this")
	}
}

func run(t *testing.T, stdin, name string, args ...string) string {
	t.Helper()
	command := exec.Command(name, args...)
	command.Stdin = strings.NewReader(stdin)
	var stderr bytes.Buffer
	command.Stderr = &stderr
	out, err := command.Output()
	if err != nil {
		t.Fatalf("%s %v: %v\n%s%s", name, args, err, out, &stderr)
	}
	return string(out)
}

func helm(t *testing.T, args ...string) string {
	t.Helper()
	return run(t, "", top+"/bin/helm", args...)
}

// The manifests in the repository are what the chart says, and the chart takes no value it does not know.
func TestChart(t *testing.T) {
	need(t)
	helm(t, "lint", "--strict", chart)
	kept, err := os.ReadFile(top + "/deploy/manifests/streamshim.yaml")
	if err != nil {
		t.Fatal(err)
	}
	if rendered := run(t, "", "make", "-s", "-C", top, "print-manifests"); rendered != string(kept) {
		t.Error("deploy/manifests/streamshim.yaml is not what the chart says; please run make manifests")
	}
	for _, bad := range []string{"mode=remove", "node.kubelet=docker", "apiServer=http://x", "typo=1"} {
		if out, err := exec.Command(top+"/bin/helm", "template", "x", chart, "--kube-version", kubeVersion, "--set", bad).CombinedOutput(); err == nil {
			t.Errorf("--set %s was taken:\n%s", bad, out)
		}
	}
}

// The same sources give the same image.
func TestImageIsReproducible(t *testing.T) {
	need(t)
	dir := t.TempDir()
	var sums []string
	for _, name := range []string{"a.tar", "b.tar"} {
		run(t, "", "make", "-s", "-C", top, "image", "IMAGE="+filepath.Join(dir, name))
		sums = append(sums, strings.Fields(run(t, "", "sha256sum", filepath.Join(dir, name)))[0])
	}
	if sums[0] != sums[1] {
		t.Errorf("two builds differ: %v", sums)
	}
	index := run(t, "", "tar", "-xOf", filepath.Join(dir, "a.tar"), "index.json")
	var top struct{ Manifests []struct{ Digest string } }
	if err := json.Unmarshal([]byte(index), &top); err != nil || len(top.Manifests) != 1 {
		t.Fatalf("%v: %s", err, index)
	}
	inner := run(t, "", "tar", "-xOf", filepath.Join(dir, "a.tar"), "blobs/sha256/"+strings.TrimPrefix(top.Manifests[0].Digest, "sha256:"))
	for _, architecture := range []string{"amd64", "arm64"} {
		if !strings.Contains(inner, `"architecture":"`+architecture+`"`) {
			t.Errorf("no image for %s in %s", architecture, inner)
		}
	}
}

// fleet is a cluster of one node whose kubelet talks to containerd, and what is needed to install on it.
type fleet struct {
	*kubernetes.Cluster
	t        *testing.T
	node     *kubernetes.Node
	services *services
	dir      string // of what is installed
}

func start(t *testing.T) *fleet {
	t.Helper()
	need(t)
	node.Require(t)
	dir := filepath.Join(os.TempDir(), "streamshim-test", "fleet")
	cluster, err := kubernetes.Start(t.Context(), kubernetes.Config{Dir: dir, Nodes: []kubernetes.NodeConfig{{Name: "fleet"}}, Logf: t.Logf})
	if err != nil {
		t.Fatal(err)
	}
	f := &fleet{Cluster: cluster, t: t, node: cluster.Node("fleet"), dir: filepath.Join(dir, "host")}
	t.Cleanup(func() {
		if err := cluster.Close(); err != nil {
			t.Error(err)
		}
		if !t.Failed() {
			os.RemoveAll(dir)
		}
	})
	if err := os.RemoveAll(f.dir); err != nil {
		t.Fatal(err)
	}
	f.services = newServices(t, f.node, f.dir)
	pki := filepath.Join(dir, "pki")
	for name, args := range map[string][]string{
		"kube-controller-manager": {
			"--controllers=daemonset-controller,root-ca-certificate-publisher-controller,serviceaccount-controller,garbage-collector-controller",
			"--root-ca-file=" + pki + "/ca.crt", "--service-account-private-key-file=" + pki + "/service-accounts.key",
		},
		"kube-scheduler": nil,
	} {
		program, err := filepath.Abs(top + "/bin/" + name)
		if err != nil {
			t.Fatal(err)
		}
		args = append(args, "--kubeconfig="+cluster.Kubeconfig(), "--leader-elect=false", "--secure-port=0")
		if err := f.node.StartCompanion(name, program, args...); err != nil {
			t.Fatal(err)
		}
	}
	return f
}

func (f *fleet) kubectl(stdin string, args ...string) string {
	f.t.Helper()
	out, err := f.tryKubectl(stdin, args...)
	if err != nil {
		f.t.Fatalf("kubectl %v: %v\n%s", args, err, out)
	}
	return out
}

func (f *fleet) tryKubectl(stdin string, args ...string) (string, error) {
	ctx, cancel := context.WithTimeout(f.t.Context(), 4*time.Minute)
	defer cancel()
	command := f.Kubectl(ctx, kubernetes.WebSocket, args...)
	command.Stdin = strings.NewReader(stdin)
	out, err := command.CombinedOutput()
	return string(out), err
}

// load imports the image that make image has made.
func (f *fleet) load() {
	f.t.Helper()
	socket := strings.TrimPrefix(f.node.ContainerdSocket(), "unix://")
	f.t.Log(run(f.t, "", f.node.Program("ctr"), "--address", socket, "--namespace", "k8s.io", "images", "import", top+"/dist/streamshim-image.tar"))
}

// manifests renders the chart for this node, whose places are not a real one's.
func (f *fleet) manifests(mark string, more ...string) string {
	f.t.Helper()
	run := filepath.Join(f.dir, "run")
	timeout := "3m"
	if mark == "broken" {
		timeout = "30s" // it will not be Ready however long
	}
	values := map[string]any{
		"namespace": map[string]any{"create": true},
		"image":     map[string]any{"tag": "test", "pullPolicy": "Never"},
		"config": fmt.Sprintf("# %s\nadmin = \"unix://%s/admin.sock\"\nstate_dir = \"%s/state\"\nmetrics_address = \"%s:9477\"\n[[recording.rule]]\n[recording]\ndirectory = %q\n",
			mark, run, run, f.node.Address, filepath.Join(f.dir, "log", "recordings")),
		"apiServer": "https://" + strings.TrimPrefix(f.server(), "https://"),
		"metrics":   map[string]any{"nodeAddress": f.node.Address + ":9477", "podMonitor": map[string]any{"enabled": true}},
		"node": map[string]any{
			"runDir": run, "logDir": filepath.Join(f.dir, "log"), "prefix": filepath.Join(f.dir, "opt"), "readyTimeout": timeout,
			"kubelet": "plain", "kubeletConfig": filepath.Join(f.node.Dir(), "kubelet.yaml"),
			"extraArgs": []string{
				"--systemctl=" + f.services.program, "--unit-dir=" + f.services.units, "--listen=unix://" + run + "/streamshim.sock",
				"--config=" + filepath.Join(f.dir, "etc/config.toml"), "--state=" + filepath.Join(f.dir, "lib/install.json"), "--interval=5s",
				fmt.Sprintf("--host-process=%d", os.Getpid()), // process 1 of a sandbox may not be looked at
			},
		},
	}
	text, err := json.Marshal(values)
	if err != nil {
		f.t.Fatal(err)
	}
	file := filepath.Join(f.t.TempDir(), "values.json")
	if err := os.WriteFile(file, text, 0o600); err != nil {
		f.t.Fatal(err)
	}
	return helm(f.t, append([]string{"template", "streamshim", chart, "--kube-version", kubeVersion, "--namespace", namespace, "--values", file}, more...)...)
}

func (f *fleet) server() string {
	f.t.Helper()
	return f.kubectl("", "config", "view", "--raw", "-o", "jsonpath={.clusters[0].cluster.server}")
}

// endpoint is what the kubelet's configuration says.
func (f *fleet) endpoint() string {
	f.t.Helper()
	text, err := os.ReadFile(filepath.Join(f.node.Dir(), "kubelet.yaml"))
	if err != nil {
		f.t.Fatal(err)
	}
	for line := range strings.Lines(string(text)) {
		if value, ok := strings.CutPrefix(line, "containerRuntimeEndpoint: "); ok {
			return strings.Trim(strings.TrimSpace(value), `"`)
		}
	}
	return ""
}

// eventually polls until a condition holds.
func (f *fleet) eventually(what string, limit time.Duration, holds func() bool) {
	f.t.Helper()
	for deadline := time.Now().Add(limit); ; time.Sleep(500 * time.Millisecond) {
		if holds() {
			return
		}
		if time.Now().After(deadline) {
			out, _ := f.tryKubectl("", "describe", "pods", "-n", namespace)
			logs, _ := f.tryKubectl("", "logs", "-n", namespace, "daemonset/streamshim", "--tail=50")
			f.t.Fatalf("%s: not within %v\n%s\n%s", what, limit, out, logs)
		}
	}
}

func (f *fleet) rolledOut() bool {
	_, err := f.tryKubectl("", "rollout", "status", "-n", namespace, "daemonset/streamshim", "--timeout=1s")
	return err == nil
}

// A DaemonSet moves a real kubelet to streamshim. When that does not work, the kubelet goes back by
// itself; when it does, sessions run through streamshim, also after an upgrade; and it is taken away
// again without a trace.
func TestDaemonSet(t *testing.T) {
	f := start(t)
	f.load()
	f.kubectl(podMonitorCRD(t), "apply", "-f", "-")
	f.kubectl("", "wait", "--for=condition=Established", "crd/podmonitors.monitoring.coreos.com", "--timeout=60s")
	conforms(t, f, f.manifests("first"))
	runtime := f.node.ContainerdSocket()
	if got := f.endpoint(); got != runtime {
		t.Fatalf("the kubelet begins with %q, expected %q", got, runtime)
	}
	f.kubectl(kubernetes.LabPod(f.node.Address), "apply", "-f", "-")
	f.kubectl("", "wait", "--for=condition=Ready", "pod/lab", "--timeout=90s")
	started := f.kubectl("", "get", "pod", "lab", "-o", "jsonpath={.status.containerStatuses[0].containerID}")

	// streamshim answers its check, and is gone when the kubelet needs it.
	f.services.setCrashOnMove(true)
	f.kubectl(f.manifests("broken"), "apply", "-f", "-")
	f.eventually("a node that does not get Ready goes back", 4*time.Minute, func() bool {
		text, _ := os.ReadFile(filepath.Join(f.dir, "lib/install.json"))
		return strings.Contains(string(text), `"failed"`)
	})
	if got := f.endpoint(); got != runtime {
		t.Errorf("after the failure the kubelet's endpoint is %q", got)
	}
	if err := f.node.WaitReady(t.Context()); err != nil {
		t.Error(err)
	}
	restarts := slices.DeleteFunc(f.services.asked(), func(s string) bool { return s != "restart kubelet.service" })
	if len(restarts) != 2 {
		t.Errorf("the kubelet was restarted %d times, expected there and back", len(restarts))
	}
	if _, err := os.Stat(filepath.Join(f.dir, "opt/bin/streamshim")); err == nil {
		t.Error("the program that does not work was left on the node")
	}
	f.eventually("the pod says that it is not tried again", 2*time.Minute, func() bool {
		out, _ := f.tryKubectl("", "get", "pods", "-n", namespace, "-o", "jsonpath={.items[*].status.containerStatuses[0].lastState.terminated.message}")
		return strings.Contains(out, "not tried again")
	})
	if again := f.services.asked(); slices.Contains(again, "restart kubelet.service") {
		t.Errorf("it was tried again: %v", again)
	}

	f.services.setCrashOnMove(false)
	f.kubectl(f.manifests("good"), "apply", "-f", "-")
	f.eventually("the rollout", 4*time.Minute, f.rolledOut)
	shim := "unix://" + filepath.Join(f.dir, "run/streamshim.sock")
	if got := f.endpoint(); got != shim {
		t.Fatalf("the kubelet's endpoint is %q, expected %q", got, shim)
	}
	if got := f.kubectl("", "get", "pod", "lab", "-o", "jsonpath={.status.containerStatuses[0].containerID}"); got != started {
		t.Errorf("the move has restarted the pod: %s, then %s", started, got)
	}
	if got := f.kubectl("", "exec", "lab", "--", "echo", "through streamshim"); got != "through streamshim\n" {
		t.Errorf("exec: %q", got)
	}
	f.eventually("the pod serves the node's metrics", time.Minute, func() bool {
		out, _ := f.tryKubectl("", "get", "--raw", "/api/v1/namespaces/"+namespace+"/pods/"+f.agent()+":9478/proxy/metrics")
		return strings.Contains(out, `streamshim_sessions_total{`) || strings.Contains(out, "streamshim_")
	})
	f.services.asked()

	// An upgrade hands over to the new version, which reads the new configuration, and restarts nothing.
	f.kubectl(f.manifests("upgraded"), "apply", "-f", "-")
	f.eventually("the upgrade", 4*time.Minute, func() bool {
		text, _ := os.ReadFile(filepath.Join(f.dir, "etc/config.toml"))
		return strings.HasPrefix(string(text), "# upgraded") && f.rolledOut()
	})
	if asked := f.services.asked(); slices.Contains(asked, "restart kubelet.service") || slices.Contains(asked, "restart streamshim.service") {
		t.Errorf("the upgrade asked for %v", asked)
	}
	plugin(t, f)

	f.kubectl(f.manifests("upgraded", "--set", "mode=uninstall"), "apply", "-f", "-")
	f.eventually("the kubelet is back", 4*time.Minute, func() bool { return f.endpoint() == runtime && f.rolledOut() })
	for _, path := range []string{"opt/bin/streamshim", "units/streamshim.service", "etc/config.toml", "lib/install.json"} {
		if _, err := os.Stat(filepath.Join(f.dir, path)); !os.IsNotExist(err) {
			t.Errorf("%s was left: %v", path, err)
		}
	}
	if f.node.PID("fleet-streamshim") != 0 {
		t.Error("streamshim still runs")
	}
	if got := f.kubectl("", "exec", "lab", "--", "echo", "through containerd"); got != "through containerd\n" {
		t.Errorf("exec: %q", got)
	}
	if got := f.kubectl("", "get", "pod", "lab", "-o", "jsonpath={.status.containerStatuses[0].containerID}"); got != started {
		t.Errorf("the way back has restarted the pod: %s, then %s", started, got)
	}
}

// agent is the name of the DaemonSet's one pod.
func (f *fleet) agent() string {
	f.t.Helper()
	return f.kubectl("", "get", "pods", "-n", namespace, "-l", "app.kubernetes.io/component=agent", "--field-selector=status.phase=Running", "-o", "jsonpath={.items[0].metadata.name}")
}
