package streaming

import (
	"errors"
	"fmt"
	"os"
	"sync"

	"github.com/streamshim/streamshim/pkg/handover"
)

// frozenProcesses are the frozen processes of tests. It keeps what is not a file.
var frozenProcesses = struct {
	sync.Mutex
	last int
	all  map[int]frozenProcess
}{all: map[int]frozenProcess{}}

type frozenProcess interface {
	remoteProcess
	thaw([]*os.File)
}

type frozenState struct {
	Number int
	Files  []handover.Descriptor
}

func freezeFiles(p frozenProcess, files *handover.Files, open ...*os.File) ([]byte, error) {
	state := frozenState{}
	for _, file := range open {
		var kept handover.Descriptor
		if file != nil {
			var err error
			_, closed := file.Read(nil)
			if kept, err = files.Keep(file); err != nil && !errors.Is(closed, os.ErrClosed) {
				return nil, err
			}
		}
		state.Files = append(state.Files, kept)
	}
	frozenProcesses.Lock()
	defer frozenProcesses.Unlock()
	frozenProcesses.last++
	state.Number = frozenProcesses.last
	frozenProcesses.all[state.Number] = p
	return handover.Encode(state)
}

func thawProcess(encoded []byte, files *handover.Files) (remoteProcess, error) {
	var state frozenState
	if err := handover.Decode(encoded, &state); err != nil {
		return nil, err
	}
	frozenProcesses.Lock()
	p := frozenProcesses.all[state.Number]
	delete(frozenProcesses.all, state.Number)
	frozenProcesses.Unlock()
	if p == nil {
		return nil, fmt.Errorf("there is no frozen process %d", state.Number)
	}
	open := make([]*os.File, len(state.Files))
	for i, kept := range state.Files {
		if kept != 0 {
			var err error
			if open[i], err = files.Take(kept, "a process's"); err != nil {
				return nil, err
			}
		}
	}
	p.thaw(open)
	return p, nil
}
