package nodeinstall

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
)

// phase is how far an installation came.
type phase string

const (
	phaseMoving phase = "moving" // the kubelet is being moved; an interrupted one is taken up again
	phaseDone   phase = "done"
	phaseFailed phase = "failed" // and undone
)

// state is what the state file holds.
type state struct {
	Phase       phase  `json:"phase"`
	Fingerprint string `json:"fingerprint"` // of program, unit and configuration
	// Upstream is the endpoint that the kubelet had, and goes back to.
	Upstream string `json:"upstream"`
	Kubelet  string `json:"kubelet,omitempty"` // where its endpoint is written, for people
	Reason   string `json:"reason,omitempty"`  // of a failure
	// OwnsConfiguration tells that the configuration file was written by Install.
	OwnsConfiguration bool `json:"owns_configuration,omitempty"`
}

func readState(path string) (state, error) {
	var s state
	text, err := os.ReadFile(path)
	if errors.Is(err, os.ErrNotExist) {
		return s, nil
	}
	if err == nil {
		err = json.Unmarshal(text, &s)
	}
	if err != nil {
		return s, fmt.Errorf("what an earlier installation has written: %w", err)
	}
	return s, nil
}

func (s state) write(path string) error {
	text, err := json.MarshalIndent(s, "", "  ")
	if err != nil {
		return err
	}
	return writeFile(path, append(text, '\n'), 0o600)
}
