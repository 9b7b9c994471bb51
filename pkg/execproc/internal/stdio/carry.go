package stdio

import (
	"io"
	"math"
	"os"
	"strconv"
	"syscall"

	"github.com/streamshim/streamshim/pkg/handover"
)

// Duplicates holds duplicates of a process's streams.
type Duplicates struct {
	files *handover.Files
	of    map[Pollable]handover.Descriptor
}

// Pollable is a stream with a descriptor.
type Pollable interface {
	io.ReadCloser
	syscall.Conn
}

// NewDuplicates returns an empty set whose duplicates go to files.
func NewDuplicates(files *handover.Files) *Duplicates {
	return &Duplicates{files: files, of: map[Pollable]handover.Descriptor{}}
}

// Add duplicates a stream, given its file. It skips one that was closed.
func (d *Duplicates) Add(stream Pollable, file *os.File) error {
	if hasClosed(file) {
		return nil
	}
	kept, err := d.files.Keep(file)
	if err != nil && hasClosed(file) {
		return nil
	}
	if err == nil {
		d.of[stream] = kept
	}
	return err
}

// Descriptor returns a stream's duplicate. If the stream was closed after duplication, it closes the duplicate and
// returns 0.
func (d *Duplicates) Descriptor(stream Pollable, file *os.File) handover.Descriptor {
	kept := d.of[stream]
	if kept != 0 && hasClosed(file) {
		closeKept(d.files, kept)
		return 0
	}
	return kept
}

// Close closes the duplicates.
func (d *Duplicates) Close() {
	for _, kept := range d.of {
		closeKept(d.files, kept)
	}
}

func closeKept(files *handover.Files, d handover.Descriptor) {
	if file, err := files.Take(d, "not needed"); err == nil {
		file.Close()
	}
}

// hasClosed reports whether this program closed a file.
func hasClosed(file *os.File) bool {
	raw, err := file.SyscallConn()
	return err != nil || raw.Control(func(uintptr) {}) != nil // nothing else can fail
}

// Taken holds files taken from those handed over. It stops at the first error.
type Taken struct {
	files *handover.Files
	taken []*os.File
	Err   error
}

// TakeFrom returns a Taken that takes from files.
func TakeFrom(files *handover.Files) *Taken { return &Taken{files: files} }

// Take takes a file. After an error, which stays in Err, it returns nil.
func (t *Taken) Take(d handover.Descriptor) *os.File {
	if t.Err != nil {
		return nil
	}
	file, err := t.files.Take(d, "resumed "+strconv.Itoa(int(d)))
	if err != nil {
		t.Err = err
		return nil
	}
	t.taken = append(t.taken, file)
	return file
}

// Close closes the files taken.
func (t *Taken) Close() {
	for _, file := range t.taken {
		file.Close()
	}
}

// ClosedFile returns a closed file, to stand for a stream that was closed.
func ClosedFile() *os.File {
	const never = math.MaxInt32 // more descriptors than a process can have
	file := os.NewFile(never, "closed")
	file.Close()
	return file
}
