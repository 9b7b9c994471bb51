package recording

import (
	"errors"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/streamshim/streamshim/pkg/session"
	"github.com/streamshim/streamshim/pkg/workload"
)

// What names say is what was recorded, newest first; nothing else in the directory is listed or opened.
func TestFiles(t *testing.T) {
	dir := t.TempDir()
	var names []string
	for n, pod := range []string{"old", "new"} {
		s := &session.Session{ID: "0123abcd", Start: time.Date(2026, 11, 27, 12, n, 0, 0, time.UTC), Info: session.Info{
			Target: workload.Target{PodNamespace: "shop", PodName: pod, ContainerName: "app"},
		}}
		names = append(names, fileName(s))
	}
	outside := filepath.Join(t.TempDir(), names[0])
	for _, path := range []string{outside, filepath.Join(dir, names[0]), filepath.Join(dir, names[1]), filepath.Join(dir, "notes.cast"), filepath.Join(dir, "x")} {
		if err := os.WriteFile(path, []byte("12345"), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	link := "20261127T130000.000Z_shop_link_app_77.cast"
	if err := os.Symlink(outside, filepath.Join(dir, link)); err != nil {
		t.Fatal(err)
	}
	files, err := Files(dir)
	if err != nil || len(files) != 2 || files[0].Pod != "new" || files[1].Pod != "old" {
		t.Fatalf("%+v, %v", files, err)
	}
	if f := files[0]; f.Name != names[1] || f.Namespace != "shop" || f.Container != "app" || f.SessionID != "0123abcd" || f.Size != 5 || f.Started.Minute() != 1 {
		t.Errorf("%+v", f)
	}
	if file, err := Open(dir, names[0]); err != nil {
		t.Error(err)
	} else {
		file.Close()
	}
	for _, name := range []string{"", "x", "notes.cast", "../" + filepath.Base(dir) + "/" + names[0], "20261127T120000.000Z_a_b_c_d.cast"} {
		if _, err := Open(dir, name); !errors.Is(err, ErrNoRecording) {
			t.Errorf("%q: %v", name, err)
		}
	}
	if file, err := Open(dir, link); err == nil {
		file.Close()
		t.Error("a link out of the directory was opened")
	}
	if files, err := Files(filepath.Join(dir, "none")); err != nil || files != nil {
		t.Errorf("%v, %v", files, err)
	}
}
