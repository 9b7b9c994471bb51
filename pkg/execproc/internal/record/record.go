// Package record stores recovery records: what a program must know about the commands of a predecessor that was
// killed.
package record

import (
	"bytes"
	"encoding/json"
	"fmt"
	"os"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/streamshim/streamshim/pkg/execproc/internal/ociruntime"
	"github.com/streamshim/streamshim/pkg/execproc/internal/proc"
)

// Record is what a successor must know about a command if this process is killed. It is one small file in the
// state directory, removed when the command ends. It is written twice: before the start, when there is no pid yet,
// and once the command is known, then in place, so that a full disk cannot prevent it. In between, what was
// started is found by what the runtime left and by the command's pipes. When the command's tree is being ended,
// the record says so and stays until that is done, whether or not the command itself still lives.
type Record struct {
	Container string   `json:"container"`
	InitPid   int      `json:"initPid"`
	InitStart uint64   `json:"initStart,omitempty"` // in the unit of Start
	Pid       int      `json:"pid,omitempty"`
	Start     uint64   `json:"start,omitempty"` // clock ticks since boot, /proc/PID/stat
	Since     uint64   `json:"since,omitempty"` // without a pid: earliest start of what was started
	Pipes     []string `json:"pipes,omitempty"` // see tree.StreamEnds
	Ending    bool     `json:"ending,omitempty"`
	Boot      string   `json:"boot"`
	Policy    Policy   `json:"policy"`
}

// recordSize is the minimum size of a record's file in bytes, padded with blanks. A record with a pid fits in it.
const recordSize = 4 << 10

// Begin writes the record of a command that is about to be started. It returns the locked file, to be closed when
// the runtime has ended. The process that is forked to become the runtime inherits the descriptor, and execve
// closes it there. So the lock tells a successor of a process that does not look like a runtime yet.
func (r Record) Begin(path string) (*os.File, error) {
	if err := r.Write(path); err != nil {
		return nil, err
	}
	file, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		return nil, err
	}
	if err := unix.Flock(int(file.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		file.Close()
		return nil, fmt.Errorf("lock: %w", err)
	}
	return file, nil
}

// Complete overwrites the record that Begin wrote. It is a single write within a page: a process killed meanwhile
// leaves one or the other.
func (r Record) Complete(intent *os.File) error {
	data, err := r.encode()
	if err != nil {
		return err
	}
	_, err = intent.WriteAt(data, 0)
	return err
}

// AwaitExecve waits until every process that was forked to become the start's runtime has executed it, but no
// longer than the deadline or until cut is closed.
func AwaitExecve(recordFile string, deadline time.Time, cut <-chan struct{}) {
	file, err := os.Open(recordFile)
	if err != nil {
		return
	}
	defer file.Close()
	for unix.Flock(int(file.Fd()), unix.LOCK_EX|unix.LOCK_NB) == unix.EWOULDBLOCK && time.Now().Before(deadline) {
		select {
		case <-cut:
			return
		case <-time.After(5 * time.Millisecond): // flock(2) itself has no deadline
		}
	}
}

func (r Record) encode() ([]byte, error) {
	data, err := json.Marshal(r)
	if err != nil {
		return nil, fmt.Errorf("encode recovery record: %w", err)
	}
	if blanks := recordSize - len(data); blanks > 0 {
		data = append(data, bytes.Repeat([]byte{' '}, blanks)...)
	}
	return data, nil
}

// Write replaces the file as a whole: a process killed meanwhile leaves the old one.
func (r Record) Write(path string) error {
	data, err := r.encode()
	if err != nil {
		return err
	}
	unfinished := ociruntime.UnfinishedFile(path)
	err = os.WriteFile(unfinished, data, 0o600)
	if err == nil {
		err = os.Rename(unfinished, path)
	}
	if err != nil {
		os.Remove(unfinished)
	}
	return err
}

// Parse parses the contents of a record's file.
func Parse(data []byte) (Record, error) {
	var found Record
	if err := json.Unmarshal(data, &found); err != nil {
		return Record{}, fmt.Errorf("recovery record: %w", err)
	}
	if found.Pid < 0 || found.Pid == 1 || found.Pid == 0 && found.Since == 0 {
		return Record{}, fmt.Errorf("recovery record: no pid")
	}
	return found, nil
}

// OwnerOf returns the process that owns a file of the state directory, from its name: PID-START-NUMBER.ending,
// with a leading dot while runc was writing it.
func OwnerOf(name string) (proc.Identity, bool) {
	base, _, hasEnding := strings.Cut(strings.TrimPrefix(name, "."), ".")
	parts := strings.Split(base, "-")
	if !hasEnding || len(parts) != 3 {
		return proc.Identity{}, false
	}
	pid, err := strconv.Atoi(parts[0])
	if err != nil || pid <= 0 {
		return proc.Identity{}, false
	}
	start, err := strconv.ParseUint(parts[1], 10, 64)
	return proc.Identity{Pid: pid, Start: start}, err == nil
}

// NumberOf returns the NUMBER in a file name as in OwnerOf, or 0.
func NumberOf(name string) uint64 {
	base, _, _ := strings.Cut(strings.TrimPrefix(name, "."), ".")
	number, err := strconv.ParseUint(base[strings.LastIndexByte(base, '-')+1:], 10, 64)
	if err != nil {
		return 0
	}
	return number
}

// Policy says what becomes of a process when its client has gone.
type Policy string
