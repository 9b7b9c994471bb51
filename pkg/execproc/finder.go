package execproc

import (
	"sync"
	"time"
)

// finder looks for the trees of all processes that are being ended. It does so in rounds: all that wait
// for a look share what one round has read of /proc, so that a thousand sessions that end at once cost
// hardly more than one. Between rounds it rests, so that it takes no more than a part of one CPU whatever
// there is to read.
//
// It belongs to the process, as /proc does. Its goroutine lives while somebody waits.
type finder struct {
	mu      sync.Mutex
	waiting []*look
	running bool
}

var trees finder

// look is the wish to know who lives of a tree.
type look struct {
	tree   *tree
	living []procStat
	done   chan struct{}
}

const (
	// looksInRound bounds how old what a round has read may become.
	looksInRound = 200
	// restAfterRound is for how many times as long as a round took the finder rests afterwards.
	restAfterRound = 1
)

// find returns all members of the tree that live, after looking for new ones.
func (f *finder) find(t *tree) []procStat {
	l := &look{tree: t, done: make(chan struct{})}
	f.mu.Lock()
	f.waiting = append(f.waiting, l)
	if !f.running {
		f.running = true
		go f.run()
	}
	f.mu.Unlock()
	<-l.done
	return l.living
}

// run serves those that wait until there are none.
func (f *finder) run() {
	for {
		f.mu.Lock()
		looks := f.waiting[:min(len(f.waiting), looksInRound)]
		f.waiting = f.waiting[len(looks):]
		if len(looks) == 0 {
			f.running, f.waiting = false, nil
			f.mu.Unlock()
			return
		}
		f.mu.Unlock()
		begin := time.Now()
		round(looks)
		time.Sleep(restAfterRound * time.Since(begin)) // a limit, not a wait for anything
	}
}

// round serves some looks with one view of the processes, read after all of them were asked for.
func round(looks []*look) {
	v := newCensus()
	var wide []*look
	for _, l := range looks {
		orphans := v.grow(l)
		if l.tree.mayBeHeld(l.living, orphans) {
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
			l.living = l.tree.grow(table)
		}
		close(l.done)
	}
}
