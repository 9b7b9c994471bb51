package drain

import (
	"testing"

	"github.com/streamshim/streamshim/pkg/session"
)

func TestStatesThatAreRefused(t *testing.T) {
	for name, test := range map[string]struct {
		state OutputState
		fails bool
	}{
		"new":                    {OutputState{Name: session.Stdout, Pending: unlimited}, false},
		"silent to the end":      {OutputState{Name: session.Stdout, Pending: unlimited, Looks: maxLooks, Ended: true}, false},
		"another name":           {OutputState{Name: session.Stderr, Pending: unlimited}, true},
		"less than nothing left": {OutputState{Name: session.Stdout, Pending: unlimited - 1}, true},
		"too many looks":         {OutputState{Name: session.Stdout, Pending: unlimited, Looks: maxLooks + 1, Ended: true}, true},
		"negative looks":         {OutputState{Name: session.Stdout, Pending: unlimited, Looks: -1}, true},
		"no look left":           {OutputState{Name: session.Stdout, Pending: unlimited, Looks: maxLooks}, true},
	} {
		if err := (State{Outputs: []OutputState{test.state}}).Check(); (err != nil) != test.fails {
			t.Errorf("%s: %v", name, err)
		}
	}
}
