package tree

import (
	"slices"
	"sync"
	"time"

	"github.com/streamshim/streamshim/pkg/execproc/internal/proc"
)

// finder looks for the trees of all processes that are being ended. It does so in rounds: all that wait
// for a look share what one round has read of /proc, so that a thousand sessions that end at once cost
// hardly more than one. Between rounds it rests, so that it takes no more than a part of one CPU whatever
// there is to read.
//
// It belongs to the process, as /proc does. Its goroutine lives while somebody waits.
type finder struct {
	mu      sync.Mutex
	limit   int     // looks in one round; 0 is no limit
	urgent  []*look // of commands whose caller waits; before the others
	waiting []*look
	looking int
	running bool
	held    int // no look begins
}

var trees finder

// look is the wish to know who lives of a tree.
type look struct {
	Tree   *Tree
	living []proc.Stat
	done   chan struct{}
}

// restAfterRound is for how many times as long as a round took the finder rests afterwards.
const restAfterRound = 1

// SetConcurrentEnds bounds the commands being ended that are looked for at the same time, which also bounds how old
// what one look has read of /proc may become; 0 is no limit. The others wait, those that RunSync has started less than
// those of sessions. It is one bound for all Runners of this process, as /proc is one.
func SetConcurrentEnds(limit int) {
	trees.mu.Lock()
	defer trees.mu.Unlock()
	trees.limit = limit
}

// Ends is how many commands being ended are looked for now, and how many wait for that.
func Ends() (looking, waiting int) {
	trees.mu.Lock()
	defer trees.mu.Unlock()
	return trees.looking, len(trees.urgent) + len(trees.waiting)
}

// HoldLooks lets no look begin until release is called.
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

// beginLocked runs the finder if anybody waits for it.
func (f *finder) beginLocked() {
	if !f.running && f.held == 0 && len(f.urgent)+len(f.waiting) > 0 {
		f.running = true
		go f.run()
	}
}

// find returns all members of the tree that live, after looking for new ones. For one that is frozen it does not wait.
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
		<-l.done // it is being looked for
	}
	return l.living
}

// withdraw takes back the wish for a look that has not begun.
func (f *finder) withdraw(l *look) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	waiting := len(f.urgent) + len(f.waiting)
	not := func(other *look) bool { return other == l }
	f.urgent, f.waiting = slices.DeleteFunc(f.urgent, not), slices.DeleteFunc(f.waiting, not)
	return len(f.urgent)+len(f.waiting) < waiting
}

// run serves those that wait until there are none.
func (f *finder) run() {
	for {
		looks := f.next()
		if len(looks) == 0 {
			return
		}
		begin := time.Now()
		round(looks)
		time.Sleep(restAfterRound * time.Since(begin)) // a limit, not a wait for anything
	}
}

// next takes those that are served in one round. Without any the finder stops running.
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

// round serves some looks with one view of the processes, read after all of them were asked for.
func round(looks []*look) {
	v := newCensus()
	var wide []*look
	for _, l := range looks {
		orphans := v.grow(l)
		if l.Tree.mayBeHeld(l.living, orphans) {
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
		if table := v.table(); table != nil {
			l.living = l.Tree.grow(table)
		}
		close(l.done)
	}
}
