package main

import (
	"bytes"
	"context"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/spf13/pflag"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/streamshim/streamshim/internal/testutil/leak"
	"github.com/streamshim/streamshim/pkg/config"
)

// testTimeout only bounds what would hang.
const testTimeout = 60 * time.Second

func run(t *testing.T, args ...string) (string, error) {
	t.Helper()
	var out bytes.Buffer
	command := newCommand()
	command.SetArgs(args)
	command.SetOut(&out)
	command.SetErr(&out)
	err := command.ExecuteContext(t.Context())
	return out.String(), err
}

func TestVersion(t *testing.T) {
	out, err := run(t, "version")
	if err != nil || !strings.HasPrefix(out, "streamshim devel") {
		t.Errorf("%q, %v", out, err)
	}
}

func TestCompletion(t *testing.T) {
	for _, shell := range []string{"bash", "zsh", "fish"} {
		if out, err := run(t, "completion", shell); err != nil || !strings.Contains(out, "streamshim") {
			t.Errorf("%s: %v", shell, err)
		}
	}
}

// A setting that cannot be used is refused before anything is touched, with a way out.
func TestBadSettings(t *testing.T) {
	dir := t.TempDir()
	file := filepath.Join(dir, "config.toml")
	if err := os.WriteFile(file, []byte("[exec]\non_disconect = 'kill'\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, test := range []struct {
		args []string
		want []string
	}{
		{[]string{"--config", file}, []string{file + ":2: ", `unknown key "exec.on_disconect"`, `did you mean "exec.on_disconnect"?`}},
		{[]string{"--config", filepath.Join(dir, "none")}, []string{"none: no such file"}},
		{[]string{"--listen", "tcp://0.0.0.0:1"}, []string{"listen: ", "unix:///path"}},
		{[]string{"--stream-address", "0.0.0.0:0"}, []string{"stream_address: ", "loopback"}},
		{[]string{"--log-level", "loud"}, []string{"log_level: ", "debug, info, warn, error"}},
		{[]string{"extra"}, []string{"extra"}},
		{[]string{"--nope"}, []string{"unknown flag"}},
	} {
		_, err := run(t, append([]string{"serve"}, test.args...)...)
		if err == nil {
			t.Errorf("%v: accepted", test.args)
			continue
		}
		for _, want := range test.want {
			if !strings.Contains(err.Error(), want) {
				t.Errorf("%v: %q lacks %q", test.args, err, want)
			}
		}
	}
}

// serving is `streamshim serve` running in this process.
type serving struct {
	socket string
	stop   context.CancelFunc
	ended  chan error
}

func startServe(t *testing.T, dir string, more ...string) *serving {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	s := &serving{socket: filepath.Join(dir, "run", "s.sock"), stop: cancel, ended: make(chan error, 1)}
	command := newCommand()
	command.SetArgs(append([]string{"serve", "--listen", "unix://" + s.socket, "--upstream", "unix://" + filepath.Join(dir, "away.sock"),
		"--state-dir", filepath.Join(dir, "state"), "--admin", "unix://" + filepath.Join(dir, "admin.sock"), "--log-level", "error"}, more...))
	go func() { s.ended <- command.ExecuteContext(ctx) }()
	t.Cleanup(cancel)
	return s
}

// notifySocket is what systemd would listen on.
func notifySocket(t *testing.T, dir string) *net.UnixConn {
	t.Helper()
	path := filepath.Join(dir, "notify")
	conn, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: path, Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	t.Setenv("NOTIFY_SOCKET", path)
	return conn
}

func wantState(t *testing.T, conn *net.UnixConn, want string) {
	t.Helper()
	conn.SetReadDeadline(time.Now().Add(testTimeout))
	b := make([]byte, 256)
	n, err := conn.Read(b)
	if err != nil || !strings.Contains(string(b[:n]), want) {
		t.Fatalf("systemd was told %q, %v; want %q", b[:n], err, want)
	}
}

// serve tells systemd when it is ready, serves a socket for root alone, refuses to take over from a
// live one, ends cleanly, and replaces the socket of one that was killed.
func TestServe(t *testing.T) {
	leak.Check(t)
	dir := t.TempDir()
	notify := notifySocket(t, dir)
	first := startServe(t, dir)
	wantState(t, notify, "READY=1")

	info, err := os.Stat(first.socket)
	if err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("the socket: %v, %v", info, err)
	}
	conn, err := grpc.NewClient("unix://"+first.socket, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	ctx, cancel := context.WithTimeout(t.Context(), testTimeout)
	defer cancel()
	_, err = runtimeapi.NewRuntimeServiceClient(conn).Version(ctx, &runtimeapi.VersionRequest{})
	if status.Code(err) != codes.Unavailable || !strings.Contains(err.Error(), "away.sock") {
		t.Errorf("a call while the upstream is away: %v", err)
	}

	second := startServe(t, dir)
	if err := <-second.ended; err == nil || !strings.Contains(err.Error(), first.socket) {
		t.Errorf("a second streamshim on the same socket: %v", err)
	}

	conn.Close()
	first.stop()
	wantState(t, notify, "STOPPING=1")
	if err := <-first.ended; err != nil {
		t.Errorf("serve ended with %v", err)
	}
	if _, err := os.Stat(first.socket); err == nil {
		t.Error("the socket was left behind")
	}

	leaveStaleSocket(t, first.socket)
	third := startServe(t, dir)
	wantState(t, notify, "READY=1")
	third.stop()
	wantState(t, notify, "STOPPING=1")
	if err := <-third.ended; err != nil {
		t.Errorf("after a stale socket: %v", err)
	}
}

// leaveStaleSocket leaves a socket file on which nobody listens, as a killed process does.
func leaveStaleSocket(t *testing.T, path string) {
	t.Helper()
	listener, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	listener.SetUnlinkOnClose(false)
	listener.Close()
}

// Flags win over the file, the file over the defaults.
func TestSettingsPrecedence(t *testing.T) {
	dir := t.TempDir()
	file := filepath.Join(dir, "config.toml")
	text := "log_level = 'warn'\nlog_format = 'json'\nupstream = 'unix:///from/file.sock'\n"
	if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	flags := pflag.NewFlagSet("test", pflag.ContinueOnError)
	settings := addSettings(flags)
	if err := flags.Parse([]string{"--config", file, "--log-level", "debug"}); err != nil {
		t.Fatal(err)
	}
	c, err := settings.load(flags)
	if err != nil {
		t.Fatal(err)
	}
	if c.LogLevel != "debug" || c.LogFormat != "json" || c.Upstream != "unix:///from/file.sock" || c.Listen != config.Default().Listen {
		t.Errorf("%+v", c)
	}
}

// A flag also mends what the file has wrong, and each mistake is told where it is.
func TestFlagMendsFile(t *testing.T) {
	file := filepath.Join(t.TempDir(), "config.toml")
	if err := os.WriteFile(file, []byte("log_format = 'json'\nlog_level = 'loud'\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, test := range []struct {
		args []string
		want string // the error begins with it; none when empty
	}{
		{nil, file + ":2: log_level: "},
		{[]string{"--log-level", "debug"}, ""},
		{[]string{"--log-level", "quiet"}, "log_level: \"quiet\""},
		{[]string{"--log-format", "text"}, file + ":2: log_level: "},
	} {
		flags := pflag.NewFlagSet("test", pflag.ContinueOnError)
		settings := addSettings(flags)
		if err := flags.Parse(append([]string{"--config", file}, test.args...)); err != nil {
			t.Fatal(err)
		}
		c, err := settings.load(flags)
		switch {
		case test.want == "" && (err != nil || c.LogLevel != "debug" || c.LogFormat != "json"):
			t.Errorf("%v: %+v, %v", test.args, c, err)
		case test.want != "" && (err == nil || !strings.HasPrefix(err.Error(), test.want)):
			t.Errorf("%v: %v", test.args, err)
		}
	}
}

func TestVersionFlag(t *testing.T) {
	flag, err := run(t, "--version")
	command, commandErr := run(t, "version")
	if flag != command || err != nil || commandErr != nil {
		t.Errorf("--version %q, version %q, %v, %v", flag, command, err, commandErr)
	}
}

// Who forgets the ID is told where to find it.
func TestArgumentsAreNamed(t *testing.T) {
	for _, command := range []string{"kill", "show", "watch"} {
		if _, err := run(t, "sessions", command); err == nil || !strings.Contains(err.Error(), "sessions list") {
			t.Errorf("%s: %v", command, err)
		}
	}
	if _, err := run(t, "sessions", "replay"); err == nil || !strings.Contains(err.Error(), ".cast") {
		t.Errorf("replay: %v", err)
	}
}
