package main

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"google.golang.org/grpc/status"
)

// crowd are all clients. Each session has a number, and a source of decisions of its own that follows from it.
type crowd struct {
	s      *soakRun
	begins chan int // the number of a session that may begin

	// sessions is what sessions run under: those that live when no more begin go on until end, so that they
	// are seen to end well. idle ends the idle time of all.
	sessions, idle context.Context
	endIdle        context.CancelFunc
	live           atomic.Int64
	clients        sync.WaitGroup
}

func newCrowd(ctx context.Context, s *soakRun) *crowd {
	c := &crowd{s: s, begins: make(chan int), sessions: ctx}
	c.idle, c.endIdle = context.WithCancel(ctx)
	return c
}

// tooBusy is how long a plain `runc exec` takes on a machine that cannot take more sessions. A soak that went on adding to
// what waits would see nothing but waiting.
const tooBusy = 2 * time.Second

// leastSessions live also on a busy machine.
const leastSessions = 20

// hopeless is how long a `runc exec` takes on a machine on which a time-out says nothing.
const hopeless = sessionLimit / 12

// run lets sessions come and go until the context ends.
func (c *crowd) run(ctx context.Context) {
	for range c.s.sessions {
		c.clients.Go(func() { c.place(ctx) })
	}
	number := 0
	every(ctx, time.Duration(float64(time.Second)/c.s.rate), func() {
		number++ // also when it is not begun: at the same time comes the same session
		if c.s.busy() > tooBusy && c.live.Load() >= leastSessions {
			c.s.mu.Lock()
			c.s.notBegun++
			c.s.mu.Unlock()
			return
		}
		select {
		case c.begins <- number:
		case <-ctx.Done():
		default: // all places are taken
		}
	})
}

// end waits until all sessions have ended. Those that are idle are told to.
func (c *crowd) end() {
	c.endIdle()
	c.clients.Wait()
}

func (c *crowd) place(ctx context.Context) {
	for {
		select {
		case number := <-c.begins:
			c.live.Add(1)
			c.s.session(c.sessions, c.idle, c.s.random("session", number))
			c.live.Add(-1)
		case <-ctx.Done():
			return
		}
	}
}

// session makes one session, of any kind, and judges it.
func (s *soakRun) session(ctx, idle context.Context, r *rand.Rand) {
	c := &client{s: s, r: r, idle: idle, pod: s.pods.pick(r)}
	var kind sessionKind
	which := r.IntN(20)
	if s.teeth {
		which = 20 // only clients of which nothing is left by right, however soon one looks
	}
	switch which {
	case 0:
		kind = chooseHostile(r)
		c.pod = s.pods.pickHostile(r)
	case 1, 2, 3, 4:
		kind = chooseDoomed(r)
	default:
		kind = chooseHealthy(r)
	}
	s.try(ctx, c, kind)
}

func chooseHealthy(r *rand.Rand) sessionKind {
	total := 0
	for _, k := range kinds {
		total += k.weight
	}
	at := r.IntN(total)
	for _, k := range kinds {
		if at -= k.weight; at < 0 {
			return k
		}
	}
	panic("unreachable")
}

// try runs a session and says what its end means.
func (s *soakRun) try(ctx context.Context, c *client, kind sessionKind) {
	c.kind = kind.name
	begin := time.Now()
	err := kind.run(ctx, c)
	end := time.Now()
	outcome := "ok"
	var wrong wrongError
	switch {
	case err == nil:
	case errors.As(err, &wrong):
		outcome = "wrong"
		s.violated(wrongOutput, "%s in %s, begun at %.3f: %v", kind.name, c.pod.name, begin.Sub(s.begin).Seconds(), err)
	default:
		cause := s.causeOf(c, begin, end, err)
		outcome = "failed: " + cause
		if cause == "" {
			outcome = "failed"
			s.violated(unexplained, "%s in %s, begun at %.3f: %v", kind.name, c.pod.name, begin.Sub(s.begin).Seconds(), err)
		}
	}
	s.note("%s in %s, begun at %.3f: %s %v", kind.name, c.pod.name, begin.Sub(s.begin).Seconds(), outcome, err)
	s.mu.Lock()
	defer s.mu.Unlock()
	s.counts[fmt.Sprintf("%s: %s", kind.name, outcome)]++
}

// causeOf says why a session may have failed, empty when nothing explains it.
func (s *soakRun) causeOf(c *client, begin, end time.Time, err error) string {
	// A session that does not end is explained by nothing but a machine on which nothing does.
	if errors.Is(err, os.ErrDeadlineExceeded) || strings.Contains(err.Error(), "did not start the command in time") {
		if s.slowest(begin, end) > hopeless {
			return "hopelessly busy"
		}
		return ""
	}
	if c.pod.dead() {
		return "pod killed"
	}
	if c.pod.kind == hostile {
		return "hostile pod"
	}
	if cause := s.excused(begin, end, func(e excuse) bool { return e.sessions }); cause != "" {
		return cause
	}
	refused := func(e excuse) bool {
		return slices.ContainsFunc(e.starts, func(sign string) bool { return strings.Contains(err.Error(), sign) })
	}
	if cause := s.excused(begin, end, refused); cause != "" {
		return cause
	}
	// The first exec in a container, or the first after a restart, asks the upstream.
	_, ofCall := status.FromError(err)
	if c.upstream || ofCall || c.pod.kind != stable {
		return s.excused(begin, end, func(e excuse) bool { return e.upstream })
	}
	return ""
}

// warmUp makes one session of each kind in each stable pod, so that what is made once is there.
func (s *soakRun) warmUp(ctx context.Context) error {
	over, end := context.WithCancel(ctx)
	end()
	failures := make([]error, len(s.pods.stable))
	var inPods sync.WaitGroup
	for i, p := range s.pods.stable {
		inPods.Go(func() {
			for _, kind := range kinds {
				c := &client{s: s, r: s.random("warm "+kind.name, i), idle: over, pod: p, kind: kind.name, warming: true}
				if err := kind.run(ctx, c); err != nil {
					failures[i] = fmt.Errorf("%s in %s: %w", kind.name, p.name, err)
					return
				}
			}
		})
	}
	inPods.Wait()
	return errors.Join(failures...)
}
