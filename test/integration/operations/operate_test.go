// Package operations tests what operators use: live sessions, audit, recordings, limits and reload, with the real program
// in front of real containerd and runc, and stock client-go as the user.
package operations

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/encoding/protowire"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/remotecommand"
	clientexec "k8s.io/client-go/util/exec"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/streamshim/streamshim/internal/testutil"
	"github.com/streamshim/streamshim/pkg/admin"
	"github.com/streamshim/streamshim/pkg/session"
	"github.com/streamshim/streamshim/pkg/session/audit"
	"github.com/streamshim/streamshim/test/internal/harness"
	"github.com/streamshim/streamshim/test/internal/node"
)

// operated is a node whose streamshim has a configuration file.
type operated struct {
	*node.Node
	t          *testing.T
	dir        string
	config     string // its path
	containers map[string]string
}

const operatedConfig = `
notify_watch = true

[audit]
destination = "file"
file = "@DIR@/audit/audit.log"
command = "full"
execsync = true
fsync = "always"
on_failure = "deny"

[recording]
directory = "@DIR@/recordings"
non_tty = true

[[recording.rule]]
pod_labels = { record = "yes" }
`

// start starts a node with two pods: "web" in namespace shop, whose sessions are recorded, and "db" in namespace bank. Each
// has one container.
func start(t *testing.T, name, config string) *operated {
	t.Helper()
	o := &operated{t: t, dir: t.TempDir(), containers: make(map[string]string)}
	o.config = filepath.Join(o.dir, "config.toml")
	o.configure(config)
	o.Node = node.StartForTest(t, node.Config{
		Name: name, Streamshim: node.Binary(t), StreamshimArgs: []string{"--config", o.config, "--log-level", "info"},
	})
	for pod, spec := range map[string]node.PodSpec{
		"web": {Name: "web", Namespace: "shop", Labels: map[string]string{"record": "yes"}},
		"db":  {Name: "db", Namespace: "bank", Labels: map[string]string{"tier": "data"}},
	} {
		id, err := o.RunPod(t.Context(), spec)
		if err != nil {
			t.Fatal(err)
		}
		if o.containers[pod], err = o.RunContainer(t.Context(), id, node.ContainerSpec{}); err != nil {
			t.Fatal(err)
		}
	}
	return o
}

func (o *operated) configure(text string) {
	o.t.Helper()
	text = strings.ReplaceAll(text, "@DIR@", o.dir)
	if err := os.WriteFile(o.config, []byte(text), 0o600); err != nil {
		o.t.Fatal(err)
	}
}

// reload changes the configuration and waits until the log reports the result.
func (o *operated) reload(config, says string) {
	o.t.Helper()
	before := strings.Count(o.log(), says)
	o.configure(config)
	if err := syscall.Kill(o.PID("streamshim"), syscall.SIGHUP); err != nil {
		o.t.Fatal(err)
	}
	testutil.Eventually(o.t, "the log says "+says, func() bool { return strings.Count(o.log(), says) > before })
}

func (o *operated) log() string {
	text, err := os.ReadFile(o.LogPath("streamshim"))
	if err != nil {
		o.t.Fatal(err)
	}
	return string(text)
}

// cli runs "streamshim sessions" and returns its output.
func (o *operated) cli(args ...string) (string, error) {
	out, err := o.command(args...).CombinedOutput()
	return string(out), err
}

// command returns a "streamshim sessions" command that is killed if it does not end.
func (o *operated) command(args ...string) *exec.Cmd {
	o.t.Helper()
	ctx, cancel := context.WithTimeout(o.t.Context(), 2*testutil.Patience)
	o.t.Cleanup(cancel)
	cmd := exec.CommandContext(ctx, node.Binary(o.t), append([]string{"sessions", "--admin", "unix://" + o.AdminSocket()}, args...)...)
	cmd.WaitDelay = testutil.Patience
	return cmd
}

func (o *operated) mustCLI(args ...string) string {
	o.t.Helper()
	out, err := o.cli(args...)
	if err != nil {
		o.t.Fatalf("streamshim sessions %v: %v: %s", args, err, out)
	}
	return out
}

func (o *operated) sessions() []admin.Session {
	o.t.Helper()
	var list admin.SessionList
	if err := json.Unmarshal([]byte(o.mustCLI("list", "-o", "json")), &list); err != nil {
		o.t.Fatal(err)
	}
	return list.Sessions
}

