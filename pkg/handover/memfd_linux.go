package handover

import (
	"errors"
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

// newMemory returns an empty memfd that can be sealed.
func newMemory() (*os.File, error) {
	fd, err := unix.MemfdCreate("streamshim-state", unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING)
	if err != nil {
		return nil, fmt.Errorf("memory for the state: %w", err)
	}
	return os.NewFile(uintptr(fd), "state"), nil
}

// seals forbid any change to the file, and to the seals.
const seals = unix.F_SEAL_SEAL | unix.F_SEAL_SHRINK | unix.F_SEAL_GROW | unix.F_SEAL_WRITE

func seal(file *os.File) error {
	if _, err := unix.FcntlInt(file.Fd(), unix.F_ADD_SEALS, seals); err != nil {
		return fmt.Errorf("seal the state: %w", err)
	}
	return nil
}

func checkSealed(file *os.File) error {
	has, err := unix.FcntlInt(file.Fd(), unix.F_GET_SEALS, 0)
	if err != nil {
		return fmt.Errorf("state: %w", err)
	}
	if has&seals != seals {
		return errors.New("state: its file is not sealed")
	}
	return nil
}
