package handover

import (
	"fmt"
	"io"
	"os"
)

// MaxState is the largest encoded state, in bytes. Limits on buffered data keep real states far below it.
const MaxState = 4 << 30

// writeState writes an encoded state to the file and seals it.
func writeState(file *os.File, state []byte) error {
	if _, err := file.Write(state); err != nil {
		return fmt.Errorf("write the state: %w", err)
	}
	return seal(file)
}

// readState reads a sealed file from its beginning, whatever its shared offset is.
func readState(file *os.File) ([]byte, error) {
	if err := checkSealed(file); err != nil {
		return nil, err
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
