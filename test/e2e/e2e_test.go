package e2e

import (
	"context"
	"errors"
	"fmt"
	"hash/crc32"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/streamshim/streamshim/test/internal/kubernetes"
	"github.com/streamshim/streamshim/test/internal/node"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// check is one thing that users do. It returns what was seen, as text for the table, or an error.
type check struct {
	name string
	run  func(context.Context, *target) (string, error)
	// waits is whether it mostly waits. Such checks run beside each other, after those that do not.
	waits bool
}

// errImpossible is what a check returns that the machine cannot run.
var errImpossible = errors.New("not possible on this machine")

// beyondNode is the error of a check that failed through no fault of the node: it is only reported.
type beyondNode struct{ error }

// checkLimit bounds one check.
const checkLimit = 2 * time.Minute

// sessionChecks run for each protocol.
var sessionChecks = []check{
	{name: "exec: output and exit code", run: checkExec},
	{name: "exec -i", run: checkExecStdin},
	{name: "exec -it", run: checkExecTerminal},
	{name: "exec -it -- stty size, right at once", run: checkTerminalSize},
	{name: "the same, 200 ms away from the API server", run: checkTerminalSizeFarAway, waits: true},
	{name: "exec of a missing command ends with 127", run: checkMissingCommand},
	{name: "exec that leaves a child in the background ends", run: checkBackgroundChild},
	{name: "attach -i", run: checkAttach},
	{name: "logs, logs -f", run: checkLogs},
	{name: "cp of a file, both ways", run: checkCopyFile},
	{name: "cp of a tree, both ways", run: checkCopyTree},
	{name: "20 MB of output, read at 1.25 MB per second (1)", run: checkSlowReader},
	{name: "kubectl killed during exec -it, -i and neither", run: checkClientKilled},
	{name: "port-forward of two ports", run: checkForward},
	{name: "port-forward: a port that refuses", run: checkForwardRefused},
	{name: "port-forward: a port that resets", run: checkForwardReset},
	{name: "port-forward: a server that stalls beside one that does not", run: checkForwardStalledPod, waits: true},
	{name: "port-forward: a client that stalls beside one that does not (2)", run: checkForwardStalledClient, waits: true},
	{name: "container killed during exec -it", run: checkContainerRestart},
	{name: "pod deleted during exec -it, also with shareProcessNamespace", run: checkPodDeletion},
	{name: "debug -it with an ephemeral container", run: checkDebug},
	{name: "pod with shareProcessNamespace", run: checkSharedProcesses},
	{name: "pod with hostNetwork", run: checkHostNetwork},
	{name: "pod with runAsNonRoot", run: checkNonRoot},
	{name: "pod with a user namespace", run: checkUserNamespace},
}

// gateChecks are those whose way depends on the feature gate.
var gateChecks = []check{
	{name: "exec: output and exit code", run: checkExec},
	{name: "exec -i", run: checkExecStdin},
	{name: "exec -it", run: checkExecTerminal},
	{name: "exec -it -- stty size, right at once", run: checkTerminalSize},
	{name: "the same, 200 ms away from the API server", run: checkTerminalSizeFarAway, waits: true},
	{name: "attach -i", run: checkAttach},
	{name: "cp of a file, both ways", run: checkCopyFile},
	{name: "20 MB of output, read at 1.25 MB per second (1)", run: checkSlowReader},
	{name: "kubectl killed during exec -it, -i and neither", run: checkClientKilled},
	{name: "port-forward of two ports", run: checkForward},
	{name: "port-forward: a port that refuses", run: checkForwardRefused},
}

// nodeChecks do not depend on the protocol.
var nodeChecks = []check{
	{name: "readiness exec probes", run: checkProbeReadiness},
	{name: "liveness exec probes", run: checkProbeLiveness},
}

// restartChecks come after those that look at how steady the node is.
var restartChecks = []check{
	{name: "containerd killed and started again during exec -it, a stream and a port-forward", run: checkContainerdRestart},
	{name: "kubelet restarted during exec -it", run: checkKubeletRestart},
	{name: "streamshim upgraded during exec -it, a stream and a port-forward", run: checkUpgrade},
}

var bothProtocols = []kubernetes.Protocol{kubernetes.WebSocket, kubernetes.SPDY}

// gates are settings of ExtendWebSocketsToKubelet.
type gates struct{ apiServer, kubelet bool }

func (g gates) String() string {
	word := map[bool]string{true: "on", false: "off"}
	return fmt.Sprintf("API server %s, kubelet %s", word[g.apiServer], word[g.kubelet])
}

// The modes of a run.
const (
	modeShim  = "shim"  // streamshim alone: nothing to compare with, as CI runs it
	modeQuick = "quick" // both nodes
	modeFull  = "full"  // both nodes, every setting of the feature gate, ten minutes of probes
)

// run is one run of all checks.
type run struct {
	mode    string
	nodes   []string // names, in the order of the tables' columns
	cluster *kubernetes.Cluster
	targets map[string]target // by node
	report  report
}

func TestKubernetes(t *testing.T) {
	mode := os.Getenv("STREAMSHIM_E2E")
	if !slices.Contains([]string{modeShim, modeQuick, modeFull}, mode) {
		t.Skip("STREAMSHIM_E2E is none of shim, quick and full; make e2e sets it")
	}
	if err := kubernetes.Ready(); err != nil {
		t.Fatal(err)
	}
	start := time.Now()
	r := newRun(t, mode)
	r.createProbed(t)
	probing := time.Now()

	before, err := usageOf(t.Context(), r.cluster.Node("shim"))
	if err != nil {
		t.Fatal(err)
	}

	steady := r.report.section("Steadiness", "The whole run, except for the restarts below.", []check{{name: nodeReady}, {name: probedPods}, {name: nothingLeft}})
	r.runAll(t, "sessions", r.report.section("Sessions", "Feature gate ExtendWebSocketsToKubelet on everywhere, the default since 1.36: the kubelet translates WebSocket.", sessionChecks, bothProtocols...), sessionChecks)
	r.runAll(t, "nodes", r.report.section("Probes", "By the kubelet, through ExecSync.", nodeChecks), nodeChecks)
	r.waitProbed(t, probing)
	r.checkSteady(t, steady, before)

	r.runAll(t, "restarts", r.report.section("Restarts", "Over WebSocket.", restartChecks), restartChecks)

	settings := []gates{{false, false}}
	if mode == modeFull {
		settings = []gates{{true, false}, {false, true}, {false, false}}
	}
	for _, setting := range settings {
		r.setGates(t, setting)
		title := "Feature gate ExtendWebSocketsToKubelet: " + setting.String()
		protocols := bothProtocols
		if mode != modeFull {
			protocols = bothProtocols[:1] // the other one does not depend on the gate
		}
		r.runAll(t, setting.String(), r.report.section(title, "The API server translates WebSocket.", gateChecks, protocols...), gateChecks)
	}

	if path := os.Getenv("STREAMSHIM_E2E_REPORT"); path != "" {
		if err := r.report.write(path, r, time.Since(start)); err != nil {
			t.Error(err)
		}
	}
}

// newRun starts the cluster, with a work pod on each node.
func newRun(t *testing.T, mode string) *run {
	workingFolder, err := os.Getwd()
	if err != nil {
		t.Fatal(err)
	}
	// The same for each run of this working copy, so that a run that was killed is cleaned up after.
	dir := filepath.Join(os.TempDir(), fmt.Sprintf("streamshim-e2e-%08x", crc32.ChecksumIEEE([]byte(workingFolder))))
	r := &run{mode: mode, targets: map[string]target{}}
	var nodes []kubernetes.NodeConfig
	if mode != modeShim {
		nodes = append(nodes, kubernetes.NodeConfig{Name: "bare"})
	}
	nodes = append(nodes, kubernetes.NodeConfig{Name: "shim", Streamshim: node.Binary(t)})
	for _, n := range nodes {
		r.nodes = append(r.nodes, n.Name)
	}
	cluster, err := kubernetes.Start(t.Context(), kubernetes.Config{Dir: dir, Nodes: nodes, Logf: t.Logf})
	if err != nil {
		t.Fatal(err)
	}
	var names []string // that traces would have in them
	for _, n := range nodes {
		names = append(names, strings.TrimPrefix(cluster.Node(n.Name).CgroupRoot(), "/streamshim-"))
	}
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("logs are in %s/*/log", dir)
		}
		if err := cluster.Close(); err != nil {
			t.Error(err)
		}
		for _, trace := range traces(t, append(names, dir)) {
			t.Errorf("left behind: %s", trace)
		}
	})
	r.cluster = cluster
	for _, name := range r.nodes {
		one := target{cluster: cluster, node: cluster.Node(name), name: name, pod: "work-" + name}
		if name == "shim" {
			one.streamshim = node.Binary(t)
		}
		options := workPod
		options.name = one.pod
		ctx, cancel := context.WithTimeout(t.Context(), checkLimit)
		err := one.runPod(ctx, options)
		cancel()
		if err != nil {
			t.Fatal(err)
		}
		r.targets[name] = one
	}
	return r
}

