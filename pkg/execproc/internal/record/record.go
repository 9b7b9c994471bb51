// Package record is the recovery records: what a program must know of the commands of one that was killed.
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

// Record is what a successor must know of a command, should this process be killed. It is one small file in
// the state directory, removed when the command ends. It is written twice: before the start, when there is no
// pid yet, and once the command is known, then into the room of the first, so that a full disk cannot prevent it.
// Between the two, what was started is found by what the runtime left and by the command's pipes. When the command's
// tree is to be ended, the record says so and stays until that is done, whether the command itself lives or not.
type Record struct {
	Container string   `json:"container"`
	InitPid   int      `json:"initPid"`
	InitStart uint64   `json:"initStart,omitempty"` // as Start
	Pid       int      `json:"pid,omitempty"`
	Start     uint64   `json:"start,omitempty"` // clock ticks since boot, /proc/PID/stat
	Since     uint64   `json:"since,omitempty"` // without a pid: what was started is not older
	Pipes     []string `json:"pipes,omitempty"` // as in tree.StreamEnds
	Ending    bool     `json:"ending,omitempty"`
	Boot      string   `json:"boot"`
	Policy    Policy   `json:"policy"`
}

// recordSize is the least size of a record's file, in bytes, the rest being blanks: a record with a pid fits in.
const recordSize = 4 << 10

// Begin writes the record of a command that is about to be started. It returns the file, locked, to be closed
// when the runtime has ended: as each descriptor it is copied into the process that is forked to become
// the runtime, and closed there by execve, so that the lock tells a successor of a process that does not look like
// a runtime yet.
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

// Complete writes the record in place of what begin has written. It is one write within a page: whoever is killed
// meanwhile leaves the one or the other.
func (r Record) Complete(intent *os.File) error {
	data, err := r.encode()
	if err != nil {
		return err
	}
	_, err = intent.WriteAt(data, 0)
	return err
}

// AwaitExecve waits until no process is left that was forked to become the start's runtime and has not
// executed it, at most until the deadline or until the channel is closed.
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
		case <-time.After(5 * time.Millisecond): // flock(2) itself waits without a deadline
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

// Write replaces the file as a whole: whoever is killed meanwhile leaves the old one.
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

// Parse reads a record's file.
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

// OwnerOf reads which process a file of the state directory belongs to: PID-START-NUMBER.ending, with a
// dot in front where runc was writing it.
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

// NumberOf is the NUMBER in a name that ownerOf has read, 0 if it is none.
func NumberOf(name string) uint64 {
	base, _, _ := strings.Cut(strings.TrimPrefix(name, "."), ".")
	number, err := strconv.ParseUint(base[strings.LastIndexByte(base, '-')+1:], 10, 64)
	if err != nil {
		return 0
	}
	return number
}

// Policy says what becomes of a process whose client has gone.
type Policy string
