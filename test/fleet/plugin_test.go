package fleet

import (
	"encoding/json"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/creack/pty"

	"github.com/streamshim/streamshim/test/internal/kubernetes"
)

// plugin uses kubectl streamshim as kubectl finds it: by its name in the PATH.
func plugin(t *testing.T, f *fleet) {
	t.Helper()
	bin, err := filepath.Abs(top + "/bin")
	if err != nil {
		t.Fatal(err)
	}
	call := func(args ...string) (string, error) {
		command := f.Kubectl(t.Context(), kubernetes.WebSocket, append([]string{"streamshim"}, args...)...)
		command.Args = append(command.Args, "--kubectl="+f.node.Program("kubectl"))
		command.Env = append(command.Env, "PATH="+bin+":"+os.Getenv("PATH"))
		out, err := command.CombinedOutput()
		return string(out), err
	}
	shell := f.Kubectl(t.Context(), kubernetes.WebSocket, "exec", "-it", "lab", "--", "sh")
	terminal, err := pty.Start(shell)
	if err != nil {
		t.Fatal(err)
	}
	defer terminal.Close()
	drained := make(chan struct{})
	go func() {
		defer close(drained)
		io.Copy(io.Discard, terminal)
	}()
	type session struct{ Node, ID, Pod_name, Pod_namespace string } //nolint:revive // the names in JSON
	var live session
	f.eventually("the shell is in the list", time.Minute, func() bool {
		out, err := call("list", "-n", "default", "-o", "json")
		var list struct{ Sessions []session }
		if err != nil || json.Unmarshal([]byte(out), &list) != nil || len(list.Sessions) != 1 {
			return false
		}
		live = list.Sessions[0]
		return true
	})
	if live.Node != f.node.Address || live.Pod_name != "lab" || live.Pod_namespace != "default" {
		t.Errorf("%+v", live)
	}
	if out, err := call("list", "-n", "elsewhere"); err != nil || strings.Contains(out, "lab") {
		t.Errorf("another namespace: %v\n%s", err, out)
	}
	watching := f.Kubectl(t.Context(), kubernetes.WebSocket, "streamshim", "watch", live.ID[:8], "--kubectl="+f.node.Program("kubectl"))
	watching.Env = append(watching.Env, "PATH="+bin+":"+os.Getenv("PATH"))
	var seen safeBuffer
	watching.Stdout, watching.Stderr = &seen, &seen
	if err := watching.Start(); err != nil {
		t.Fatal(err)
	}
	f.eventually("the watcher sees the terminal", time.Minute, func() bool {
		io.WriteString(terminal, "echo seen-$((40+2))\n")
		return strings.Contains(seen.String(), "seen-42")
	})
	if out, err := call("end", live.ID[:8]); err != nil {
		t.Errorf("end: %v\n%s", err, out)
	}
	if err := watching.Wait(); err != nil {
		t.Errorf("the watcher ended with %v\n%s", err, seen.String())
	}
	var ended *exec.ExitError
	if err := shell.Wait(); err == nil {
		t.Error("the session that was ended has succeeded")
	} else if e, ok := err.(*exec.ExitError); ok {
		ended = e
	}
	t.Logf("the shell: %v", ended)
	<-drained
	out, err := call("recordings", "-n", "default")
	if err != nil || !strings.Contains(out, live.ID) {
		t.Fatalf("recordings: %v\n%s", err, out)
	}
	fields := strings.Fields(out)
	if out, err := call("replay", fields[len(fields)-1], "--speed=1000"); err != nil || !strings.Contains(out, "seen-42") {
		t.Errorf("replay: %v\n%s", err, out)
	}
	if out, err := call("show", "zzzz"); err == nil || !strings.Contains(out, "no live session") {
		t.Errorf("a session that does not exist: %v\n%s", err, out)
	}
	// Who may not exec into the agents may not see.
	if out, err := call("list", "--agents=default"); err == nil || !strings.Contains(out, "--agents") {
		t.Errorf("another namespace of agents: %v\n%s", err, out)
	}
}
