package upgrade

import (
	"encoding/json"
	"fmt"
	"io"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/streamshim/streamshim/internal/testutil"
	"github.com/streamshim/streamshim/test/internal/harness"
	"github.com/streamshim/streamshim/test/internal/node"
)

// written is what a program has written so far.
type written struct {
	mu   sync.Mutex
	text strings.Builder
}

func (w *written) Write(p []byte) (int, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.text.Write(p)
}

func (w *written) String() string {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.text.String()
}

// TestWatchGoesOn checks that an operator who watches a session goes on watching it when another program takes over, and that
// the session's user is told of it once.
func TestWatchGoesOn(t *testing.T) {
	first, second := build(t, "first"), build(t, "second")
	shim := harness.StartInstalled(t, "notify_watch = true\n", first)
	container := harness.RunContainer(t, node.ContainerSpec{})
	l := newLoad(t, shim, container)
	s := l.exec("SPDY", true, "sh")
	var shown written
	go io.Copy(&shown, s.out)
	admin := "unix://" + filepath.Join(shim.Folder, "admin.sock")
	id := ""
	testutil.Eventually(t, "the session", func() bool {
		text, err := harness.Command(t, first, "sessions", "list", "-o", "json", "--admin", admin).Output()
		var list struct {
			Sessions []struct {
				ID        string `json:"id"`
				Watchable bool   `json:"watchable"`
			} `json:"sessions"`
		}
		if err == nil {
			err = json.Unmarshal(text, &list)
		}
		if err != nil {
			t.Fatal(err)
		}
		if len(list.Sessions) == 1 && list.Sessions[0].Watchable {
			id = list.Sessions[0].ID
		}
		return id != ""
	})
	var out, remarks written
	watch := harness.Command(t, first, "sessions", "watch", id, "--admin", admin)
	watch.Stdout, watch.Stderr = &out, &remarks
	if err := watch.Start(); err != nil {
		t.Fatal(err)
	}
	lines := 0
	shows := func() { // shows what is typed, once the watcher is there
		t.Helper()
		testutil.Eventually(t, "what is typed is watched", func() bool {
			lines++
			fmt.Fprintf(s.in, "echo a$((%d * 3))b\n", lines)
			return strings.Contains(out.String(), fmt.Sprintf("a%db", lines*3)) || lines > 1 && strings.Contains(out.String(), fmt.Sprintf("a%db", (lines-1)*3))
		})
	}
	shows()
	for i := range 3 {
		shim.Install(t, []string{second, first}[i%2])
		if out, err := shim.Upgrade(t); err != nil {
			t.Fatalf("%v: %s", err, out)
		}
		lines += 10 // so that nothing that was shown before is taken for it
		shows()
	}
	io.WriteString(s.in, "exit 3\n")
	if err := s.wantExit(3); err != nil {
		t.Error(err)
	}
	if n := strings.Count(shown.String(), "an operator of this node is watching this session"); n != 1 {
		t.Errorf("the user was told %d times: %s", n, shown.String())
	}
	if err := watch.Wait(); err != nil {
		t.Errorf("the watch: %v: %s", err, remarks.String())
	}
	if n := strings.Count(remarks.String(), "the watch was interrupted by a hand-over"); n != 3 {
		t.Errorf("%d hand-overs are told of, of 3: %s", n, remarks.String())
	}
	close(l.stop)
}