func (o *operated) audit() []audit.Record {
	o.t.Helper()
	text, err := os.ReadFile(filepath.Join(o.dir, "audit", "audit.log"))
	if err != nil {
		o.t.Fatal(err)
	}
	var records []audit.Record
	for line := range bytes.Lines(text) {
		decoder := json.NewDecoder(bytes.NewReader(line))
		decoder.DisallowUnknownFields()
		var r audit.Record
		if err := decoder.Decode(&r); err != nil {
			o.t.Fatalf("%v in %q", err, line)
		}
		records = append(records, r)
	}
	return records
}

// shell is a user's exec session.
type shell struct {
	in     io.WriteCloser
	out    *testutil.Buffer
	ended  chan struct{}
	err    error
	resize chan remotecommand.TerminalSize
}

// request asks for an exec URL.
func (o *operated) request(pod string, tty bool, command ...string) (*url.URL, error) {
	response, err := o.Runtime().Exec(o.t.Context(), &runtimeapi.ExecRequest{
		ContainerId: o.containers[pod], Cmd: command, Stdin: true, Stdout: true, Stderr: !tty, Tty: tty,
	})
	if err != nil {
		return nil, err
	}
	return url.Parse(response.GetUrl())
}

// exec runs a command as kubectl exec -i or -it does.
func (o *operated) exec(pod string, tty bool, command ...string) *shell {
	o.t.Helper()
	u, err := o.request(pod, tty, command...)
	if err != nil {
		o.t.Fatal(err)
	}
	return o.redeem(u, tty)
}

func (o *operated) redeem(u *url.URL, tty bool) *shell {
	o.t.Helper()
	executor, err := remotecommand.NewSPDYExecutor(&rest.Config{Host: u.Host}, http.MethodPost, u)
	if err != nil {
		o.t.Fatal(err)
	}
	in, write := io.Pipe()
	s := &shell{in: write, out: &testutil.Buffer{}, ended: make(chan struct{}), resize: make(chan remotecommand.TerminalSize, 4)}
	options := remotecommand.StreamOptions{Stdin: in, Stdout: s.out, Tty: tty}
	if tty {
		s.resize <- remotecommand.TerminalSize{Width: 132, Height: 43}
		options.TerminalSizeQueue = harness.Sizes(s.resize)
	} else {
		options.Stderr = s.out
	}
	ctx, cancel := context.WithCancel(context.Background())
	go func() {
		defer close(s.ended)
		s.err = executor.StreamWithContext(ctx, options)
	}()
	o.t.Cleanup(func() {
		cancel()
		write.Close()
		close(s.resize)
		testutil.Receive(o.t, "the end of a shell's session", s.ended)
	})
	return s
}

func (s *shell) say(t *testing.T, text string) {
	t.Helper()
	if _, err := io.WriteString(s.in, text); err != nil {
		t.Fatal(err)
	}
}

func (s *shell) shows(t *testing.T, text string) {
	t.Helper()
	testutil.Eventually(t, fmt.Sprintf("the terminal shows %q", text), func() bool { return strings.Contains(s.out.String(), text) })
}

func (s *shell) end(t *testing.T) error {
	t.Helper()
	select {
	case <-s.ended:
	case <-time.After(testutil.Patience):
		t.Fatalf("the session does not end; it shows %q", s.out.String())
	}
	return s.err
}

// check runs "streamshim check" on this node, which is in order, with a kubelet's configuration.
func (o *operated) check() {
	o.t.Helper()
	kubelet := filepath.Join(o.dir, "kubelet.yaml")
	if err := os.WriteFile(kubelet, []byte("containerRuntimeEndpoint: "+o.Socket()+"\n"), 0o600); err != nil {
		o.t.Fatal(err)
	}
	out, err := exec.Command(node.Binary(o.t), "check", "--config", o.config, "--listen", o.Socket(),
		"--admin", "unix://"+o.AdminSocket(), "--upstream", o.ContainerdSocket(), "--kubelet-config", kubelet).CombinedOutput()
	text := string(out)
	if err != nil || strings.Contains(text, "failed ") {
		o.t.Errorf("check of a good node: %v\n%s", err, text)
	}
	for _, line := range []string{"upstream  ", "upstream conditions", "listen socket", "admin socket", "audit log", "recordings", "kubelet"} {
		if !strings.Contains(text, "ok       "+line) {
			o.t.Errorf("%q is not ok:\n%s", line, text)
		}
	}
}

