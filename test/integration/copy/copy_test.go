// Package copy tests exec.helpers: what kubectl cp sends, into and out of real containers that have no tar, and what a
// container can do to the helper.
package copy

import (
	"archive/tar"
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/streamshim/streamshim/internal/testutil"
	"github.com/streamshim/streamshim/pkg/admin"
	"github.com/streamshim/streamshim/test/internal/images"
	"github.com/streamshim/streamshim/test/internal/node"
)

// patience bounds waits for what happens soon, on a machine that is busy with other things.
const patience = 90 * time.Second

// copying is a node with one pod.
type copying struct {
	*node.Node
	t   *testing.T
	dir string
	pod string
}

func start(t *testing.T, name, config string) *copying {
	t.Helper()
	c := &copying{t: t, dir: t.TempDir()}
	file := filepath.Join(c.dir, "config.toml")
	if err := os.WriteFile(file, []byte(strings.ReplaceAll(config, "@DIR@", c.dir)), 0o600); err != nil {
		t.Fatal(err)
	}
	c.Node = node.StartForTest(t, node.Config{Name: name, Streamshim: node.Binary(t), StreamshimArgs: []string{"--config", file}})
	var err error
	if c.pod, err = c.RunPod(t.Context(), node.PodSpec{}); err != nil {
		t.Fatal(err)
	}
	return c
}

// static runs a container with only one static program, and a folder of the host at /data. It returns the container and the
// folder.
func (c *copying) static(name string, change func(*node.ContainerSpec)) (container, data string) {
	c.t.Helper()
	data = filepath.Join(c.dir, name)
	if err := os.Mkdir(data, 0o777); err != nil {
		c.t.Fatal(err)
	}
	if err := os.Chmod(data, 0o777); err != nil {
		c.t.Fatal(err)
	}
	spec := node.ContainerSpec{
		Name: name, Image: node.Image(images.Sandbox), Command: []string{"/pause"},
		Mounts: []*runtimeapi.Mount{{HostPath: data, ContainerPath: "/data"}},
	}
	if change != nil {
		change(&spec)
	}
	container, err := c.RunContainer(c.t.Context(), c.pod, spec)
	if err != nil {
		c.t.Fatal(err)
	}
	return container, data
}

// crictl runs a command in a container as kubectl cp would, and returns its output. crictl itself ends with 1.
func (c *copying) crictl(stdin io.Reader, container string, args ...string) (stdout []byte, stderr string, err error) {
	c.t.Helper()
	ctx, cancel := context.WithTimeout(c.t.Context(), 2*patience)
	defer cancel()
	flags := []string{"exec"}
	if stdin != nil {
		flags = append(flags, "-i")
	}
	template := c.Crictl(append(append(flags, container), args...)...)
	command := exec.CommandContext(ctx, template.Path, template.Args[1:]...)
	var out, errs bytes.Buffer
	command.Stdin, command.Stdout, command.Stderr = stdin, &out, &errs
	err = command.Run()
	return out.Bytes(), errs.String(), err
}

const config = `
[exec]
helpers = ["tar"]
[audit]
destination = "file"
file = "@DIR@/audit.log"
fsync = "always"
`

// sums returns the contents of an archive: what each member is and holds.
func sums(t *testing.T, archive io.Reader) map[string]string {
	t.Helper()
	all := map[string]string{}
	for r := tar.NewReader(archive); ; {
		h, err := r.Next()
		if errors.Is(err, io.EOF) {
			return all
		}
		if err != nil {
			t.Fatal(err)
		}
		hash := sha256.New()
		n, err := io.Copy(hash, r)
		if err != nil {
			t.Fatal(err)
		}
		all[h.Name] = fmt.Sprintf("%c %o %d:%d %s %d %x", h.Typeflag, h.Mode, h.Uid, h.Gid, h.Linkname, n, hash.Sum(nil))
	}
}

