package hostile

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/streamshim/streamshim/test/node"
)

// startNode runs containerd with streamshim in front.
func startNode(t *testing.T, engine string) *node.Node {
	t.Helper()
	file := filepath.Join(newFolder(t), "config.toml")
	if err := os.WriteFile(file, []byte("[exec]\nengine = \""+engine+"\"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	return node.StartForTest(t, node.Config{Name: "hostile", Streamshim: node.Binary(t), StreamshimArgs: []string{"--config", file}})
}

// runAttacker runs a pod whose main process is the attacker, which attacks for so long.
func runAttacker(t *testing.T, n *node.Node, name string, arguments ...string) (pod, container string) {
	t.Helper()
	pod, err := n.RunPod(t.Context(), node.PodSpec{Name: name})
	if err != nil {
		t.Fatal(err)
	}
	mount := func(path string) *runtimeapi.Mount {
		return &runtimeapi.Mount{HostPath: attackerProgram, ContainerPath: path, Readonly: true}
	}
	container, err = n.RunContainer(t.Context(), pod, node.ContainerSpec{
		Name: name, Command: append([]string{"/attacker"}, arguments...), Env: map[string]string{"INSIDE": "1"},
		Mounts: []*runtimeapi.Mount{mount("/attacker"), mount("/victim")},
	})
	if err != nil {
		t.Fatal(err)
	}
	return pod, container
}

// gainedBy waits until the attacker says what it has gained, which is all that its container writes.
func gainedBy(t *testing.T, n *node.Node, pod, name string) map[string]string {
	t.Helper()
	var text string
	eventually(t, "the attacker is done", func() bool {
		log, err := os.ReadFile(n.ContainerLog(pod, name))
		text = string(log)
		return err == nil && strings.Contains(text, " done ")
	})
	gained := map[string]string{}
	for line := range strings.Lines(text) {
		if _, what, found := strings.Cut(line, " gained "); found {
			number, what, _ := strings.Cut(strings.TrimSpace(what), " ")
			gained[what] = number
		}
	}
	return gained
}

// execSync runs a victim through streamshim's CRI socket.
func execSync(ctx context.Context, n *node.Node, container string) (string, error) {
	answer, err := n.Runtime().ExecSync(ctx, &runtimeapi.ExecSyncRequest{ContainerId: container, Cmd: []string{"/victim", hostFile}, Timeout: 20})
	if err == nil && answer.ExitCode != 0 {
		err = fmt.Errorf("exit code %d: %s", answer.ExitCode, answer.Stderr)
	}
	return string(answer.GetStdout()), err
}

// The same through real containerd and streamshim: a default container of Kubernetes gains nothing of its execs.
func TestNode(t *testing.T) {
	for engine := range strings.SplitSeq(*engines, ",") {
		t.Run(engine, func(t *testing.T) {
			n := startNode(t, engine)
			t.Run("attacks", func(t *testing.T) { attackOnNode(t, n, engine) })
		})
	}
}

func attackOnNode(t *testing.T, n *node.Node, engine string) {
	for _, attack := range []string{"together", "plant"} {
		const seconds = 2
		pod, container := runAttacker(t, n, attack, "once", attack, fmt.Sprint(seconds), hostFile)
		r := row{attack: attack, configuration: "containerd", entrance: "engine " + engine, gained: map[string]int{}}
		for end := time.Now().Add(seconds*time.Second - 200*time.Millisecond); time.Now().Before(end); {
			output, err := execSync(t.Context(), n, container)
			s, stateErr := parseState(output)
			if r.commands++; err != nil || stateErr != nil {
				t.Errorf("%s: %q, %v", attack, output, err)
				continue
			}
			const kubernetes = "00000000a80425fb"
			if s["eff"] != kubernetes || s["bnd"] != kubernetes || s["inh"] != strings.Repeat("0", 16) || s["fds"] != "" || s["host"] != "0" {
				t.Errorf("%s: the command is %v", attack, s)
			}
		}
		for what := range gainedBy(t, n, pod, attack) {
			t.Errorf("%s: gained %q", attack, what)
			r.gained[what]++
		}
		note(r)
	}
}
