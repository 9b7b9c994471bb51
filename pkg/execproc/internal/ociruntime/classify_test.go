package ociruntime

import (
	"errors"
	"strings"
	"testing"
)

// TestClassify checks what runtimes report when they do not start a command.
func TestClassify(t *testing.T) {
	const runcPrefix = "exec failed: unable to start container process: "
	for _, test := range []struct {
		reason string
		code   int // 0: not the command's fault
		text   string
		is     error
	}{
		{runcPrefix + `exec: "nope": executable file not found in $PATH`, 127, `exec: "nope": executable file not found in $PATH`, nil},
		{runcPrefix + `exec: "/x": stat /x: no such file or directory`, 127, `exec: "/x": stat /x: no such file or directory`, nil},
		{runcPrefix + `exec: "/etc": is a directory`, 126, `exec: "/etc": is a directory`, nil},
		{runcPrefix + `exec: "/etc/passwd/x": stat /etc/passwd/x: not a directory`, 126, `exec: "/etc/passwd/x": stat /etc/passwd/x: not a directory`, nil},
		{runcPrefix + `exec: "/x": permission denied`, 126, `exec: "/x": permission denied`, nil},
		{"exec /x: exec format error", 126, "exec /x: exec format error", nil},
		{"executable file `nope` not found in $PATH: No such file or directory", 127, "", nil},
		{"exec container process `/x`: Exec format error", 126, "", nil},
		{runcPrefix + `chdir to cwd ("/nope") set in config.json failed: no such file or directory`, 0, "", nil},
		{runcPrefix + "open /proc/self/attr/exec: permission denied", 0, "", nil},
		{"exec failed: container does not exist", 0, "", ErrNotRunning},
		{"exec failed: cannot exec in a stopped container", 0, "", ErrNotRunning},
		{"exec failed: cannot exec in a paused container (use --ignore-paused to override)", 0, "paused", ErrNotRunning},
		{"", 0, "no reason", nil},
		{"two\nlines\x1b[31m", 0, "two lines", nil},
	} {
		err := classify(test.reason)
		var start *StartError
		if errors.As(err, &start) != (test.code != 0) || (start != nil && start.ExitCode() != test.code) {
			t.Errorf("%q: %#v", test.reason, err)
		}
		if !strings.Contains(err.Error(), test.text) || (start != nil && test.text != "" && err.Error() != test.text) {
			t.Errorf("%q: %q", test.reason, err)
		}
		if errors.Is(err, ErrNotRunning) != (test.is != nil) {
			t.Errorf("%q: %v", test.reason, err)
		}
	}
}

func FuzzRuntimeLog(f *testing.F) {
	f.Add(`{"level":"error","msg":"exec failed: exec: \"x\": is a directory","time":"t"}` + "\n")
	f.Add("{\"level\":\"info\",\"msg\":\"a\"}\n{\"msg\":\"b\\nc\"}\nnot json")
	f.Fuzz(func(t *testing.T, log string) {
		err := classify(lastError([]byte(log)))
		if text := err.Error(); text == "" || strings.ContainsAny(text, "\n\r\x00\x1b") || len(text) > maxReason+100 {
			t.Errorf("%q", text)
		}
	})
}

// TestMissingCommandIsKnown checks that a helper may replace a command that does not exist, but not one that exists and
// does not work.
func TestMissingCommandIsKnown(t *testing.T) {
	for reason, want := range map[string]bool{
		`exec: "tar": executable file not found in $PATH`:                     true,
		"executable file `tar` not found in $PATH: No such file or directory": true,
		`exec: "/bin/tar": stat /bin/tar: no such file or directory`:          false,
		`exec /bin/missing-interpreter: no such file or directory`:            false,
		`exec: "tar": permission denied`:                                      false,
	} {
		var start *StartError
		if err := classify(reason); !errors.As(err, &start) || start.Missing != want {
			t.Errorf("%s: %v", reason, err)
		}
	}
}
