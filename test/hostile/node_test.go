package hostile

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/streamshim/streamshim/internal/testutil"
	"github.com/streamshim/streamshim/test/internal/node"
	"github.com/streamshim/streamshim/test/internal/wire"
)

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
	testutil.Eventually(t, "the attacker is done", func() bool {
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

// execStreamed runs a victim in a streamed session.
func execStreamed(ctx context.Context, n *node.Node, container string) error {
	session, err := wire.StartExec(ctx, n.Runtime(), container, wire.Command{Args: []string{"/victim", hostFile}})
	if err != nil {
		return err
	}
	defer context.AfterFunc(ctx, func() { session.Close() })()
	_, err = session.Finish()
	return err
}

// The same through real containerd and streamshim: a default container of Kubernetes gains nothing of its execs,
// and one that stops all that enters it does not keep others waiting.
func TestNode(t *testing.T) {
	n := node.StartForTest(t, node.Config{Name: "hostile", Streamshim: node.Binary(t)})
	t.Run("attacks", func(t *testing.T) { attackOnNode(t, n) })
	t.Run("stopped", func(t *testing.T) { stopOnNode(t, n) })
}

func attackOnNode(t *testing.T, n *node.Node) {
	for _, attack := range []string{"together", "plant"} {
		const seconds = 2
		pod, container := runAttacker(t, n, attack, "once", attack, fmt.Sprint(seconds), hostFile)
		r := row{attack: attack, configuration: "containerd", entrance: "streamshim", gained: map[string]int{}}
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

func stopOnNode(t *testing.T, n *node.Node) {
	const execs = 40
	_, other := runAttacker(t, n, "other", "idle")
	_, hostile := runAttacker(t, n, "stopper", "once", "stop", "10", hostFile)
	for range 3 {
		if err := execStreamed(t.Context(), n, other); err != nil {
			t.Fatal(err)
		}
	}
	ctx, cancel := context.WithCancel(t.Context())
	var stopped sync.WaitGroup
	for range execs {
		stopped.Go(func() {
			for ctx.Err() == nil {
				_ = execStreamed(ctx, n, hostile) // it runs only if the attacker was too late
			}
		})
	}
	// Not all, as an engine may let only so many begin in one container, and ends those that are stopped.
	most := 0
	for began := time.Now(); most < execs && time.Since(began) < patience; time.Sleep(10 * time.Millisecond) {
		if most = max(most, stoppedProcesses(t)); most > 0 && time.Since(began) > 2*time.Second {
			break
		}
	}
	if most == 0 {
		t.Error("nobody was stopped")
	}
	var took []time.Duration
	for range 10 {
		began := time.Now()
		err := execStreamed(t.Context(), n, other)
		took = append(took, time.Since(began))
		if err != nil {
			t.Errorf("an exec in another container: %v", err)
		}
		if err != nil || took[len(took)-1] > patience/4 {
			break // it is as bad as it gets
		}
	}
	cancel()
	stopped.Wait()
	// The attacker lets them go; streamshim gives such a start up later.
	testutil.Eventually(t, "the stopped processes go on and end", func() bool { return stoppedProcesses(t) == 0 })
	slices.Sort(took)
	t.Logf("with %d stopped processes execs in another container took %v", most, took)
	note(row{attack: "stop, others", configuration: "containerd", entrance: "streamshim", commands: len(took), seen: most})
	// The median: forty execs begin at one time, on a machine that may have two CPUs.
	if middle := took[len(took)/2]; middle > startTimeout*2/3 {
		t.Errorf("while a container stops what enters it, execs in another one took %v", took)
	}
}

// stoppedProcesses counts those that SIGSTOP has stopped.
func stoppedProcesses(t testing.TB) (stopped int) {
	t.Helper()
	entries, err := os.ReadDir("/proc")
	if err != nil {
		t.Fatal(err)
	}
	for _, entry := range entries {
		stat, err := os.ReadFile(filepath.Join("/proc", entry.Name(), "stat"))
		if err == nil && strings.HasPrefix(string(stat[strings.LastIndexByte(string(stat), ')')+1:]), " T") {
			stopped++
		}
	}
	return stopped
}
