package helper

import (
	"archive/tar"
	"bytes"
	"crypto/sha256"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

// The helper changes the working folder and the umask, as a process of its own may: it is run as one.
func TestMain(m *testing.M) {
	if len(os.Args) > 1 && os.Args[1] == Command {
		os.Exit(Main(os.Args[2:], os.Stdin, os.Stdout, os.Stderr))
	}
	os.Exit(m.Run())
}

func run(t *testing.T, dir string, stdin io.Reader, args ...string) (stdout []byte, stderr string, code int) {
	t.Helper()
	command := exec.Command("/proc/self/exe", append([]string{Command}, args...)...)
	var out, errs bytes.Buffer
	command.Dir, command.Stdin, command.Stdout, command.Stderr = dir, stdin, &out, &errs
	err := command.Run()
	if _, ok := err.(*exec.ExitError); err != nil && !ok {
		t.Fatal(err)
	}
	return out.Bytes(), errs.String(), command.ProcessState.ExitCode()
}

// What kubectl cp sends is served, and nothing that resembles it.
func TestServes(t *testing.T) {
	for line, want := range map[string]bool{
		"tar|cf|-|/etc/hosts": true, "tar|cf|-|a b": true, "tar|-xmf|-": true, "tar|-xmf|-|-C|/tmp": true, "test|-d|/tmp": true,
		"tar|--no-same-permissions|--no-same-owner|-xmf|-": true, "tar|--no-same-permissions|--no-same-owner|-xmf|-|-C|x": true,
		"tar|cf|-": false, "tar|cf|-|": false, "tar|cf|-|--checkpoint-action=exec=id": false, "tar|cf|-|a|b": false, "tar|cf|/dev/sda|a": false,
		"tar|-xmf|-|-C": false, "tar|-xmf|-|-C|": false, "tar|-xmf|-|-C|/tmp|x": false, "tar|xf|-": false, "tar": false, "/bin/tar|-xmf|-": false,
		"sh|-c|tar cf - /x | tail -c+1": false, "test|-f|/tmp": false, "test": false, "": false,
	} {
		if got := Serves(strings.Split(line, "|")); got != want {
			t.Errorf("%q: %v", line, got)
		}
	}
	if Serves(nil) {
		t.Error("no command is served")
	}
}

func TestIsFolder(t *testing.T) {
	dir := t.TempDir()
	for path, want := range map[string]int{dir: 0, "/etc/passwd": 1, filepath.Join(dir, "none"): 1} {
		if _, _, code := run(t, dir, nil, "test", "-d", path); code != want {
			t.Errorf("%s: %d", path, code)
		}
	}
}

const oddName = "new\nline \x1b[31m 'quote' \xff\xfe"

// tree makes a folder with one of everything.
func tree(t *testing.T) string {
	t.Helper()
	top := filepath.Join(t.TempDir(), "tree")
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	must(os.MkdirAll(filepath.Join(top, "a/empty"), 0o755))
	must(os.WriteFile(filepath.Join(top, "a/plain"), []byte("plain\n"), 0o640))
	must(os.WriteFile(filepath.Join(top, oddName), []byte("odd\n"), 0o600))
	must(os.WriteFile(filepath.Join(top, "nothing"), nil, 0o444))
	must(os.WriteFile(filepath.Join(top, strings.Repeat("long", 50)), bytes.Repeat([]byte("x"), 1000), 0o644))
	must(os.Link(filepath.Join(top, "a/plain"), filepath.Join(top, "hard")))
	must(os.Symlink("a/plain", filepath.Join(top, "soft")))
	must(os.Symlink("/etc/passwd", filepath.Join(top, "absolute")))
	must(os.Symlink("../../../nowhere", filepath.Join(top, "dangling")))
	must(unix.Mkfifo(filepath.Join(top, "fifo"), 0o600))
	sparse, err := os.Create(filepath.Join(top, "sparse"))
	must(err)
	_, err = sparse.WriteAt([]byte("end"), 40<<20)
	must(err)
	must(sparse.Truncate(48 << 20))
	must(sparse.Close())
	must(os.Chmod(filepath.Join(top, "a/empty"), 0o1777&^0o1000|fs.ModeSticky))
	must(os.Chmod(filepath.Join(top, "nothing"), 0o755|fs.ModeSetuid))
	unix.Setxattr(filepath.Join(top, "a/plain"), "user.colour", []byte("green\x00\n"), 0) //nolint:errcheck // not every file system has them
	if os.Geteuid() == 0 {
		must(os.Chown(filepath.Join(top, "a/plain"), 1234, 3000000))
		must(os.Chmod(filepath.Join(top, "a/plain"), 0o640))
		must(os.Lchown(filepath.Join(top, "soft"), 5, 6))
	}
	return top
}

// describe is everything about a tree but times.
func describe(t *testing.T, top string) string {
	t.Helper()
	var all []string
	err := filepath.WalkDir(top, func(path string, _ fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		info, err := os.Lstat(path)
		if err != nil {
			return err
		}
		stat := info.Sys().(*syscall.Stat_t)
		line := fmt.Sprintf("%q %v %d:%d", strings.TrimPrefix(path, top), info.Mode(), stat.Uid, stat.Gid)
		switch {
		case info.Mode().IsRegular():
			text, err := os.ReadFile(path)
			if err != nil {
				return err
			}
			line += fmt.Sprintf(" %d links %d bytes %x", stat.Nlink, len(text), sha256.Sum256(text))
			line += fmt.Sprintf(" %q", attributes(path))
		case info.Mode()&fs.ModeSymlink != 0:
			target, err := os.Readlink(path)
			if err != nil {
				return err
			}
			line += " -> " + target
		}
		all = append(all, line)
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return strings.Join(all, "\n")
}

// What goes through the helper in both directions, or through it and GNU tar, is the same.
func TestRoundTrip(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("only root may give files away")
	}
	top := tree(t)
	want := describe(t, top)
	archive, stderr, code := run(t, "/", nil, "tar", "cf", "-", top)
	if code != 0 || stderr != "" {
		t.Fatalf("create: %d %s", code, stderr)
	}
	gnu, err := exec.Command("tar", "--xattrs", "-cf", "-", "-C", "/", strings.TrimPrefix(top, "/")).Output()
	if err != nil {
		t.Fatal(err)
	}
	for name, source := range map[string][]byte{"its own archive": archive, "GNU tar's": gnu} {
		to := t.TempDir()
		if _, stderr, code := run(t, "/", bytes.NewReader(source), "tar", "-xmf", "-", "-C", to); code != 0 || stderr != "" {
			t.Errorf("%s: %d %s", name, code, stderr)
		}
		if got := describe(t, filepath.Join(to, top)); got != want {
			t.Errorf("%s became\n%s\nwant\n%s", name, got, want)
		}
		info, err := os.Stat(filepath.Join(to, top, "sparse"))
		if err != nil {
			t.Fatal(err)
		}
		if blocks := info.Sys().(*syscall.Stat_t).Blocks; blocks > 2048 {
			t.Errorf("%s: the sparse file has %d blocks", name, blocks)
		}
	}
	to := t.TempDir()
	unpack := exec.Command("tar", "--xattrs", "--same-owner", "-xpf", "-", "-C", to)
	unpack.Stdin = bytes.NewReader(archive)
	if out, err := unpack.CombinedOutput(); err != nil {
		t.Errorf("GNU tar with its archive: %v %s", err, out)
	}
	if got := describe(t, filepath.Join(to, top)); got != want {
		t.Errorf("for GNU tar its archive is\n%s\nwant\n%s", got, want)
	}
}

// A user who is not root gets what their umask says; so does root with kubectl cp --no-preserve.
func TestNoPreserve(t *testing.T) {
	var archive bytes.Buffer
	w := tar.NewWriter(&archive)
	w.WriteHeader(&tar.Header{Name: "f", Typeflag: tar.TypeReg, Mode: 0o4777, Uid: 77, Gid: 77, Size: 1}) //nolint:errcheck // a buffer
	w.Write([]byte("x"))                                                                                  //nolint:errcheck // as above
	w.Close()                                                                                             //nolint:errcheck // as above
	to := t.TempDir()
	old := unix.Umask(0o027)
	_, stderr, code := run(t, "/", &archive, "tar", "--no-same-permissions", "--no-same-owner", "-xmf", "-", "-C", to)
	unix.Umask(old)
	info, err := os.Stat(filepath.Join(to, "f"))
	if err != nil || code != 0 || stderr != "" {
		t.Fatal(code, stderr, err)
	}
	if stat := info.Sys().(*syscall.Stat_t); info.Mode() != 0o750 || int(stat.Uid) != os.Geteuid() {
		t.Errorf("%v of %d", info.Mode(), stat.Uid)
	}
}

// What an archive may try: names that lead out, links that later members are to be written through, members that
// replace each other, an archive that was cut.
func TestHostileArchives(t *testing.T) {
	type member struct {
		name, link string
		kind       byte
		text       string
	}
	outside := t.TempDir()
	for name, test := range map[string]struct {
		members []member
		cut     int
		code    int
		says    string
		inside  map[string]string // what is in the folder afterwards; "-> x" for a link
	}{
		"dots":     {members: []member{{name: "../out", kind: tar.TypeReg, text: "x"}, {name: "in", kind: tar.TypeReg, text: "y"}}, code: 2, says: "contains '..'", inside: map[string]string{"in": "y"}},
		"dots 2":   {members: []member{{name: "a/../../out", kind: tar.TypeReg, text: "x"}}, code: 2, says: "contains '..'"},
		"absolute": {members: []member{{name: "/abs", kind: tar.TypeReg, text: "x"}}, inside: map[string]string{"abs": "x"}},
		"through a link": {members: []member{{name: "d", kind: tar.TypeSymlink, link: outside}, {name: "d/f", kind: tar.TypeReg, text: "x"}},
			code: 2, says: "d: ", inside: map[string]string{"d/f": "x"}},
		"over a link": {members: []member{{name: "l", kind: tar.TypeSymlink, link: filepath.Join(outside, "f")}, {name: "l", kind: tar.TypeReg, text: "x"}},
			inside: map[string]string{"l": "x"}},
		"hard link out":     {members: []member{{name: "h", kind: tar.TypeLink, link: "../../../../etc/passwd"}}, code: 2, says: "contains '..'"},
		"hard link of link": {members: []member{{name: "l", kind: tar.TypeSymlink, link: "x"}, {name: "h", kind: tar.TypeLink, link: "l"}}, inside: map[string]string{"l": "-> x", "h": "-> x"}},
		"to itself":         {members: []member{{name: "f", kind: tar.TypeReg, text: "x"}, {name: "f", kind: tar.TypeLink, link: "f"}}, inside: map[string]string{"f": "x"}},
		"twice":             {members: []member{{name: "f", kind: tar.TypeReg, text: "first"}, {name: "f", kind: tar.TypeReg, text: "second"}}, inside: map[string]string{"f": "second"}},
		"file is a folder":  {members: []member{{name: "f", kind: tar.TypeReg, text: "x"}, {name: "f/g", kind: tar.TypeReg, text: "y"}}, code: 2, says: "not a directory", inside: map[string]string{"f": "x"}},
		"folder again":      {members: []member{{name: "d/", kind: tar.TypeDir}, {name: "d/f", kind: tar.TypeReg, text: "x"}, {name: "d/", kind: tar.TypeDir}}, inside: map[string]string{"d/f": "x"}},
		"cut":               {members: []member{{name: "f", kind: tar.TypeReg, text: strings.Repeat("x", 100000)}}, cut: 50000, code: 2, says: "ends too early"},
		"name for a shell":  {members: []member{{name: "a\x1b[2J\nb", kind: tar.TypeReg, text: "x"}, {name: "a\x1b[2J\nb/c", kind: tar.TypeReg}}, code: 2, says: `"a\x1b[2J\nb/c"`, inside: map[string]string{"a\x1b[2J\nb": "x"}},
	} {
		t.Run(name, func(t *testing.T) {
			var archive bytes.Buffer
			w := tar.NewWriter(&archive)
			for _, m := range test.members {
				h := &tar.Header{Name: m.name, Linkname: m.link, Typeflag: m.kind, Mode: 0o755, Size: int64(len(m.text)), Uid: os.Geteuid(), Gid: os.Getegid()}
				if err := w.WriteHeader(h); err != nil {
					t.Fatal(err)
				}
				if _, err := io.WriteString(w, m.text); err != nil {
					t.Fatal(err)
				}
			}
			if err := w.Close(); err != nil {
				t.Fatal(err)
			}
			if test.cut > 0 {
				archive.Truncate(test.cut)
			}
			to := t.TempDir()
			_, stderr, code := run(t, "/", &archive, "tar", "-xmf", "-", "-C", to)
			if code != test.code || !strings.Contains(stderr, test.says) || strings.Contains(stderr, "\x1b") {
				t.Errorf("exit code %d: %q", code, stderr)
			}
			for name, want := range test.inside {
				path := filepath.Join(to, name)
				var got string
				if target, err := os.Readlink(path); err == nil {
					got = "-> " + target
				} else if text, err := os.ReadFile(path); err == nil {
					got = string(text)
				} else {
					got = err.Error()
				}
				if got != want {
					t.Errorf("%q is %q, want %q", name, got, want)
				}
			}
			if entries, err := os.ReadDir(outside); err != nil || len(entries) > 0 {
				t.Errorf("written outside: %v %v", entries, err)
			}
			if _, err := os.Lstat(filepath.Join(to, "../out")); err == nil {
				t.Error("written above")
			}
		})
	}
}

// What cannot be read or is gone does not stop the rest.
func TestCreateGoesOn(t *testing.T) {
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "f"), []byte("x"), 0o644); err != nil {
		t.Fatal(err)
	}
	if _, stderr, code := run(t, dir, nil, "tar", "cf", "-", "none"); code != 2 || !strings.Contains(stderr, "none: no such file") {
		t.Errorf("%d %s", code, stderr)
	}
	archive, stderr, code := run(t, dir, nil, "tar", "cf", "-", ".")
	var names []string
	for r := tar.NewReader(bytes.NewReader(archive)); ; {
		h, err := r.Next()
		if err != nil {
			break
		}
		names = append(names, h.Name)
	}
	if code != 0 || stderr != "" || !slices.Equal(names, []string{"./", "./f"}) {
		t.Errorf("%d %s %q", code, stderr, names)
	}
	for path, want := range map[string]string{"/a/b": "a/b", "../../a": "a", "a/../../b": "b", "/": ".", "..": ".", "a..b": "a..b", "/../": "."} {
		if got := memberName(path); got != want {
			t.Errorf("%q becomes %q, want %q", path, got, want)
		}
	}
}
