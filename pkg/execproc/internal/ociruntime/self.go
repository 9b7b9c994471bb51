package ociruntime

import (
	"errors"
	"fmt"
	"io"
	"os"

	"golang.org/x/sys/unix"
)

// SealedSelf returns an in-memory copy of the running program that nobody can change.
func SealedSelf() (_ *os.File, err error) {
	self, err := os.Open("/proc/self/exe") // the running program even if the package was upgraded since
	if err != nil {
		return nil, err
	}
	defer self.Close() //nolint:errcheck // only read
	const name = "streamshim-helper"
	fd, err := unix.MemfdCreate(name, unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING|unix.MFD_EXEC)
	if errors.Is(err, unix.EINVAL) { // MFD_EXEC came with Linux 6.3; before, every memfd is executable
		fd, err = unix.MemfdCreate(name, unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING)
	}
	if err != nil {
		return nil, fmt.Errorf("memfd_create: %w", err)
	}
	file := os.NewFile(uintptr(fd), name)
	defer func() {
		if err != nil {
			file.Close() //nolint:errcheck // nothing to do about an error
		}
	}()
	if _, err := io.Copy(file, self); err != nil {
		return nil, fmt.Errorf("copy the program: %w", err)
	}
	if err := file.Chmod(0o555); err != nil { // for all users in the container
		return nil, err
	}
	const seals = unix.F_SEAL_SEAL | unix.F_SEAL_SHRINK | unix.F_SEAL_GROW | unix.F_SEAL_WRITE
	const sealExec = 0x20 // F_SEAL_EXEC, since Linux 6.3: freezes the execute bits
	if _, err := unix.FcntlInt(file.Fd(), unix.F_ADD_SEALS, seals|sealExec); err != nil {
		if _, err := unix.FcntlInt(file.Fd(), unix.F_ADD_SEALS, seals); err != nil {
			return nil, fmt.Errorf("seal the program: %w", err)
		}
	}
	return file, nil
}
