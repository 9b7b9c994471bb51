package handover

import (
	"debug/elf"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
)

// running names the executable of this process even if its file was renamed or removed.
const running = "/proc/self/exe"

// Program returns the path by which this process was started, which is where the next version gets installed. The file
// there may be another version by now.
func Program() (string, error) {
	if path, err := exec.LookPath(os.Args[0]); err == nil {
		if path, err = filepath.Abs(path); err == nil {
			return path, nil
		}
	}
	path, err := os.Executable()
	if err != nil {
		return "", fmt.Errorf("which program is this? %w", err)
	}
	return path, nil
}

// IsRunning reports whether the file is the executable of this process, or a copy of the same build.
func IsRunning(path string) (bool, error) { return SameProgram(path, running) }

// SameProgram reports whether two paths name the same file, or copies of the same build.
func SameProgram(a, b string) (bool, error) {
	first, err := os.Stat(a)
	if err != nil {
		return false, fmt.Errorf("program: %w", err)
	}
	second, err := os.Stat(b)
	if err != nil {
		return false, fmt.Errorf("program: %w", err)
	}
	if os.SameFile(first, second) {
		return true, nil
	}
	if first.Size() != second.Size() {
		return false, nil
	}
	firstID, err := buildID(a)
	if err != nil {
		return false, err
	}
	secondID, err := buildID(b)
	if err != nil {
		return false, err
	}
	return firstID == secondID, nil
}

// buildID returns the build ID that the Go linker put into an executable.
func buildID(path string) (string, error) {
	file, err := elf.Open(path)
	if err != nil {
		return "", fmt.Errorf("program %s: %w", path, err)
	}
	defer file.Close() //nolint:errcheck // was only read
	section := file.Section(".note.go.buildid")
	if section == nil {
		return "", fmt.Errorf("program %s: %w", path, errors.New("it has no Go build ID"))
	}
	id, err := section.Data()
	if err != nil {
		return "", fmt.Errorf("program %s: %w", path, err)
	}
	return string(id), nil
}