// runAll runs checks on all nodes at the same time, one after the other on each but for those that wait.
func (r *run) runAll(t *testing.T, phase string, s *section, checks []check) {
	protocols := s.protocols
	if len(protocols) == 0 {
		protocols = []kubernetes.Protocol{""}
	}
	t.Run(phase, func(t *testing.T) {
		for _, name := range r.nodes {
			t.Run(name, func(t *testing.T) {
				t.Parallel()
				for _, c := range checks {
					for _, protocol := range protocols {
						where := cell{c.name, name, protocol}
						t.Run(strings.TrimSuffix(c.name+"/"+string(protocol), "/"), func(t *testing.T) {
							if c.waits {
								t.Parallel()
							}
							r.runOne(t, s, where, c)
						})
					}
				}
			})
		}
	})
	if r.mode == modeShim {
		return
	}
	// What one node can do, the other must be able to do.
	for _, c := range checks {
		for _, protocol := range protocols {
			onBare, onShim := r.report.get(s, cell{c.name, "bare", protocol}), r.report.get(s, cell{c.name, "shim", protocol})
			if strings.HasPrefix(onShim, impossible) && !strings.HasPrefix(onBare, impossible) {
				t.Errorf("%s: %s on bare containerd, but %s through streamshim", c.name, onBare, onShim)
			}
		}
	}
}

