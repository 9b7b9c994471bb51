// Package helper is what runs inside a container that has no tar of its own, so that "kubectl cp" works there: the
// two commands of kubectl cp that carry files, and the one by which it asks whether its destination is a directory.
// It runs as the command would have, with its identity and inside its container, and so can do nothing that the
// command could not.
package helper

import (
	"fmt"
	"io"
	"os"
	"slices"
	"strconv"
)

// Command is the first argument that makes the program be a helper: Main gets what follows.
const Command = "container-helper"

// Tar is the name of the helper, as in exec.helpers.
const Tar = "tar"

// task is one of kubectl's commands.
type task struct {
	create    string // archive this path on stdout
	extract   bool   // take an archive from stdin
	folder    string // change into it before, where not empty
	ownRights bool   // as the umask and the user say, not as the archive does
	isFolder  string // say whether this is a directory
}

// parse reads the commands that kubectl cp sends (k8s.io/kubectl/pkg/cmd/cp, 1.20 to 1.37), and no others: what people
// write may want any of tar's options.
func parse(args []string) (t task, ok bool) {
	switch {
	case len(args) == 3 && args[0] == "test" && args[1] == "-d":
		return task{isFolder: args[2]}, true
	case len(args) == 4 && args[0] == "tar" && args[1] == "cf" && args[2] == "-" && args[3] != "" && args[3][0] != '-':
		return task{create: args[3]}, true
	}
	rest, ok := cutPrefix(args, "tar")
	if !ok {
		return task{}, false
	}
	if without, ok := cutPrefix(rest, "--no-same-permissions", "--no-same-owner"); ok {
		t.ownRights, rest = true, without
	}
	if rest, ok = cutPrefix(rest, "-xmf", "-"); !ok {
		return task{}, false
	}
	t.extract = true
	if in, ok := cutPrefix(rest, "-C"); ok && len(in) == 1 && in[0] != "" {
		t.folder, rest = in[0], nil
	}
	return t, len(rest) == 0
}

func cutPrefix(args []string, prefix ...string) ([]string, bool) {
	if len(args) < len(prefix) || !slices.Equal(args[:len(prefix)], prefix) {
		return nil, false
	}
	return args[len(prefix):], true
}

// Serves tells whether a helper can stand in for the command.
func Serves(args []string) bool {
	_, ok := parse(args)
	return ok
}

// Program is the descriptor that the process has of its own program.
const Program = 3

// Main does what the command says and returns its exit code: that of tar, 2 when something failed, or of test.
func Main(args []string, stdin io.Reader, stdout, stderr io.Writer) int {
	t, ok := parse(args)
	if !ok {
		fmt.Fprintln(stderr, "streamshim's tar does what kubectl cp asks for and nothing else")
		return 2
	}
	r := &report{to: stderr}
	switch {
	case t.isFolder != "":
		if info, err := os.Stat(t.isFolder); err != nil || !info.IsDir() {
			return 1
		}
		return 0
	case t.create != "":
		r.note(create(t.create, stdout, r))
	case t.extract:
		r.note(extract(t, stdin, r))
	}
	if r.failed {
		fmt.Fprintln(stderr, "tar: Exiting with failure status due to previous errors")
		return 2
	}
	return 0
}

// report tells of what went wrong, file by file, and goes on as tar does.
type report struct {
	to     io.Writer
	failed bool
}

func (r *report) note(err error) {
	if err != nil {
		r.failed = true
		fmt.Fprintf(r.to, "tar: %s\n", err)
	}
}

// about is an error of one file. Its name may have anything in it.
func about(name string, err error) error {
	if err == nil {
		return nil
	}
	if quoted := strconv.Quote(name); quoted != `"`+name+`"` {
		name = quoted
	}
	return fmt.Errorf("%s: %w", name, err)
}
