package check

import (
	"cmp"
	"context"
	"os/exec"
	"regexp"
	"strconv"
	"strings"

	"github.com/streamshim/streamshim/pkg/config"
)

// runcVersion is a release of runc.
type runcVersion struct{ major, minor, patch int }

var (
	// minimumRunc is the first version with all options and error messages that streamshim relies on.
	minimumRunc = runcVersion{1, 1, 0}
	// safeRunc is the first version whose exec does not leak a descriptor of the host to the command
	// (CVE-2024-21626).
	safeRunc = runcVersion{1, 1, 12}
)

func (v runcVersion) before(w runcVersion) bool {
	return cmp.Or(cmp.Compare(v.major, w.major), cmp.Compare(v.minor, w.minor), cmp.Compare(v.patch, w.patch)) < 0
}

func (v runcVersion) String() string {
	return strconv.Itoa(v.major) + "." + strconv.Itoa(v.minor) + "." + strconv.Itoa(v.patch)
}

// patchedByDebian matches the second line of "runc --version" of Debian 12's runc with the fix, which it has had since
// its first security update. The first line still says 1.1.5.
var patchedByDebian = regexp.MustCompile(`(?m)^commit: 1\.1\.5\+ds1-1\+deb12u[1-9]`)

var runcLine = regexp.MustCompile(`^runc version v?(\d+)\.(\d+)\.(\d+)`)

// parseRuncVersion parses the first line of "runc --version". ok is false for other runtimes.
func parseRuncVersion(line string) (v runcVersion, ok bool) {
	match := runcLine.FindStringSubmatch(line)
	if match == nil {
		return v, false
	}
	for i, number := range []*int{&v.major, &v.minor, &v.patch} {
		n, err := strconv.Atoi(match[i+1])
		if err != nil {
			return v, false // longer than any version
		}
		*number = n
	}
	return v, true
}

// ociRuntime checks the version of the default OCI runtime. A container may use another one.
func ociRuntime(ctx context.Context, c config.Config) Result {
	const name = "OCI runtime"
	binary := c.Runtime.Binary
	if binary == "" {
		binary = "runc"
	}
	path, err := exec.LookPath(binary)
	if err != nil {
		return warning(name, "install runc, or name the runtime's binary with the key runtime.binary; harmless when the containers' "+
			"runtime handlers name another one", "%v", err)
	}
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	out, err := exec.CommandContext(ctx, path, "--version").Output() //nolint:gosec // the operator names it
	if err != nil {
		return failed(name, "reinstall "+path, "%s --version: %v", path, err)
	}
	first, rest, _ := strings.Cut(string(out), "\n")
	if version, isRunc := parseRuncVersion(first); isRunc {
		switch {
		case version.before(minimumRunc):
			return failed(name, "install runc "+safeRunc.String()+" or later", "%s (%s) is older than %s", first, path, minimumRunc)
		case version.before(safeRunc) && patchedByDebian.MatchString(rest):
			return ok(name, "%s (%s), in which Debian has fixed CVE-2024-21626", first, path)
		case version.before(safeRunc):
			return warning(name, "install runc "+safeRunc.String()+" or later", "%s (%s): a container can escape at exec (CVE-2024-21626)", first, path)
		}
	}
	return ok(name, "%s (%s)", first, path)
}