func TestOperateSessions(t *testing.T) {
	o := start(t, "operate", operatedConfig)

	follow := o.command("list", "--watch")
	followed := &testutil.Buffer{}
	follow.Stdout, follow.Stderr = followed, followed
	if err := follow.Start(); err != nil {
		t.Fatal(err)
	}

	// A terminal is listed and shown.
	u := o.exec("web", true, "sh", "-c", "echo ready; exec sh")
	u.shows(t, "ready")
	list := o.sessions()
	if len(list) != 1 {
		t.Fatalf("%d sessions: %+v", len(list), list)
	}
	s := list[0]
	if s.Kind != "exec" || s.PodNamespace != "shop" || s.PodName != "web" || s.Container != "main" || !s.TTY ||
		s.ContainerID != o.containers["web"] || strings.Join(s.Command, " ") != "sh -c echo ready; exec sh" ||
		!strings.HasPrefix(s.Protocol, "SPDY/3.1 v4") || s.Peer == "" || s.BytesOut == 0 || s.User == nil || s.User.UID != 0 {
		t.Errorf("listed as %+v", s)
	}
	comm, err := os.ReadFile(fmt.Sprintf("/proc/%d/comm", s.PID))
	if err != nil || strings.TrimSpace(string(comm)) != "sh" {
		t.Errorf("process %d is %q, %v", s.PID, comm, err)
	}
	if out := o.mustCLI("list"); !strings.Contains(out, "shop/web") || !strings.Contains(out, "echo ready") {
		t.Errorf("list:\n%s", out)
	}
	if out := o.mustCLI("list", "-o", "wide"); !strings.Contains(out, fmt.Sprint(s.PID)) || !strings.Contains(out, "running") {
		t.Errorf("list -o wide:\n%s", out)
	}
	var shown admin.Session
	if err := json.Unmarshal([]byte(o.mustCLI("show", s.ID[:6])), &shown); err != nil || shown.ID != s.ID {
		t.Errorf("show: %+v, %v", shown, err)
	}
	if out, err := o.cli("show", "nope"); err == nil || !strings.Contains(out, "no live session") {
		t.Errorf("show of an unknown ID: %v, %s", err, out)
	}
	if info, err := os.Stat(o.AdminSocket()); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("the admin socket: %v, %v", info.Mode(), err)
	}

	testutil.Eventually(t, "list --watch has shown the session", func() bool { return strings.Contains(followed.String(), s.ID) })

	// It is watched: the user is told, and the operator sees what is shown.
	watch := o.command("watch", s.ID)
	seen := &testutil.Buffer{}
	watch.Stdout, watch.Stderr = seen, seen
	if err := watch.Start(); err != nil {
		t.Fatal(err)
	}
	u.shows(t, "an operator of this node is watching")
	u.say(t, "echo secret$((40+2))\n")
	u.shows(t, "secret42")
	testutil.Eventually(t, "the watcher sees it, too", func() bool { return strings.Contains(seen.String(), "secret42") })

	// It is signalled, then ended by an operator.
	u.say(t, "trap 'echo got usr1' USR1; echo trapped$((1+1))\n")
	u.shows(t, "trapped2")
	o.mustCLI("kill", s.ID, "--signal", "USR1")
	u.say(t, "\n") // ash runs traps between commands
	u.shows(t, "got usr1")
	o.mustCLI("kill", s.ID)
	if err := u.end(t); err == nil || !strings.Contains(err.Error(), "ended by an operator") {
		t.Errorf("the user is told: %v", err)
	}
	if err := watch.Wait(); err != nil {
		t.Errorf("watch: %v: %s", err, seen.String())
	}
	testutil.Eventually(t, "no session is left", func() bool { return len(o.sessions()) == 0 })
	if err := follow.Process.Signal(os.Interrupt); err != nil {
		t.Fatal(err)
	}
	if err := follow.Wait(); err != nil {
		t.Errorf("list --watch: %v: %s", err, followed.String())
	}

	// A signal that ends the process gives its exit code.
	u = o.exec("db", false, "sleep", "1000")
	testutil.Eventually(t, "it runs", func() bool { l := o.sessions(); return len(l) == 1 && l[0].PID != 0 })
	id := o.sessions()[0].ID
	if out, err := o.cli("watch", id); err == nil || !strings.Contains(out, "cannot be watched") {
		t.Errorf("watch of a session without a terminal: %v, %s", err, out)
	}
	o.mustCLI("kill", id[:8], "--signal", "9")
	var exit clientexec.CodeExitError
	if err := u.end(t); !errors.As(err, &exit) || exit.Code != 137 {
		t.Errorf("after kill --signal 9: %v", err)
	}
	testutil.Eventually(t, "no session is left, so its end is audited", func() bool { return len(o.sessions()) == 0 })

	// ExecSync with an audit ID (KEP-6035) is audited.
	sync, err := o.Runtime().ExecSync(t.Context(), &runtimeapi.ExecSyncRequest{ContainerId: o.containers["db"], Cmd: []string{"sh", "-c", "echo hi; exit 3"}})
	if err != nil || sync.GetExitCode() != 3 {
		t.Fatalf("ExecSync: %v, %v", sync, err)
	}

	records := o.audit()
	find := func(event audit.Event, id string) audit.Record {
		t.Helper()
		for _, r := range records {
			if r.Event == event && r.Session == id {
				return r
			}
		}
		t.Fatalf("no %s record of %s in %+v", event, id, records)
		return audit.Record{}
	}
	begin, end := find(audit.Start, s.ID), find(audit.End, s.ID)
	if begin.PodName != "web" || begin.Container != "main" || strings.Join(begin.Command, " ") != "sh -c echo ready; exec sh" || !begin.TTY || begin.User == nil {
		t.Errorf("start record %+v", begin)
	}
	if end.Reason != "operator" || end.BytesOut == nil || *end.BytesOut == 0 || *end.BytesIn == 0 || end.Duration == nil || *end.Duration <= 0 {
		t.Errorf("end record %+v", end)
	}
	if end = find(audit.End, id); end.Reason != "exited" || end.ExitCode == nil || *end.ExitCode != 137 {
		t.Errorf("end record of the killed one %+v", end)
	}
	last := records[len(records)-1]
	if last.Kind != "execsync" || last.Event != audit.End || *last.ExitCode != 3 || *last.BytesOut != 3 {
		t.Errorf("end record of ExecSync %+v", last)
	}
	if info, err := os.Stat(filepath.Join(o.dir, "audit", "audit.log")); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("the audit log: %v, %v", info.Mode(), err)
	}

	// Only web's terminal was recorded.
	recordings, _ := filepath.Glob(filepath.Join(o.dir, "recordings", "*.cast"))
	if len(recordings) != 1 {
		t.Fatalf("recordings: %v", recordings)
	}
	if info, _ := os.Stat(recordings[0]); info.Mode().Perm() != 0o600 {
		t.Errorf("a recording has mode %v", info.Mode())
	}
	if info, _ := os.Stat(filepath.Dir(recordings[0])); info.Mode().Perm() != 0o700 {
		t.Errorf("the directory of recordings has mode %v", info.Mode())
	}
	testutil.Eventually(t, "the recording is complete", func() bool {
		text, _ := os.ReadFile(recordings[0])
		return strings.Contains(string(text), "the session has ended: operator")
	})
	file, err := os.Open(recordings[0])
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	lines := bufio.NewScanner(file)
	lines.Scan()
	var header struct{ Version, Width, Height int }
	if err := json.Unmarshal(lines.Bytes(), &header); err != nil || header.Version != 2 || header.Width != 132 || header.Height != 43 {
		t.Errorf("header %s: %v", lines.Bytes(), err)
	}
	if out := o.mustCLI("replay", recordings[0], "--speed", "1000000"); !strings.Contains(out, "secret42") {
		t.Errorf("replay shows %q", out)
	}
}