func (r *run) runOne(t *testing.T, s *section, where cell, c check) {
	ctx, cancel := context.WithTimeout(t.Context(), checkLimit)
	defer cancel()
	one := r.targets[where.node]
	one.protocol, one.folder = where.protocol, t.TempDir()
	text, err := c.run(ctx, &one)
	_, limited := errors.AsType[beyondNode](err)
	switch {
	case errors.Is(err, errImpossible):
		r.report.set(s, where, impossible, err.Error())
		t.Skip(err)
	case err == nil:
		r.report.set(s, where, good, text)
		t.Log(text)
	case where.node == "shim" && !limited:
		r.report.set(s, where, bad, err.Error())
		t.Error(err)
	default:
		r.report.set(s, where, bad, err.Error())
		t.Logf("only reported: %v", err)
	}
}

// setGates restarts the API server and the kubelets with other settings.
func (r *run) setGates(t *testing.T, setting gates) {
	ctx, cancel := context.WithTimeout(t.Context(), checkLimit)
	defer cancel()
	steps := []func() error{
		r.cluster.StopAPIServer,
		func() error { return r.cluster.StartAPIServer(ctx, setting.apiServer) },
	}
	for _, name := range r.nodes {
		n := r.cluster.Node(name)
		steps = append(steps, n.StopKubelet,
			func() error { return n.StartKubelet(ctx, setting.kubelet) })
	}
	for _, name := range r.nodes { // a kubelet that has just started does not know its pods yet
		one := r.targets[name]
		steps = append(steps, func() error {
			return until(ctx, func() error {
				_, err := one.must(ctx, "exec", one.pod, "--", "true")
				return err
			})
		})
	}
	for _, step := range steps {
		if err := step(); err != nil {
			t.Fatalf("set the feature gate to %s: %v", setting, err)
		}
	}
}

// The rows of the table on steadiness.
const (
	nodeReady   = "node Ready without a break"
	probedPods  = "pods with two exec probes each second"
	nothingLeft = "streamshim holds no more than at the start"
)

const probedCount = 3

func probedPod(name string, i int) string { return fmt.Sprintf("probed-%s-%d", name, i) }

// createProbed makes the pods that are probed every second during the whole run.
func (r *run) createProbed(t *testing.T) {
	const probe = `{exec: {command: [sh, -c, "test -d /tmp"]}, periodSeconds: 1, timeoutSeconds: 20, failureThreshold: 1}`
	for _, name := range r.nodes {
		one := r.targets[name]
		for i := range probedCount {
			ctx, cancel := context.WithTimeout(t.Context(), checkLimit)
			err := one.runPod(ctx, podOptions{name: probedPod(name, i), main: "readinessProbe: " + probe + ", livenessProbe: " + probe})
			cancel()
			if err != nil {
				t.Fatal(err)
			}
		}
	}
}

// longProbing is how long the full set probes.
const longProbing = 10 * time.Minute

// waitProbed lets the probes of the full set go on until they have run for long enough.
func (r *run) waitProbed(t *testing.T, start time.Time) {
	rest := time.Until(start.Add(longProbing))
	if r.mode != modeFull || rest <= 0 {
		return
	}
	select {
	case <-time.After(rest):
	case <-t.Context().Done():
	}
}

