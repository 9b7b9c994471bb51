package tree

import (
	"slices"
	"sync"
	"time"

	"github.com/streamshim/streamshim/pkg/execproc/internal/proc"
	"github.com/streamshim/streamshim/pkg/rescue"
)

// finder searches for the trees of all processes that are being ended. It works in rounds: everyone who waits
// shares what one round has read of /proc, so a thousand sessions that end at once cost hardly more than one. It
// rests between rounds, so that it uses only part of one CPU however much there is to read.
//
// There is one finder per process, as there is one /proc. Its goroutine lives while anyone waits.
type finder struct {
	mu      sync.Mutex
	limit   int     // looks in one round; 0 means no limit
	urgent  []*look // for commands whose caller waits; served first
	waiting []*look
	looking int
	running bool
	held    int // while positive, no look begins
}

var trees finder

// look is a request for the living members of a tree.
type look struct {
	Tree   *Tree
	living []proc.Stat
	panic  *rescue.Panic // with which the search has ended; raised again by find
	done   chan struct{}
}

// attempt does a part of the search. It returns false, and lets the waiting find go, when that panics.
func (l *look) attempt(part func()) (ok bool) {
	rescue.Call(func(fault *rescue.Panic) {
		l.panic = fault
		close(l.done)
	}, func() {
		part()
		ok = true
	})
	return ok
}

// restAfterRound is how long the finder rests after a round, as a multiple of the round's duration.
const restAfterRound = 1

// SetConcurrentEnds bounds how many endings search /proc at the same time, and so how old a reading of /proc may
// become. 0 means no limit. Of those that wait, endings from RunSync wait less than those of sessions. The bound
// is shared by all Runners of this process, as /proc is.
func SetConcurrentEnds(limit int) {
	trees.mu.Lock()
	defer trees.mu.Unlock()
	trees.limit = limit
}

// Ends returns how many endings are searching now, and how many wait to.
func Ends() (looking, waiting int) {
	trees.mu.Lock()
	defer trees.mu.Unlock()
	return trees.looking, len(trees.urgent) + len(trees.waiting)
}

// HoldLooks holds back new looks until release is called.
func HoldLooks() (release func()) {
	trees.mu.Lock()
	defer trees.mu.Unlock()
	trees.held++
	return func() {
		trees.mu.Lock()
		defer trees.mu.Unlock()
		trees.held--
		trees.beginLocked()
	}
}

// beginLocked runs the finder if anyone waits for it.
func (f *finder) beginLocked() {
	if !f.running && f.held == 0 && len(f.urgent)+len(f.waiting) > 0 {
		f.running = true
		rescue.Go(rescue.Die, f.run)
	}
}

// find searches for new members of the tree and returns all that are alive. For a tree that is frozen it does not
// wait.
func (f *finder) find(t *Tree) []proc.Stat {
	l := &look{Tree: t, done: make(chan struct{})}
	f.mu.Lock()
	if t.Urgent {
		f.urgent = append(f.urgent, l)
	} else {
		f.waiting = append(f.waiting, l)
	}
	f.beginLocked()
	f.mu.Unlock()
	select {
	case <-l.done:
	case <-t.Frozen:
		if f.withdraw(l) {
			t.Blind = true
			return t.known()
		}
		<-l.done // its search has begun
	}
	if l.panic != nil {
		panic(l.panic) // that of this tree's goroutine
	}
	return l.living
}

// withdraw cancels a look that has not begun, and reports whether it could.
func (f *finder) withdraw(l *look) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	waiting := len(f.urgent) + len(f.waiting)
	not := func(other *look) bool { return other == l }
	f.urgent, f.waiting = slices.DeleteFunc(f.urgent, not), slices.DeleteFunc(f.waiting, not)
	return len(f.urgent)+len(f.waiting) < waiting
}

// run serves looks until none is waiting.
func (f *finder) run() {
	for {
		looks := f.next()
		if len(looks) == 0 {
			return
		}
		begin := time.Now()
		rescue.Call(func(fault *rescue.Panic) { abandon(looks, fault) }, func() { round(looks) })
		time.Sleep(restAfterRound * time.Since(begin)) // limits CPU use; it waits for nothing
	}
}

// next returns the looks for one round. If there are none, the finder stops running.
func (f *finder) next() []*look {
	f.mu.Lock()
	defer f.mu.Unlock()
	most := f.limit
	if f.held > 0 {
		f.looking, f.running = 0, false
		return nil
	}
	if most == 0 {
		most = len(f.urgent) + len(f.waiting)
	}
	urgent := min(len(f.urgent), most)
	others := min(len(f.waiting), most-urgent)
	looks := append(f.urgent[:urgent:urgent], f.waiting[:others]...)
	f.urgent, f.waiting = f.urgent[urgent:], f.waiting[others:]
	if f.looking = len(looks); f.looking == 0 {
		f.running, f.urgent, f.waiting = false, nil, nil
	}
	return looks
}

// round serves looks from one view of the processes, which is read after all of them were requested.
func round(looks []*look) {
	v := newCensus()
	var wide []*look
	for _, l := range looks {
		held := false
		if !l.attempt(func() {
			orphans := v.grow(l)
			held = l.Tree.mayBeHeld(l.living, orphans)
		}) {
			continue
		}
		if held {
			wide = append(wide, l)
			continue
		}
		close(l.done)
	}
	if len(wide) == 0 {
		return
	}
	v.addHolders(wide)
	for _, l := range wide {
		if l.attempt(func() {
			if table := v.table(); table != nil {
				l.living = l.Tree.grow(table)
			}
		}) {
			close(l.done)
		}
	}
}

// abandon raises a panic in what all looks of a round share for each of them that waits.
func abandon(looks []*look, fault *rescue.Panic) {
	for _, l := range looks {
		select {
		case <-l.done:
		default:
			l.panic = fault
			close(l.done)
		}
	}
}
