package handover

import (
	"errors"
	"fmt"
	"io"
	"os"

	"golang.org/x/sys/unix"
)

// MaxState is the largest encoded state, in bytes. Limits on buffered data keep real states far below it.
const MaxState = 4 << 30

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

// writeState writes an encoded state to the file and seals it.
func writeState(file *os.File, state []byte) error {
	if _, err := file.Write(state); err != nil {
		return fmt.Errorf("write the state: %w", err)
	}
	if _, err := unix.FcntlInt(file.Fd(), unix.F_ADD_SEALS, seals); err != nil {
		return fmt.Errorf("seal the state: %w", err)
	}
	return nil
}

// readState reads a sealed file from its beginning, whatever its shared offset is.
func readState(file *os.File) ([]byte, error) {
	has, err := unix.FcntlInt(file.Fd(), unix.F_GET_SEALS, 0)
	if err != nil {
		return nil, fmt.Errorf("state: %w", err)
	}
	if has&seals != seals {
		return nil, errors.New("state: its file is not sealed")
	}
	info, err := file.Stat()
	if err != nil {
		return nil, fmt.Errorf("state: %w", err)
	}
	if info.Size() > MaxState {
		return nil, fmt.Errorf("state: %d bytes are too many", info.Size())
	}
	state := make([]byte, info.Size())
	if _, err := file.ReadAt(state, 0); err != nil && err != io.EOF {
		return nil, fmt.Errorf("state: %w", err)
	}
	return state, nil
}