// TestLimitsAndReload checks that rules and limits refuse at the CRI call, with the code that says why, and that a reload
// changes them without touching live sessions.
func TestLimitsAndReload(t *testing.T) {
	o := start(t, "limits", operatedConfig)
	o.check()
	live := o.exec("web", true, "sh", "-c", "echo ready; exec sh")
	live.shows(t, "ready")
	var unused [2]*url.URL
	for i := range unused {
		var err error
		if unused[i], err = o.request("web", true, "sh"); err != nil {
			t.Fatal(err)
		}
	}

	o.reload(operatedConfig+`
[limits]
sessions_per_container = 1
[[deny]]
namespaces = ["bank"]
kinds = ["exec"]
tty = true
message = "no shells in the bank"
[[deny]]
pod_labels = { tier = "da*" }
kinds = ["execsync"]
`, "the configuration was reloaded")

	_, err := o.request("db", true, "sh")
	if status.Code(err) != codes.PermissionDenied || !strings.Contains(err.Error(), "no shells in the bank") {
		t.Errorf("a terminal in the bank: %v", err)
	}
	_, err = o.Runtime().ExecSync(t.Context(), &runtimeapi.ExecSyncRequest{ContainerId: o.containers["db"], Cmd: []string{"true"}})
	if status.Code(err) != codes.PermissionDenied {
		t.Errorf("ExecSync in the bank: %v", err)
	}
	_, err = o.request("web", false, "true")
	if status.Code(err) != codes.ResourceExhausted || !strings.Contains(err.Error(), "sessions_per_container") {
		t.Errorf("a second session in web: %v", err)
	}
	// Issued before the limit: the client that redeems its URL is told why it is refused.
	if err := o.redeem(unused[0], true).end(t); err == nil || !strings.Contains(err.Error(), "sessions_per_container") {
		t.Errorf("the URL from before: %v", err)
	}
	executor, err := remotecommand.NewWebSocketExecutor(&rest.Config{Host: unused[1].Host}, http.MethodGet, unused[1].String())
	if err != nil {
		t.Fatal(err)
	}
	err = executor.StreamWithContext(t.Context(), remotecommand.StreamOptions{Stdin: strings.NewReader(""), Stdout: io.Discard, Tty: true})
	if err == nil || !strings.Contains(err.Error(), "sessions_per_container") {
		t.Errorf("the URL from before, over WebSocket: %v", err)
	}
	if err := o.exec("db", false, "true").end(t); err != nil {
		t.Errorf("a session without a terminal in the bank: %v", err)
	}
	live.say(t, "echo still $((40+2))\n")
	live.shows(t, "still 42")

	// A file with a mistake is refused with the line, and the old configuration stays.
	o.reload("\n[limits]\nsesions = 1\n", "config.toml:3: ")
	if !strings.Contains(o.log(), `did you mean \"limits.sessions\"`) {
		t.Errorf("the log has no hint: %s", o.log())
	}
	if _, err = o.request("db", true, "sh"); status.Code(err) != codes.PermissionDenied {
		t.Errorf("after the refused reload: %v", err)
	}

	// Settings that need a restart are named, the others apply at once.
	o.reload("stream_address = '127.0.0.1:1'\n"+operatedConfig+"[limits]\nbandwidth = 65536\n[exec]\ndrain_idle = '1s'\n", "need a restart")
	testutil.Eventually(t, "the keys are named", func() bool { return strings.Contains(o.log(), "exec.drain_idle") })
	shellInBank := o.exec("db", true, "sh", "-c", "echo in")
	if err := shellInBank.end(t); err != nil || !strings.Contains(shellInBank.out.String(), "in") {
		t.Errorf("a terminal in the bank, allowed again: %v", err)
	}

	// 256 KiB at 64 KiB a second take at least three seconds. The first burst of 16 KiB is free.
	began := time.Now()
	limited := o.exec("db", false, "head", "-c", "262144", "/dev/zero")
	if err := limited.end(t); err != nil || len(limited.out.String()) != 262144 {
		t.Errorf("a limited session: %d bytes, %v", len(limited.out.String()), err)
	}
	if took := time.Since(began); took < 3*time.Second {
		t.Errorf("256 KiB took %v at 64 KiB a second", took)
	}
	live.say(t, "exit 5\n")
	var exit clientexec.CodeExitError
	if err := live.end(t); !errors.As(err, &exit) || exit.Code != 5 {
		t.Errorf("the session that lived through it all: %v", err)
	}
	refused := 0
	for _, r := range o.audit() {
		if r.Event == audit.Refused {
			refused++
		}
	}
	if refused != 6 {
		t.Errorf("%d refusals were audited, not 6", refused)
	}
}

