package handover

import (
	"errors"
	"fmt"
	"maps"
	"net"
	"os"
	"slices"
	"sync"
	"syscall"

	"golang.org/x/sys/unix"
)

// Descriptor is the number of a file in a state, the same in both programs. Zero means none.
type Descriptor int

// Files is the set of descriptors that a state refers to. It is safe for concurrent use.
type Files struct {
	mu   sync.Mutex
	kept map[Descriptor]bool
}

// NewFiles returns an empty set.
func NewFiles() *Files { return &Files{kept: map[Descriptor]bool{}} }

// Inherited returns the set of files handed over to this program. It marks them close-on-exec, so that children do not
// inherit them.
func Inherited(descriptors []Descriptor) (*Files, error) {
	f := NewFiles()
	for _, d := range descriptors {
		if _, err := unix.FcntlInt(uintptr(d), unix.F_SETFD, unix.FD_CLOEXEC); err != nil {
			return nil, fmt.Errorf("descriptor %d that was handed over: %w", d, err)
		}
		f.kept[d] = true
	}
	return f, nil
}

// Keep adds a duplicate of the descriptor of from, which its owner still has to close.
func (f *Files) Keep(from syscall.Conn) (Descriptor, error) {
	raw, err := from.SyscallConn()
	if err != nil {
		return 0, fmt.Errorf("keep a descriptor: %w", err)
	}
	var kept Descriptor
	var fault error
	if err := raw.Control(func(fd uintptr) { kept, fault = f.KeepFD(int(fd)) }); err != nil { //nolint:gosec // a descriptor
		return 0, fmt.Errorf("keep a descriptor: %w", err)
	}
	return kept, fault
}

// KeepFD is Keep for a descriptor number, which must stay open during the call.
func (f *Files) KeepFD(fd int) (Descriptor, error) {
	const aboveStandard = 3 // so that zero can mean none
	duplicate, err := unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, aboveStandard)
	if err != nil {
		return 0, fmt.Errorf("keep a descriptor: %w", err)
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	f.kept[Descriptor(duplicate)] = true
	return Descriptor(duplicate), nil
}

// Take removes a file from the set and returns it. The caller closes it.
func (f *Files) Take(d Descriptor, name string) (*os.File, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if !f.kept[d] {
		return nil, fmt.Errorf("%s: descriptor %d was not handed over", name, d)
	}
	delete(f.kept, d)
	return os.NewFile(uintptr(d), name), nil
}

// TakeConn removes a network connection from the set and returns it. The caller closes it.
func (f *Files) TakeConn(d Descriptor) (net.Conn, error) {
	file, err := f.Take(d, "connection")
	if err != nil {
		return nil, err
	}
	defer file.Close() //nolint:errcheck // was duplicated
	conn, err := net.FileConn(file)
	if err != nil {
		return nil, fmt.Errorf("connection that was handed over: %w", err)
	}
	return conn, nil
}

// TakeListener removes a listener from the set and returns it. The caller closes it.
func (f *Files) TakeListener(d Descriptor) (net.Listener, error) {
	file, err := f.Take(d, "listener")
	if err != nil {
		return nil, err
	}
	defer file.Close() //nolint:errcheck // was duplicated
	listener, err := net.FileListener(file)
	if err != nil {
		return nil, fmt.Errorf("listener that was handed over: %w", err)
	}
	return listener, nil
}

// Descriptors returns the numbers of all files, for Inherited.
func (f *Files) Descriptors() []Descriptor {
	f.mu.Lock()
	defer f.mu.Unlock()
	return slices.Sorted(maps.Keys(f.kept))
}

// Inherit clears close-on-exec, so that the next program inherits the files, and returns their numbers.
func (f *Files) Inherit() ([]Descriptor, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	var descriptors []Descriptor
	for d := range f.kept {
		if _, err := unix.FcntlInt(uintptr(d), unix.F_SETFD, 0); err != nil {
			return nil, fmt.Errorf("hand over descriptor %d: %w", d, err)
		}
		descriptors = append(descriptors, d)
	}
	return descriptors, nil
}

// Disinherit undoes Inherit.
func (f *Files) Disinherit() error {
	f.mu.Lock()
	defer f.mu.Unlock()
	var errs []error
	for d := range f.kept {
		if _, err := unix.FcntlInt(uintptr(d), unix.F_SETFD, unix.FD_CLOEXEC); err != nil {
			errs = append(errs, fmt.Errorf("descriptor %d: %w", d, err))
		}
	}
	return errors.Join(errs...)
}

// Close closes the files that are still in the set.
func (f *Files) Close() {
	f.mu.Lock()
	defer f.mu.Unlock()
	for d := range f.kept {
		unix.Close(int(d)) //nolint:errcheck // not used
	}
	clear(f.kept)
}
