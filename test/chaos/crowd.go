package main

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"sync"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// crowd are all clients. Each has a place and a source of decisions of its own.
type crowd struct {
	s      *soakRun
	begins chan struct{} // a session may begin

	// sessions is what sessions run under: those that live when no more begin go on until end, so that they
	// are seen to end well. idle ends the idle time of all.
	sessions, idle context.Context
	endIdle        context.CancelFunc
	clients        sync.WaitGroup
}

func newCrowd(ctx context.Context, s *soakRun) *crowd {
	c := &crowd{s: s, begins: make(chan struct{}), sessions: ctx}
	c.idle, c.endIdle = context.WithCancel(ctx)
	return c
}

// run lets sessions come and go until the context ends.
func (c *crowd) run(ctx context.Context) {
	for i := range c.s.sessions {
		c.clients.Go(func() { c.place(ctx, i) })
	}
	every(ctx, time.Duration(float64(time.Second)/c.s.rate), func() {
		select {
		case c.begins <- struct{}{}:
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

func (c *crowd) place(ctx context.Context, number int) {
	r := c.s.random("session", number)
	for {
		select {
		case <-c.begins:
		case <-ctx.Done():
			return
		}
		c.s.session(c.sessions, c.idle, r)
	}
}

// session makes one session, of any kind, and judges it.
func (s *soakRun) session(ctx, idle context.Context, r *rand.Rand) {
	c := &client{s: s, r: r, idle: idle, pod: s.pods.pick(r)}
	var kind sessionKind
	switch r.IntN(20) {
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
	// A session that does not end is explained by nothing but that nobody could be asked to begin it.
	if errors.Is(err, os.ErrDeadlineExceeded) {
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
	// A port-forward begins something with each connection.
	starting := end
	if limit := begin.Add(startTime); c.kind != "forward" && limit.Before(end) {
		starting = limit
	}
	if cause := s.excused(begin, starting, func(e excuse) bool { return e.starts }); cause != "" {
		return cause
	}
	// The first exec in a container, or the first after a restart, asks the upstream.
	asks := c.upstream || status.Code(errors.Unwrap(err)) != codes.Unknown || c.pod.kind != stable
	if asks {
		return s.excused(begin, end, func(e excuse) bool { return e.upstream })
	}
	return ""
}

// startTime is how long the beginning of a session may take on a busy machine.
const startTime = 5 * time.Second

// warmUp makes one session of each kind in each stable pod, so that what is made once is there.
func (s *soakRun) warmUp(ctx context.Context) error {
	over, end := context.WithCancel(ctx)
	end()
	for i, p := range s.pods.all() {
		if p.kind != stable {
			continue
		}
		for _, kind := range kinds {
			c := &client{s: s, r: s.random("warm "+kind.name, i), idle: over, pod: p, kind: kind.name, healthy: true}
			if err := kind.run(ctx, c); err != nil {
				return fmt.Errorf("%s: %w", kind.name, err)
			}
		}
	}
	return nil
}