// auditedEnvs returns the bytes of ExecRequest.envs with an audit ID, field 7 of newer APIs than ours (KEP-6035).
func auditedEnvs(id string) []byte {
	var variable []byte
	variable = protowire.AppendTag(variable, 1, protowire.BytesType)
	variable = protowire.AppendString(variable, "KUBERNETES_EXEC_AUDIT_ID")
	variable = protowire.AppendTag(variable, 2, protowire.BytesType)
	variable = protowire.AppendString(variable, id)
	return protowire.AppendBytes(protowire.AppendTag(nil, 7, protowire.BytesType), variable)
}

// TestOtherKinds checks that the other kinds of session are shown, audited and ended like an exec.
func TestOtherKinds(t *testing.T) {
	o := start(t, "kinds", operatedConfig)
	request := &runtimeapi.ExecRequest{ContainerId: o.containers["db"], Cmd: []string{"true"}, Stdout: true}
	request.ProtoReflect().SetUnknown(auditedEnvs("audit-1"))
	response, err := o.Runtime().Exec(t.Context(), request)
	if err != nil {
		t.Fatal(err)
	}
	u, err := url.Parse(response.GetUrl())
	if err != nil {
		t.Fatal(err)
	}
	executor, err := remotecommand.NewSPDYExecutor(&rest.Config{Host: u.Host}, http.MethodPost, u)
	if err != nil {
		t.Fatal(err)
	}
	if err := executor.StreamWithContext(t.Context(), remotecommand.StreamOptions{Stdout: io.Discard}); err != nil {
		t.Fatal(err)
	}

	// An attach, which is relayed to the upstream.
	attach, err := o.Runtime().Attach(t.Context(), &runtimeapi.AttachRequest{ContainerId: o.containers["web"], Stdout: true})
	if err != nil {
		t.Fatal(err)
	}
	if u, err = url.Parse(attach.GetUrl()); err != nil {
		t.Fatal(err)
	}
	if executor, err = remotecommand.NewSPDYExecutor(&rest.Config{Host: u.Host}, http.MethodPost, u); err != nil {
		t.Fatal(err)
	}
	attached := make(chan error, 1)
	go func() {
		attached <- executor.StreamWithContext(context.Background(), remotecommand.StreamOptions{Stdout: io.Discard})
	}()
	only := func(kind session.Kind) admin.Session {
		t.Helper()
		var found admin.Session
		testutil.Eventually(t, "the only session is a running "+string(kind), func() bool {
			list := o.sessions()
			if len(list) == 1 && list[0].Kind == kind && list[0].Phase == session.Running {
				found = list[0]
			}
			return found.ID != ""
		})
		return found
	}
	s := only(session.Attach)
	if s.PodName != "web" || s.Container != "main" {
		t.Errorf("listed as %+v", s)
	}
	if out, err := o.cli("kill", s.ID, "--signal", "TERM"); err == nil || !strings.Contains(out, "not ours") {
		t.Errorf("a signal for a process that is not ours: %v, %s", err, out)
	}
	o.mustCLI("kill", s.ID)
	if err := testutil.Receive(t, "the end of the attach", attached); err == nil || !strings.Contains(err.Error(), "ended by an operator") {
		t.Errorf("the attach ends with %v", err)
	}

	// A port-forward.
	sandboxes, err := o.Runtime().ListPodSandbox(t.Context(), &runtimeapi.ListPodSandboxRequest{
		Filter: &runtimeapi.PodSandboxFilter{LabelSelector: map[string]string{"tier": "data"}},
	})
	if err != nil || len(sandboxes.GetItems()) != 1 {
		t.Fatal(sandboxes, err)
	}
	forward := harness.StartForward(t, o.Node.Runtime(), sandboxes.GetItems()[0].GetId(), "SPDY", 80)
	s = only(session.PortForward)
	if s.PodName != "db" || s.ContainerID != "" || s.SandboxID == "" {
		t.Errorf("listed as %+v", s)
	}
	o.mustCLI("kill", s.ID[:9])
	err = testutil.Receive(t, "the end of the port-forward", forward.Ended)
	forward.Ended <- err
	if err == nil {
		t.Error("the port-forward ends without an error")
	}
	testutil.Eventually(t, "no session is left", func() bool { return len(o.sessions()) == 0 })

	// The log was moved away meanwhile, as logrotate does.
	before := o.audit()
	path := filepath.Join(o.dir, "audit", "audit.log")
	if err := os.Rename(path, path+".moved"); err != nil {
		t.Fatal(err)
	}
	if err := o.exec("db", false, "true").end(t); err != nil {
		t.Error(err)
	}
	var after []audit.Record
	testutil.Eventually(t, "the end is audited", func() bool { after = o.audit(); return len(after) == 2 })
	if len(before) != 6 || before[0].AuditID != "audit-1" || before[1].AuditID != "audit-1" {
		t.Errorf("records %+v", before)
	}
	for i, kind := range []session.Kind{session.Exec, session.Exec, session.Attach, session.Attach, session.PortForward, session.PortForward} {
		if before[i].Kind != kind {
			t.Errorf("record %d is of kind %s, want %s", i, before[i].Kind, kind)
		}
	}
}
