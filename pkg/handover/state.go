package handover

import (
	"fmt"
	"os"
	"strconv"

	"golang.org/x/sys/unix"
)

// stateVersion is that of State. It changes when a program that knows only an older one would go wrong.
const stateVersion = 1

// State is what a program leaves to the next one. Its parts are each the business of one package.
type State struct {
	Version     int
	Program     string       // version of the program that wrote it
	Frozen      Instant      // when its sessions were frozen
	Descriptors []Descriptor // all that the parts refer to
	Parts       map[string][]byte

	Size int `cbor:"-"` // of the whole, encoded, in bytes; of one that was read
}

// NewState returns a state without parts.
func NewState(program string) *State {
	return &State{Version: stateVersion, Program: program, Parts: map[string][]byte{}}
}

// Put encodes a part.
func (s *State) Put(name string, part any) error {
	data, err := Encode(part)
	if err != nil {
		return fmt.Errorf("state of %s: %w", name, err)
	}
	s.Parts[name] = data
	return nil
}

// Get decodes a part. One that is not there leaves v as it is.
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

// variable names the descriptor of the state in the environment of the next program.
const variable = "STREAMSHIM_HANDOVER"

// Received returns what another program has left to this one in the same process, nil when there is nothing. The caller
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
