package check

import (
	"bytes"
	"fmt"
	"net"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"

	"github.com/streamshim/streamshim/pkg/config"
	"github.com/streamshim/streamshim/pkg/endpoint"
	"github.com/streamshim/streamshim/pkg/handover"
)

// running checks whether the running streamshim is the installed one.
func running(c config.Config) Result {
	const name = "running version"
	pid, err := servedBy(c.Listen)
	if err != nil {
		return ok(name, "none runs")
	}
	installed, err := os.Executable()
	if err != nil {
		installed = "/proc/self/exe"
	}
	if started := startedAs(pid); started != "" {
		installed = started
	}
	same, err := handover.SameProgram(fmt.Sprintf("/proc/%d/exe", pid), installed)
	switch {
	case err != nil:
		return warning(name, "see which program it is with ps(1)", "whether process %d is what is installed cannot be told: %v", pid, err)
	case !same:
		return warning(name, "run \"streamshim upgrade\": the installed one takes over, with all sessions",
			"process %d is another build than %s, which is installed", pid, installed)
	}
	return ok(name, "process %d is what is installed", pid)
}

// servedBy returns the pid of the process that listens on a Unix socket.
func servedBy(address string) (int, error) {
	path, err := endpoint.Path(address)
	if err != nil {
		return 0, err
	}
	conn, err := net.DialTimeout("unix", path, callTimeout)
	if err != nil {
		return 0, err
	}
	defer conn.Close() //nolint:errcheck // nothing was sent
	raw, err := conn.(*net.UnixConn).SyscallConn()
	if err != nil {
		return 0, err
	}
	var peer *unix.Ucred
	var fault error
	if err := raw.Control(func(fd uintptr) { peer, fault = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED) }); err != nil {
		return 0, err
	}
	if fault != nil {
		return 0, fault
	}
	return int(peer.Pid), nil
}

// startedAs returns the path by which a process was started, or "" if it is unknown.
func startedAs(pid int) string {
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid))
	path, _, _ := bytes.Cut(text, []byte{0})
	if err != nil || !filepath.IsAbs(string(path)) {
		return ""
	}
	return string(path)
}
