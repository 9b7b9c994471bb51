package node

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"time"

	"golang.org/x/sys/unix"
)

// killTimeout is how long a process may take to end after SIGKILL.
const killTimeout = 30 * time.Second

// process identifies a process. Its ID may be reused after its end, but not with its start time.
type process struct {
	PID int `json:"pid"`
	// StartTime is in clock ticks since boot, field 22 of proc(5)'s stat.
	StartTime string `json:"startTime"`
}

// identify returns the process that now has this ID.
func identify(pid int) (process, error) {
	startTime, _, err := readStat(pid)
	return process{pid, startTime}, err
}

// alive reports whether the process still runs. A zombie does not.
func (p process) alive() bool {
	startTime, state, err := readStat(p.PID)
	return err == nil && startTime == p.StartTime && state != "Z"
}

func readStat(pid int) (startTime, processState string, err error) {
	text, err := os.ReadFile(filepath.Join("/proc", strconv.Itoa(pid), "stat"))
	if err != nil {
		return "", "", err
	}
	// The second field is the name in parentheses. The name may contain spaces and parentheses.
	fields := bytes.Fields(text[bytes.LastIndexByte(text, ')')+1:])
	if len(fields) < 20 {
		return "", "", fmt.Errorf("/proc/%d/stat is too short", pid)
	}
	return string(fields[19]), string(fields[0]), nil
}

// stop ends the process with SIGTERM and, after the grace period, SIGKILL. With a grace period of zero it sends SIGKILL at
// once. It returns when the process is gone. If the process was gone before, it does nothing.
func (p process) stop(grace time.Duration) error {
	handle, err := unix.PidfdOpen(p.PID, 0)
	if errors.Is(err, unix.ESRCH) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("open process %d: %w", p.PID, err)
	}
	defer func() { _ = unix.Close(handle) }()
	if !p.alive() { // asked only now, because from here on the handle cannot mean another process
		return nil
	}
	if grace > 0 {
		if err := unix.PidfdSendSignal(handle, unix.SIGTERM, nil, 0); err != nil && !errors.Is(err, unix.ESRCH) {
			return fmt.Errorf("end process %d: %w", p.PID, err)
		}
		if ended, err := waitEnded(handle, grace); ended || err != nil {
			return err
		}
	}
	if err := unix.PidfdSendSignal(handle, unix.SIGKILL, nil, 0); err != nil && !errors.Is(err, unix.ESRCH) {
		return fmt.Errorf("kill process %d: %w", p.PID, err)
	}
	ended, err := waitEnded(handle, killTimeout)
	if err == nil && !ended {
		err = fmt.Errorf("process %d still runs %v after SIGKILL", p.PID, killTimeout)
	}
	return err
}

func waitEnded(handle int, limit time.Duration) (bool, error) {
	deadline := time.Now().Add(limit)
	for {
		left := max(time.Until(deadline), 0)
		ready, err := unix.Poll([]unix.PollFd{{Fd: int32(handle), Events: unix.POLLIN}}, int(left.Milliseconds()))
		if errors.Is(err, unix.EINTR) {
			continue
		}
		return ready > 0, err
	}
}

// startProcess runs a program, appends its output to its log, and records it. The program has its own session, so that an
// interrupt at the terminal does not reach it before Close ends it.
func (n *Node) startProcess(name, program string, args []string, inherited ...*os.File) error {
	if n.process(name).alive() {
		return fmt.Errorf("%s runs already", name)
	}
	if err := os.MkdirAll(n.path("log"), 0o755); err != nil {
		return err
	}
	log, err := os.OpenFile(n.LogPath(name), os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o644)
	if err != nil {
		return err
	}
	defer func() { _ = log.Close() }()
	command := exec.Command(program, args...)
	command.Dir = n.dir
	command.Stdout, command.Stderr = log, log
	command.ExtraFiles = inherited
	command.SysProcAttr = &unix.SysProcAttr{Setsid: true}
	// The PATH of a root shell may lack the sbin folders, where iptables is.
	command.Env = append(os.Environ(), "PATH="+n.state.Programs+":"+os.Getenv("PATH")+":/usr/local/sbin:/usr/sbin:/sbin")
	if err := command.Start(); err != nil {
		return fmt.Errorf("start %s: %w", name, err)
	}
	started, err := identify(command.Process.Pid)
	// Reaps the process when it ends. Its log shows how it ended.
	go func() { _ = command.Wait() }()
	if err != nil {
		return fmt.Errorf("%s ended at once; its log ends with:\n%s", name, n.logTail(name))
	}
	n.logf("%s runs as process %d", name, started.PID)
	n.mu.Lock()
	defer n.mu.Unlock()
	n.state.Processes[name] = started
	return n.save()
}

// stopProcess ends a recorded process and removes its record.
func (n *Node) stopProcess(name string, grace time.Duration) error {
	p := n.process(name)
	if p.PID == 0 {
		return nil
	}
	if err := p.stop(grace); err != nil {
		return fmt.Errorf("stop %s: %w", name, err)
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	delete(n.state.Processes, name)
	return n.save()
}

func (n *Node) process(name string) process {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.state.Processes[name]
}

// logTail returns the last lines of a log, for error messages.
func (n *Node) logTail(name string) string {
	text, err := os.ReadFile(n.LogPath(name))
	if err != nil {
		return err.Error()
	}
	lines := bytes.Split(bytes.TrimSpace(text), []byte("\n"))
	return string(bytes.Join(lines[max(0, len(lines)-15):], []byte("\n")))
}
