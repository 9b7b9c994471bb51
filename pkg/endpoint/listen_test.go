package endpoint

import (
	"errors"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
)

// socketDir is a directory with a path short enough for a socket in it.
func socketDir(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "sock")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

func TestListenCreatesPrivateSocketAndRemovesIt(t *testing.T) {
	path := filepath.Join(socketDir(t), "new", "folder", "s.sock")
	listener, err := Listen(path)
	if err != nil {
		t.Fatal(err)
	}
	info, err := os.Lstat(path)
	if err != nil {
		t.Fatal(err)
	}
	if info.Mode() != fs.ModeSocket|0o600 {
		t.Errorf("mode %v, want a socket with 0600", info.Mode())
	}
	if folder, err := os.Stat(filepath.Dir(path)); err != nil || folder.Mode().Perm() != 0o700 {
		t.Errorf("its folder: %v, %v; want 0700", folder, err)
	}
	if err := listener.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Lstat(path); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("after Close the socket is still there: %v", err)
	}
	entries, err := os.ReadDir(filepath.Dir(path))
	if err != nil || len(entries) != 0 {
		t.Errorf("Close left %v (%v)", entries, err)
	}
}

func TestListenReplacesStaleSocket(t *testing.T) {
	path := filepath.Join(socketDir(t), "s.sock")
	stale, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	stale.SetUnlinkOnClose(false)
	stale.Close()
	listener, err := Listen(path)
	if err != nil {
		t.Fatal(err)
	}
	defer listener.Close()
	conn, err := net.Dial("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	conn.Close()
}

func TestListenRefuses(t *testing.T) {
	dir := socketDir(t)
	live := filepath.Join(dir, "live.sock")
	listener, err := net.Listen("unix", live)
	if err != nil {
		t.Fatal(err)
	}
	defer listener.Close()
	file := filepath.Join(dir, "file")
	if err := os.WriteFile(file, []byte("keep me"), 0o600); err != nil {
		t.Fatal(err)
	}
	link := filepath.Join(dir, "link")
	if err := os.Symlink(file, link); err != nil {
		t.Fatal(err)
	}
	for _, test := range []struct{ name, path, want string }{
		{"live socket", live, "another process is serving this socket"},
		{"file", file, "is no socket"},
		{"symbolic link", link, "is no socket"},
		{"directory", dir, "is no socket"},
		{"relative path", "s.sock", "must be absolute"},
		{"long path", filepath.Join(dir, strings.Repeat("x", 108)), "a Unix socket's may have 107"},
	} {
		t.Run(test.name, func(t *testing.T) {
			got, err := Listen(test.path)
			if err == nil {
				got.Close()
			}
			if err == nil || !strings.Contains(err.Error(), test.want) || !strings.Contains(err.Error(), test.path) {
				t.Errorf("got %v, want %q", err, test.want)
			}
		})
	}
	if text, err := os.ReadFile(file); err != nil || string(text) != "keep me" {
		t.Errorf("the file is now %q, %v", text, err)
	}
}

// Without the lock, one start removes the socket another has just made.
func TestListenAtOnceHasOneWinner(t *testing.T) {
	for range 20 {
		path := filepath.Join(socketDir(t), "s.sock")
		stale, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
		if err != nil {
			t.Fatal(err)
		}
		stale.SetUnlinkOnClose(false)
		stale.Close()

		var wg sync.WaitGroup
		won := make(chan net.Listener, 8)
		for range cap(won) {
			wg.Go(func() {
				if listener, err := Listen(path); err == nil {
					won <- listener
				}
			})
		}
		wg.Wait()
		close(won)
		if len(won) != 1 {
			t.Errorf("%d of %d starts got the socket", len(won), cap(won))
		}
		for listener := range won {
			listener.Close()
		}
	}
}

func TestListenCloseLeavesASuccessorsSocket(t *testing.T) {
	path := filepath.Join(socketDir(t), "s.sock")
	first, err := Listen(path)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	second, err := Listen(path)
	if err != nil {
		t.Fatal(err)
	}
	defer second.Close()
	if err := first.Close(); err != nil {
		t.Fatal(err)
	}
	conn, err := net.Dial("unix", path)
	if err != nil {
		t.Fatalf("the first listener's Close took the second's socket: %v", err)
	}
	conn.Close()
}

// A listener that was taken over removes its socket when it is closed, as the one that opened it would have, and one
// whose socket is another's is not taken over.
func TestAdopt(t *testing.T) {
	path := filepath.Join(t.TempDir(), "s.sock")
	first, err := Listen(path)
	if err != nil {
		t.Fatal(err)
	}
	place, err := PlaceOf(first)
	if err != nil {
		t.Fatal(err)
	}
	file, err := first.(*socketListener).File()
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	inherit := func() net.Listener {
		inherited, err := net.FileListener(file)
		if err != nil {
			t.Fatal(err)
		}
		return inherited
	}
	adopted, err := Adopt(inherit(), place)
	if err != nil {
		t.Fatal(err)
	}
	if again, err := PlaceOf(adopted); again != place || err != nil {
		t.Errorf("place %v, %v; want %v", again, err, place)
	}
	conn, err := net.Dial("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	conn.Close()
	first.(*socketListener).UnixListener.Close()
	adopted.Close()
	if _, err := os.Lstat(path); err == nil {
		t.Error("the socket was left behind")
	}
	inherited := inherit()
	defer inherited.Close()
	if _, err := Adopt(inherited, place); err == nil {
		t.Error("a socket that is gone was taken over")
	}
	other, err := Listen(path)
	if err != nil {
		t.Fatal(err)
	}
	defer other.Close()
	if _, err := Adopt(inherited, place); err == nil {
		t.Error("somebody else's socket was taken over")
	}
}