// checkSteady looks at what must not have changed since the start.
func (r *run) checkSteady(t *testing.T, s *section, before usage) {
	ctx, cancel := context.WithTimeout(t.Context(), checkLimit)
	defer cancel()
	set := func(row, name string, text string, err error) {
		if err != nil {
			r.report.set(s, cell{row, name, ""}, bad, err.Error())
			if name == "shim" {
				t.Errorf("%s: %v", row, err)
			}
			return
		}
		r.report.set(s, cell{row, name, ""}, good, text)
	}
	for _, name := range r.nodes {
		one := r.targets[name]
		ready, since, err := one.node.Condition(ctx)
		if err == nil && (!ready || since.After(r.created(ctx, t, one))) {
			err = fmt.Errorf("Ready is %t since %v", ready, since)
		}
		set(nodeReady, name, fmt.Sprintf("for %d min", int(time.Since(since).Minutes())), err)
		text, err := r.probed(ctx, one)
		set(probedPods, name, text, err)
	}
	if t.Failed() {
		return // checks that failed may well have left something
	}
	var after usage
	err := until(ctx, func() error {
		var err error
		after, err = usageOf(ctx, r.cluster.Node("shim"))
		// Probes come and go meanwhile, with a few of each.
		if err == nil && (after.descriptors > before.descriptors+10 || after.children > before.children+2*probedCount || after.goroutines > before.goroutines+20) {
			err = fmt.Errorf("%v at first, %v now", before, after)
		}
		return err
	})
	set(nothingLeft, "shim", fmt.Sprintf("%v at first, %v now", before, after), err)
}

// created is when the work pod was there: the node must not have become Ready later.
func (r *run) created(ctx context.Context, t *testing.T, one target) time.Time {
	text, err := one.podField(ctx, one.pod, ".status.containerStatuses[0].state.running.startedAt")
	if err != nil {
		t.Fatal(err)
	}
	created, err := time.Parse(time.RFC3339, text)
	if err != nil {
		t.Fatal(err)
	}
	return created
}

// nothingLeftInPod sees to it that probes leave no processes in their pod: the main process, the two probes
// and what counts are all there may be at a time.
func nothingLeftInPod(ctx context.Context, one target, pod string) error {
	const most = 12
	return until(ctx, func() error {
		text, err := one.must(ctx, "exec", pod, "--", "sh", "-c", "ls -d /proc/[0-9]* | wc -l")
		if err != nil {
			return err
		}
		n, err := strconv.Atoi(strings.TrimSpace(text))
		if err == nil && n > most {
			err = fmt.Errorf("pod %s: %d processes", pod, n)
		}
		return err
	})
}

// probed says how the probed pods of a node fared.
func (r *run) probed(ctx context.Context, one target) (string, error) {
	for i := range probedCount {
		pod := probedPod(one.name, i)
		text, err := one.podField(ctx, pod, `.status.conditions[?(@.type=="Ready")].status} {.status.containerStatuses[0].restartCount`)
		if err == nil && text != "True 0" {
			err = fmt.Errorf("pod %s: Ready and number of restarts are %q", pod, text)
		}
		if err == nil {
			err = nothingLeftInPod(ctx, one, pod)
		}
		if err != nil {
			return "", err
		}
	}
	started, err := one.podField(ctx, probedPod(one.name, 0), ".status.startTime")
	if err != nil {
		return "", err
	}
	since, err := time.Parse(time.RFC3339, started)
	if err != nil {
		return "", err
	}
	return fmt.Sprintf("%d pods for %d min, Ready, no restart, no process left in them", probedCount, int(time.Since(since).Minutes())), nil
}

// traces lists what is left on this machine with one of the names in it.
func traces(t *testing.T, names []string) []string {
	var found []string
	look := func(kind, text string) {
		for _, name := range names {
			if strings.Contains(text, name) {
				found = append(found, kind+" "+text)
				return
			}
		}
	}
	mounts, err := os.ReadFile("/proc/self/mounts")
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(mounts)) {
		look("mount", strings.TrimSpace(line))
	}
	for pattern, kind := range map[string]string{
		"/proc/[0-9]*/cmdline":   "process",
		"/sys/fs/cgroup/*":       "cgroup",
		"/sys/fs/cgroup/*/*":     "cgroup",
		"/sys/class/net/*":       "network interface",
		"/var/log/containers/*":  "link",
		"/var/lib/cni/results/*": "CNI record",
	} {
		paths, err := filepath.Glob(pattern)
		if err != nil {
			t.Fatal(err)
		}
		for _, path := range paths {
			text := path
			if kind == "process" {
				arguments, err := os.ReadFile(path)
				if err != nil || filepath.Dir(path) == fmt.Sprintf("/proc/%d", os.Getpid()) {
					continue
				}
				text = strings.ReplaceAll(string(arguments), "\x00", " ")
			} else if target, err := os.Readlink(path); err == nil && kind == "link" {
				text = target
			}
			look(kind, text)
		}
	}
	return found
}
