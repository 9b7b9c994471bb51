package operations

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// TestNothingIsShownUnrecorded checks that on a full disk nobody sees what is not recorded. A command whose output was held
// back has not succeeded, even if it has written everything into its pipe and exited with 0.
func TestNothingIsShownUnrecorded(t *testing.T) {
	config := strings.Replace(operatedConfig, "non_tty = true", "non_tty = true\non_failure = \"deny\"", 1)
	o := start(t, "unrec", config)
	o.check()
	directory := filepath.Join(o.dir, "recordings")
	if err := os.Mkdir(directory, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount("tmpfs", directory, "tmpfs", 0, "size=32k,mode=0700"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(directory, unix.MNT_DETACH); err != nil {
			t.Error(err)
		}
	})

	complete := o.exec("web", false, "echo", "fits")
	complete.in.Close()
	if err := complete.end(t); err != nil || complete.out.String() != "fits\n" {
		t.Errorf("with room on the disk: %q, %v", complete.out, err)
	}
	const amount = 60000 // a pipe accepts it at once
	cut := o.exec("web", false, "sh", "-c", "head -c 60000 /dev/zero | tr '\\0' y")
	cut.in.Close()
	err := cut.end(t)
	if err == nil || !strings.Contains(err.Error(), "could not be recorded") {
		t.Errorf("the session ends with %v", err)
	}
	files, globErr := filepath.Glob(filepath.Join(directory, "*.cast"))
	if globErr != nil {
		t.Fatal(globErr)
	}
	recorded := 0
	for _, file := range files {
		text, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		recorded += strings.Count(string(text), "y")
	}
	if shown := strings.Count(cut.out.String(), "y"); shown > recorded || shown == amount {
		t.Errorf("%d bytes were shown, and %d recorded", shown, recorded)
	}
}
