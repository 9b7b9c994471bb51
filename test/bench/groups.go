package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"time"

	"github.com/streamshim/streamshim/test/internal/node"
)

// group is some figures that are measured together, one round after the other.
type group struct {
	name string
	// rounds is how many there are; nil means as many as the scale says.
	rounds func(scale) int
	// each measures one side, once for each side and round; or else round measures both.
	each  func(*bench, context.Context, side) error
	round func(*bench, context.Context) error
	// prepare runs before the first round.
	prepare func(*bench, context.Context) error
}

func once(scale) int { return 1 }

// groups in the order they are measured: memory first, as long as the servers have none that they
// have freed and not given back; the call with 500 containers last, as they weigh on containerd.
var groups = []group{
	{name: "warm", rounds: once, each: (*bench).warm},
	{name: "idle-forward", rounds: once, each: (*bench).idleConnections},
	{name: "idle", rounds: once, each: (*bench).idleSessions},
	{name: "exec", each: (*bench).exec},
	{name: "sync", each: (*bench).execSync},
	{name: "seccomp", each: (*bench).execConfined},
	{name: "runc", round: (*bench).runtimeFloors},
	{name: "storm", each: (*bench).storm},
	{name: "cut", rounds: once, each: (*bench).cut},
	{name: "hog", rounds: once, each: (*bench).hog},
	{name: "floor", round: func(b *bench, _ context.Context) error { return b.floorRates() }},
	{name: "stdout", each: (*bench).stdout},
	{name: "stdin", each: (*bench).stdin},
	{name: "down", each: (*bench).download},
	{name: "up", each: (*bench).upload},
	{name: "short", each: (*bench).shortConnections},
	{name: "small", round: (*bench).smallCalls},
	{name: "large", round: (*bench).largeCalls, prepare: (*bench).fillList},
}

func groupNames() []string {
	names := make([]string, len(groups))
	for i, g := range groups {
		names[i] = g.name
	}
	return names
}

// warm fills both sides' caches; it is no figure.
func (b *bench) warm(ctx context.Context, s side) error {
	for range 5 {
		for _, container := range []string{b.containerID, b.confined.id} {
			if _, err := oneExec(ctx, s, container); err != nil {
				return err
			}
		}
	}
	return nil
}

// runGroups runs the groups whose names match. Rounds are the outer loop for those that are repeated,
// so that every figure is spread over the whole time of the run.
func (b *bench) runGroups(ctx context.Context, only *regexp.Regexp) error {
	chosen := map[string]bool{"warm": true}
	for _, g := range groups {
		chosen[g.name] = chosen[g.name] || only.MatchString(g.name)
	}
	for round := range b.scale.rounds {
		for _, g := range groups {
			rounds := b.scale.rounds
			if g.rounds != nil {
				rounds = g.rounds(b.scale)
			}
			if !chosen[g.name] || round >= rounds {
				continue
			}
			begin := time.Now()
			if err := b.runGroup(ctx, g, round); err != nil {
				return fmt.Errorf("%s: %w", g.name, err)
			}
			progress("round %d of %d: %-12s %5.1f s", round+1, rounds, g.name, time.Since(begin).Seconds())
		}
	}
	return nil
}

func (b *bench) runGroup(ctx context.Context, g group, round int) error {
	if round == 0 && g.prepare != nil {
		if err := g.prepare(b, ctx); err != nil {
			return err
		}
	}
	if g.round != nil {
		return g.round(b, ctx)
	}
	sides := b.sides
	for i := range sides {
		s := sides[(i+round)%len(sides)] // who comes first takes turns
		if err := g.each(b, ctx, s); err != nil {
			return fmt.Errorf("%s: %w", s.name, err)
		}
	}
	return ctx.Err()
}

// fillList creates the containers, not started, that make ListContainers a large call.
func (b *bench) fillList(ctx context.Context) error {
	return fourAtOnce(b.scale.containers, func(i int) error {
		_, err := b.node.CreateContainer(ctx, b.sandbox, node.ContainerSpec{Name: fmt.Sprintf("listed-%d", i)})
		return err
	})
}

// write prints the table and stores it with the plot.
func (b *bench) write(folder string) error {
	table := b.table()
	fmt.Print(table)
	if err := os.MkdirAll(folder, 0o755); err != nil {
		return err
	}
	return errors.Join(
		os.WriteFile(filepath.Join(folder, "results.md"), []byte(table), 0o644),
		os.WriteFile(filepath.Join(folder, "results.svg"), []byte(b.plot()), 0o644),
	)
}

func progress(format string, args ...any) { fmt.Fprintf(os.Stderr, format+"\n", args...) }
