package stdio

import (
	"io"
	"math"
	"os"
	"strconv"
	"syscall"

	"github.com/streamshim/streamshim/pkg/handover"
)

// Duplicates are those of a process's streams.
type Duplicates struct {
	files *handover.Files
	of    map[Pollable]handover.Descriptor
}

// Pollable is a stream that has a descriptor.
type Pollable interface {
	io.ReadCloser
	syscall.Conn
}

// NewDuplicates returns a set without any.
func NewDuplicates(files *handover.Files) *Duplicates {
	return &Duplicates{files: files, of: map[Pollable]handover.Descriptor{}}
}

// Add keeps a stream, by its file; one that was closed is left out.
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

// Descriptor is a stream's duplicate, which is given back when the stream was closed after it was made.
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

// hasClosed reports whether a file was closed here.
func hasClosed(file *os.File) bool {
	raw, err := file.SyscallConn()
	return err != nil || raw.Control(func(uintptr) {}) != nil // nothing else fails
}

// Taken are taken out of those that were handed over, until there is an error.
type Taken struct {
	files *handover.Files
	taken []*os.File
	Err   error
}

// TakeFrom takes files out of those that were handed over.
func TakeFrom(files *handover.Files) *Taken { return &Taken{files: files} }

// Take takes a file, or nil after an error, which stays in Err.
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

// Close closes what was taken.
func (t *Taken) Close() {
	for _, file := range t.taken {
		file.Close()
	}
}

// ClosedFile stands for a stream that was closed.
func ClosedFile() *os.File {
	const never = math.MaxInt32 // no process can have so many descriptors
	file := os.NewFile(never, "closed")
	file.Close()
	return file
}
