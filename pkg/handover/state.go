package handover

import (
	"fmt"
	"os"
	"strconv"

	"golang.org/x/sys/unix"
)

// stateVersion is the version of State. Raise it when a program that knows only the older one would misread the new one.
const stateVersion = 1

// State is what a program leaves to its successor. Each part belongs to one package.
type State struct {
	Version     int
	Program     string       // version of the program that wrote the state
	Frozen      Instant      // when sessions began to stand still
	Descriptors []Descriptor // all descriptors that parts refer to
	Parts       map[string][]byte

	Size int `cbor:"-"` // encoded size in bytes; set by reading only
}

// NewState returns a state without parts.
func NewState(program string) *State {
	return &State{Version: stateVersion, Program: program, Parts: map[string][]byte{}}
}

// Put encodes and stores a part.
func (s *State) Put(name string, part any) error {
	data, err := Encode(part)
	if err != nil {
		return fmt.Errorf("state of %s: %w", name, err)
	}
	s.Parts[name] = data
	return nil
}

// Get decodes a part into v. It leaves v unchanged if there is no such part.
func (s *State) Get(name string, v any) error {
	data, ok := s.Parts[name]
	if !ok {
		return nil
	}
	if err := Decode(data, v); err != nil {
		return fmt.Errorf("state of %s: %w", name, err)
	}
	return nil
}

func parseState(data []byte) (*State, error) {
	var s State
	if err := Decode(data, &s); err != nil {
		return nil, err
	}
	if s.Version != stateVersion {
		return nil, fmt.Errorf("the state has version %d, this program knows %d", s.Version, stateVersion)
	}
	s.Size = len(data)
	return &s, nil
}

// variable is the environment variable that tells the next program the descriptor of the state.
const variable = "STREAMSHIM_HANDOVER"

// Received returns the state that a previous program has left in this process, or nil if there is none. The caller
// closes the files.
func Received() (*State, *Files, error) {
	value, ok := os.LookupEnv(variable)
	if !ok {
		return nil, nil, nil
	}
	os.Unsetenv(variable) //nolint:errcheck // the name is a good one
	fd, err := strconv.Atoi(value)
	if err != nil || fd < 3 {
		return nil, nil, fmt.Errorf("%s=%q is no descriptor", variable, value)
	}
	unix.CloseOnExec(fd)
	memory := os.NewFile(uintptr(fd), "state")
	defer memory.Close() //nolint:errcheck // was only read
	data, err := readState(memory)
	if err != nil {
		return nil, nil, fmt.Errorf("hand-over: %w", err)
	}
	state, err := parseState(data)
	if err != nil {
		return nil, nil, fmt.Errorf("hand-over: %w", err)
	}
	files, err := Inherited(state.Descriptors)
	if err != nil {
		return nil, nil, fmt.Errorf("hand-over: %w", err)
	}
	return state, files, nil
}
