// Package clients runs stock Kubernetes clients of other languages against a real cluster whose node has
// streamshim: Debian's python3-kubernetes, and @kubernetes/client-node from npm. kubectl and client-go are in
// test/e2e, test/integration/portforward and test/integration/exec.
package clients

import (
	"context"
	"fmt"
	"hash/crc32"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/streamshim/streamshim/test/internal/images"
	"github.com/streamshim/streamshim/test/internal/kubernetes"
	"github.com/streamshim/streamshim/test/internal/node"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// checkLimit bounds one check on a busy machine.
const checkLimit = 3 * time.Minute

// The pod that all checks use: two HTTP servers, a port that takes an upload, late, and tells its sum, and a
// main process that answers each line on its stdin.
const podCommand = `mkdir -p /srv/first /srv/second
echo first >/srv/first/page; echo second >/srv/second/page
httpd -p 8080 -h /srv/first; httpd -p 8081 -h /srv/second
echo 'sleep 1; cat >/tmp/port.$$; sha256sum </tmp/port.$$ >/tmp/port.tmp; mv /tmp/port.tmp /tmp/port.sum' >/srv/upload
nc -ll -p 9000 -e sh /srv/upload </dev/null >/dev/null 2>&1 &
while read -r line; do echo "$line" >/tmp/said; echo "you said: $line"; done
exec sleep 2147483647`

const podName = "work"

func TestClients(t *testing.T) {
	if os.Getenv("STREAMSHIM_CLIENTS") == "" {
		t.Skip("STREAMSHIM_CLIENTS is not set; make clients sets it")
	}
	cluster := startCluster(t)
	for _, language := range []struct{ name, interpreter, script, checks string }{
		{"python", "/usr/bin/python3", "python/check.py", `(?m)^def (exec_\w+|copy_\w+|attach|forward_\w+)\(\)`},
		{"javascript", "node", "javascript/check.mjs", `(?m)^    async (\w+)\(\) \{`},
	} {
		text, err := os.ReadFile(language.script)
		if err != nil {
			t.Fatal(err)
		}
		for _, match := range regexp.MustCompile(language.checks).FindAllStringSubmatch(string(text), -1) {
			t.Run(language.name+"/"+match[1], func(t *testing.T) {
				ctx, cancel := context.WithTimeout(t.Context(), checkLimit)
				defer cancel()
				command := exec.CommandContext(ctx, language.interpreter, language.script, cluster.Kubeconfig(), podName, match[1])
				// Python says with faulthandler where each of its threads is.
				command.Cancel = func() error { return command.Process.Signal(syscall.SIGABRT) }
				command.Env = append(os.Environ(), "PYTHONFAULTHANDLER=1")
				command.WaitDelay = 5 * time.Second
				if output, err := command.CombinedOutput(); err != nil {
					t.Errorf("%v\n%s", err, output)
				}
			})
		}
	}
}

// startCluster starts a cluster with one node, and the pod.
func startCluster(t *testing.T) *kubernetes.Cluster {
	t.Helper()
	workingFolder, err := os.Getwd()
	if err != nil {
		t.Fatal(err)
	}
	// The same for each run of this working copy, so that a run that was killed is cleaned up after.
	dir := filepath.Join(os.TempDir(), fmt.Sprintf("streamshim-clients-%08x", crc32.ChecksumIEEE([]byte(workingFolder))))
	cluster, err := kubernetes.Start(t.Context(), kubernetes.Config{
		Dir: dir, Nodes: []kubernetes.NodeConfig{{Name: "shim", Streamshim: node.Binary(t)}}, Logf: t.Logf,
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("logs are in %s/*/log", dir)
		}
		if err := cluster.Close(); err != nil {
			t.Error(err)
		}
	})
	kubectl := func(input string, args ...string) {
		t.Helper()
		ctx, cancel := context.WithTimeout(t.Context(), checkLimit)
		defer cancel()
		command := cluster.Kubectl(ctx, kubernetes.WebSocket, args...)
		command.Stdin = strings.NewReader(input)
		if output, err := command.CombinedOutput(); err != nil {
			t.Fatalf("kubectl %v: %v\n%s", args, err, output)
		}
	}
	kubectl(fmt.Sprintf(`{apiVersion: v1, kind: Pod, metadata: {name: %s}, spec: {nodeName: %s, automountServiceAccountToken: false,
enableServiceLinks: false, dnsPolicy: Default, terminationGracePeriodSeconds: 1, containers: [{name: main, image: %q,
imagePullPolicy: IfNotPresent, stdin: true, command: [sh, -c, %q]}]}}`,
		podName, cluster.Node("shim").Address, node.Image(images.Busybox), podCommand), "create", "-f", "-")
	kubectl("", "wait", "--for=condition=Ready", "--timeout=60s", "pod/"+podName)
	return cluster
}
