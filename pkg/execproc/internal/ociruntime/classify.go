package ociruntime

import (
	"encoding/json"
	"errors"
	"fmt"
	"regexp"
	"strings"
)

// maxReason bounds how many bytes of a runtime's message are shown.
const maxReason = 1 << 10

// lastError returns the last error in a runtime's --log file of JSON lines, or "".
func lastError(log []byte) string {
	last := ""
	for line := range strings.Lines(string(log)) {
		var entry struct {
			Level string `json:"level"`
			Msg   string `json:"msg"`
		}
		if json.Unmarshal([]byte(line), &entry) == nil && entry.Msg != "" {
			switch entry.Level {
			case "error", "fatal", "panic", "":
				last = entry.Msg
			}
		}
	}
	return last
}

// oneLine makes a runtime's message fit one line: without control characters and of bounded length.
func oneLine(text string) string {
	text = strings.Join(strings.FieldsFunc(text, func(r rune) bool { return r < ' ' || r == 0x7f }), " ")
	text = strings.ToValidUTF8(strings.TrimSpace(text), "?")
	if len(text) > maxReason {
		text = strings.ToValidUTF8(text[:maxReason], "") + "..."
	}
	return text
}

// aboutCommand matches the part of a reason that concerns the command's execution: runc's `exec: "nope":
// executable file not found in $PATH` and `exec /bin/x: exec format error`, crun's "executable file `nope` not
// found in $PATH: No such file or directory" and "exec container process `/bin/x`: Exec format error", youki's
// `executable 'nope' for the ...`.
var aboutCommand = regexp.MustCompile("(?i)(exec: \"|exec /|executable (file )?[`'\"]|exec container process ).*$")

// classify turns a runtime's reason for not starting a command into an error. Anything that is not clearly about
// the command itself is an internal error: an exit code would blame the command.
func classify(reason string) error {
	reason = oneLine(reason)
	lower := strings.ToLower(reason)
	has := func(parts ...string) bool {
		for _, part := range parts {
			if strings.Contains(lower, part) {
				return true
			}
		}
		return false
	}
	if has("paused container", "container is paused") {
		return fmt.Errorf("%w: it is paused", ErrNotRunning)
	}
	if has("stopped container", "container does not exist", "container not running", "container is not running",
		"does not exist: container", "container is stopped", "is not in running state") {
		return fmt.Errorf("%w: %s", ErrNotRunning, reason)
	}
	if message := aboutCommand.FindString(reason); message != "" {
		switch {
		case has("not found in $path", "no such file or directory", "executable file not found", "not found"):
			return &StartError{Code: exitNotFound, Message: message, Missing: has("not found in $path")}
		case has("permission denied", "is a directory", "not a directory", "exec format error", "not executable", "invalid executable"):
			return &StartError{Code: exitNotExecutable, Message: message}
		}
	}
	if reason == "" {
		reason = "it gave no reason"
	}
	return fmt.Errorf("the OCI runtime could not start the command: %s", reason)
}

// Exit codes of commands that could not be executed, as in shells (POSIX, Shell Command Language, 2.8.2).
const (
	exitNotExecutable = 126
	exitNotFound      = 127
)

// StartError reports a command that could not be executed although its container is fine.
type StartError struct {
	Code    int // 127 if the command was not found, 126 if it is not executable
	Message string

	Missing bool // no directory in the container's $PATH has the command
}

// Error returns one line for the user, such as `exec: "foo": executable file not found in $PATH`.
func (e *StartError) Error() string { return e.Message }

// ExitCode returns the exit code to report for a command that did not start.
func (e *StartError) ExitCode() int { return e.Code }

// ErrNotRunning is wrapped by the error of a start in a container that has ended, is paused, or is unknown to its
// runtime.
var ErrNotRunning = errors.New("container is not running")
