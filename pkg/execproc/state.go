package execproc

import (
	"errors"
	"fmt"
	"os"

	"github.com/streamshim/streamshim/pkg/execproc/internal/proc"
	"github.com/streamshim/streamshim/pkg/execproc/internal/stdio"
	"github.com/streamshim/streamshim/pkg/execproc/internal/tree"
	"github.com/streamshim/streamshim/pkg/handover"
)

// stateVersion is the version of processState and runnerState. Readers accept no other. Adding fields does not
// change it.
const stateVersion = 1

// processState is a process's state in a hand-over. Its field names are a contract with other versions of this
// program.
type processState struct {
	Version   int
	Pid       int
	Start     uint64
	Exited    bool
	Status    int    // exit code, if Exited
	Container string // container id
	InitPid   int
	InitStart uint64 // 0 if unknown
	Watched   bool   // InitPid is watched
	InitEnded bool
	Record    string // path of the recovery record
	Policy    Policy
	StandIn   string
	Stranger  bool // not our child
	Probe     bool
	Closed    bool
	Killed    bool
	IsKept    bool
	Ends      tree.EndsState
	Pipes     *pipesState
	Terminal  *terminalState
	Kept      []keptState
	Ending    *endingState
}

// streamState describes one of a process's streams.
type streamState struct {
	Wanted     bool
	Descriptor handover.Descriptor // 0 if closed
}

type pipesState struct{ Stdin, Stdout, Stderr streamState }

type terminalState struct {
	Descriptor handover.Descriptor // 0 if closed
	Output     bool                // the command asked for stdout
	Input      *stdio.InputState   // nil when it did not ask for stdin
}

type keptState struct {
	Descriptor      handover.Descriptor
	Terminal, Input bool
}

type endingState struct {
	Over           bool
	Stage          stage
	TermAt, KillAt handover.Instant
	GiveUpAt       handover.Instant // 0 before SIGKILL
	Tree           tree.State
}

func decodeProcess(encoded []byte) (processState, error) {
	var s processState
	if err := handover.Decode(encoded, &s); err != nil {
		return s, err
	}
	return s, s.check()
}

func (s processState) check() error {
	switch {
	case s.Version != stateVersion:
		return fmt.Errorf("a process's state has version %d, this program knows %d", s.Version, stateVersion)
	case s.Pid <= 1 || s.Pid == os.Getpid():
		return fmt.Errorf("a process's state names process %d", s.Pid)
	case s.Policy != PolicyHangup && s.Policy != PolicyKill && s.Policy != PolicyKeep:
		return fmt.Errorf("a process's state has policy %q", s.Policy)
	case s.Pipes != nil && s.Terminal != nil:
		return errors.New("a process's state has pipes and a terminal")
	case s.Ending != nil && (s.Ending.Stage < stageLook || s.Ending.Stage > stageKill):
		return fmt.Errorf("a process's state has stage %d", s.Ending.Stage)
	case s.Terminal != nil && s.Terminal.Input != nil && s.Terminal.Input.Typing != nil && s.Terminal.Input.Typing.Pause <= 0:
		return errors.New("a process's state has a pause of no time")
	}
	return nil
}

func (s processState) leader() proc.Identity { return proc.Identity{Pid: s.Pid, Start: s.Start} }