// upload makes an archive as kubectl does.
func upload(t *testing.T) []byte {
	t.Helper()
	var archive bytes.Buffer
	w := tar.NewWriter(&archive)
	big := bytes.Repeat([]byte("0123456789abcdef"), 5<<20/16)
	for _, m := range []struct {
		tar.Header
		text []byte
	}{
		{tar.Header{Name: "tree/", Typeflag: tar.TypeDir, Mode: 0o750}, nil},
		{tar.Header{Name: "tree/plain", Typeflag: tar.TypeReg, Mode: 0o640, Uid: 11, Gid: 12}, []byte("plain\n")},
		{tar.Header{Name: "tree/big", Typeflag: tar.TypeReg, Mode: 0o600}, big},
		{tar.Header{Name: "tree/zeros", Typeflag: tar.TypeReg, Mode: 0o600}, make([]byte, 1<<20)},
		{tar.Header{Name: "tree/odd\nname \x1b[m", Typeflag: tar.TypeReg, Mode: 0o755}, []byte("odd")},
		{tar.Header{Name: "tree/link", Typeflag: tar.TypeSymlink, Linkname: "/data/tree/plain", Mode: 0o777}, nil},
		{tar.Header{Name: "tree/sub/", Typeflag: tar.TypeDir, Mode: 0o700}, nil},
		{tar.Header{Name: "tree/sub/" + strings.Repeat("long", 40), Typeflag: tar.TypeReg, Mode: 0o600}, []byte("long")},
	} {
		m.Size = int64(len(m.text))
		if err := w.WriteHeader(&m.Header); err != nil {
			t.Fatal(err)
		}
		if _, err := w.Write(m.text); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return archive.Bytes()
}

// TestCopyWithoutTar checks that files go into a container with one static program and come back unchanged, and that the
// audit log names the helper.
func TestCopyWithoutTar(t *testing.T) {
	c := start(t, "copy", config)
	archive := upload(t)
	want := sums(t, bytes.NewReader(archive))
	uid := int64(1234)
	for name, change := range map[string]func(*node.ContainerSpec){
		"root":     nil,
		"readonly": func(s *node.ContainerSpec) { s.ReadOnlyRoot = true },
		"user": func(s *node.ContainerSpec) {
			s.RunAsUser, s.NoNewPrivileges, s.DropCapabilities = &uid, true, []string{"ALL"}
		},
	} {
		t.Run(name, func(t *testing.T) {
			owner := "0:0"
			if name == "user" {
				owner = fmt.Sprintf("%d:0", uid)
			}
			container, data := c.static(name, change)
			if out, stderr, err := c.crictl(nil, container, "test", "-d", "/data"); err != nil {
				t.Errorf("test -d /data: %v %s %s", err, out, stderr)
			}
			if _, _, err := c.crictl(nil, container, "test", "-d", "/pause"); err == nil {
				t.Error("a file is a directory")
			}
			if out, stderr, err := c.crictl(bytes.NewReader(archive), container, "tar", "-xmf", "-", "-C", "/data"); err != nil || len(out) > 0 {
				t.Fatalf("upload: %v %s %s", err, out, stderr)
			}
			text, err := os.ReadFile(filepath.Join(data, "tree/plain"))
			if err != nil || string(text) != "plain\n" {
				t.Errorf("on the node: %q, %v", text, err)
			}
			back, stderr, err := c.crictl(nil, container, "tar", "cf", "-", "/data/tree")
			if err != nil || stderr != "" {
				t.Fatalf("download: %v %s", err, stderr)
			}
			got := sums(t, bytes.NewReader(back))
			if len(got) != len(want) {
				t.Errorf("%d members, want %d", len(got), len(want))
			}
			for name, w := range want {
				if owner != "0:0" { // only root gives files away
					w = owners.ReplaceAllString(w, " "+owner+" ")
				}
				if g := got["data/"+name]; g != w {
					t.Errorf("%q came back as %q, want %q", name, g, w)
				}
			}
			// What kubectl cp does not send fails as without the helper.
			if _, stderr, err := c.crictl(nil, container, "tar", "tf", "/data/x"); err == nil || !strings.Contains(stderr, `"tar": executable file not found`) {
				t.Errorf("tar tf: %v %s", err, stderr)
			}
			if _, stderr, err := c.crictl(nil, container, "tar", "cf", "-", "/data/none"); err == nil || !strings.Contains(stderr, "/data/none: no such file") {
				t.Errorf("a file that is not there: %v %s", err, stderr)
			}
		})
	}
	with, without := 0, 0
	// The record of an end is written when its client has gone.
	testutil.Eventually(t, "each session's end is in the audit log", func() bool {
		log, err := os.ReadFile(filepath.Join(c.dir, "audit.log"))
		if err != nil {
			t.Fatal(err)
		}
		with, without = 0, 0
		for line := range strings.Lines(string(log)) {
			var record struct{ Event, Helper string }
			if err := json.Unmarshal([]byte(line), &record); err != nil {
				return false // half a line
			}
			if record.Event == "end" && record.Helper == "tar" {
				with++
			} else if record.Event == "end" {
				without++
			}
		}
		return with+without >= 6*3
	})
	if with != 5*3 || without != 3 {
		t.Errorf("%d records name the helper, %d do not", with, without)
	}
}

var owners = regexp.MustCompile(` \d+:\d+ `)

// TestCopyIsOffByDefault checks that nothing changes without the setting.
func TestCopyIsOffByDefault(t *testing.T) {
	c := start(t, "copyoff", "")
	container, _ := c.static("off", nil)
	for _, args := range [][]string{{"tar", "cf", "-", "/pause"}, {"test", "-d", "/"}} {
		if _, stderr, err := c.crictl(nil, container, args...); err == nil || !strings.Contains(stderr, fmt.Sprintf("%q: executable file not found", args[0])) {
			t.Errorf("%v: %v %s", args, err, stderr)
		}
	}
}

// TestHelperUnderAttack checks that the helper has what the command would have had and nothing of the host, and that its
// container cannot change it.
func TestHelperUnderAttack(t *testing.T) {
	c := start(t, "copyatk", config)
	// A container with a shell to attack from, and without tar.
	container, err := c.RunContainer(t.Context(), c.pod, node.ContainerSpec{Name: "attacker", AddCapabilities: []string{"SYS_PTRACE", "FOWNER"}})
	if err != nil {
		t.Fatal(err)
	}
	if out, stderr, err := c.crictl(nil, container, "rm", "/bin/tar"); err != nil {
		t.Fatal(err, string(out), stderr)
	}
	// A helper that waits for its input.
	input, typed := io.Pipe()
	ended := make(chan error, 1)
	go func() {
		_, stderr, err := c.crictl(input, container, "tar", "-xmf", "-", "-C", "/tmp")
		if err != nil {
			err = fmt.Errorf("%w: %s", err, stderr)
		}
		ended <- err
	}()
	var pid int
	for deadline := time.Now().Add(patience); pid == 0; time.Sleep(20 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("no helper runs")
		}
		out, err := exec.Command(node.Binary(t), "sessions", "--admin", "unix://"+c.AdminSocket(), "list", "-o", "json").Output()
		var list admin.SessionList
		if err != nil || json.Unmarshal(out, &list) != nil {
			t.Fatal(err, string(out))
		}
		for _, s := range list.Sessions {
			if s.PID != 0 {
				pid = s.PID
			}
		}
	}
	proc := func(pid int, name string) string { return filepath.Join("/proc", strconv.Itoa(pid), name) }
	init := c.initPID(container)

	status := func(pid int) string {
		text, err := os.ReadFile(proc(pid, "status"))
		if err != nil {
			t.Fatal(err)
		}
		return strings.Join(regexp.MustCompile(`(?m)^(Uid|Gid|Groups|Cap\w+|NoNewPrivs|Seccomp|Seccomp_filters):.*$`).FindAllString(string(text), -1), "\n")
	}
	if got, want := status(pid), status(init); got != want {
		t.Errorf("the helper has\n%s\nthe container has\n%s", got, want)
	}
	for _, space := range []string{"mnt", "pid", "net", "ipc", "uts", "cgroup", "user"} {
		got, err := os.Readlink(proc(pid, "ns/"+space))
		want, err2 := os.Readlink(proc(init, "ns/"+space))
		if err := errors.Join(err, err2); err != nil || got != want {
			t.Errorf("namespace %s: %s, want %s: %v", space, got, want, err)
		}
	}
	program, err := os.Readlink(proc(pid, "exe"))
	if err != nil || !strings.Contains(program, "memfd:streamshim-helper") {
		t.Fatalf("its program is %s, %v", program, err)
	}
	last := ""
	defer func() {
		if t.Failed() && last != "" {
			t.Log("seen last:", last)
		}
	}()
	eventually(t, "it holds its streams and nothing else", func() bool {
		entries, err := os.ReadDir(proc(pid, "fd"))
		if err != nil {
			t.Fatal(err)
		}
		for _, entry := range entries {
			target, err := os.Readlink(proc(pid, "fd/"+entry.Name()))
			if errors.Is(err, fs.ErrNotExist) {
				continue
			}
			n, _ := strconv.Atoi(entry.Name()) //nolint:errcheck // the kernel writes numbers
			// Go's own descriptors: its poller, and the cgroup's share of the processors.
			own := strings.HasPrefix(target, "anon_inode:[event") || strings.HasPrefix(target, "/sys/fs/cgroup/") && n > 2
			if stream := n <= 2 && strings.HasPrefix(target, "pipe:"); !stream && !own {
				last = fmt.Sprintf("descriptor %d is %s", n, target)
				return false
			}
		}
		return true
	})
	file, err := os.Open(proc(pid, "exe"))
	if err != nil {
		t.Fatal(err)
	}
	seals, err := unix.FcntlInt(file.Fd(), unix.F_GET_SEALS, 0)
	file.Close()
	if all := unix.F_SEAL_SEAL | unix.F_SEAL_SHRINK | unix.F_SEAL_GROW | unix.F_SEAL_WRITE; err != nil || seals&all != all {
		t.Errorf("seals %x, %v", seals, err)
	}

	// Attacks from inside: write to it, truncate it, remove its execute permissions. Its name leads to its pid there.
	const attack = `for p in /proc/[0-9]*; do case $(readlink $p/exe) in *memfd*)
	  echo found; (echo x >>$p/exe) 2>/dev/null && echo WRITTEN; (: >$p/exe) 2>/dev/null && echo CUT
	  chmod 000 $p/exe 2>/dev/null; echo tried;; esac; done`
	out, stderr, err := c.crictl(nil, container, "sh", "-c", attack)
	if err != nil || string(out) != "found\ntried\n" {
		t.Errorf("the attack: %q %s %v", out, stderr, err)
	}
	go func() {
		typed.Write(upload(t)) //nolint:errcheck // seen below
		typed.Close()
	}()
	select {
	case err := <-ended:
		if err != nil {
			t.Errorf("the helper that was attacked: %v", err)
		}
	case <-time.After(2 * patience):
		t.Fatal("the helper that was attacked does not end")
	}
	if out, stderr, err := c.crictl(nil, container, "cat", "/tmp/tree/plain"); err != nil || string(out) != "plain\n" {
		t.Errorf("%q %s %v", out, stderr, err)
	}
	// The next helper is not affected. No helper replaces a tar that is there, whatever that does.
	if _, stderr, err := c.crictl(nil, container, "tar", "cf", "-", "/tmp/tree"); err != nil {
		t.Errorf("the next helper: %s %v", stderr, err)
	}
	if _, stderr, err := c.crictl(nil, container, "sh", "-c", "printf '#!/bin/sh\necho planted' >/bin/tar; chmod 755 /bin/tar"); err != nil {
		t.Fatal(stderr, err)
	}
	if out, stderr, err := c.crictl(nil, container, "tar", "cf", "-", "/tmp/tree"); err != nil || string(out) != "planted\n" {
		t.Errorf("with a tar in the container: %.100q %s %v", out, stderr, err)
	}
}

// initPID returns the pid of the container's main process on this machine.
func (c *copying) initPID(container string) int {
	c.t.Helper()
	response, err := c.Runtime().ContainerStatus(c.t.Context(), &runtimeapi.ContainerStatusRequest{ContainerId: container, Verbose: true})
	if err != nil {
		c.t.Fatal(err)
	}
	var info struct{ Pid int }
	if err := json.Unmarshal([]byte(response.GetInfo()["info"]), &info); err != nil || info.Pid == 0 {
		c.t.Fatal(err, response.GetInfo())
	}
	return info.Pid
}

func eventually(t *testing.T, what string, condition func() bool) {
	t.Helper()
	for deadline := time.Now().Add(patience); !condition(); time.Sleep(20 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("waited in vain: %s", what)
		}
	}
}
