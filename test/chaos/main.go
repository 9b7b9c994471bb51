// Command chaos is a soak of one node with real containerd and streamshim in front: sessions of all kinds come
// and go, their clients die in every way, pods are killed under them, containerd and streamshim are restarted and
// hang, disks are full, descriptors run out, and containers are hostile. All along it checks that
//
//   - the output of each session that says it succeeded has the right sum, and a session that fails has a cause;
//   - probes (ExecSync) are answered within a second at p99, and the kubelet's other calls go on;
//   - nothing is left at the end: sessions, processes, descriptors, goroutines, records, mounts, memory.
//
// It prints what it did, and a plot of latency and memory over time. The seed that it prints runs it again with
// the same decisions; the machine's own timing is not repeated. It needs root and what `make peers` builds.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"math/rand/v2"
	"os"
	"os/signal"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

type options struct {
	program, output string
	duration        time.Duration
	seed            uint64
	sessions        int
	rate            float64
	clock           bool
	only            string
	inject          string
	teeth           bool
}

func main() {
	if err := run(); err != nil {
		fmt.Fprintln(os.Stderr, "chaos:", err)
		os.Exit(1)
	}
}

func run() error {
	var o options
	flag.StringVar(&o.program, "streamshim", "bin/streamshim", "the streamshim `program` under test")
	flag.StringVar(&o.output, "output", ".artefacts/chaos", "`folder` for the report, the plot and the logs")
	flag.DurationVar(&o.duration, "duration", 10*time.Minute, "how long sessions come and go")
	flag.Uint64Var(&o.seed, "seed", 0, "`number` from a report, to run with the same decisions again (default: a new one)")
	flag.IntVar(&o.sessions, "sessions", 300, "sessions that live at one time")
	flag.Float64Var(&o.rate, "rate", 8, "sessions that begin each second, at most")
	flag.StringVar(&o.only, "only", "", "only these `faults`, separated by commas: "+strings.Join(faultNames(), ", "))
	flag.BoolVar(&o.clock, "clock", false, "also set the machine's clock forth and back; for a machine of one's own")
	flag.StringVar(&o.inject, "inject", "", "`faults` of the soak's own, separated by commas, to be found by it: "+strings.Join(injections, ", "))
	flag.BoolVar(&o.teeth, "teeth", false, "run with all faults of -inject and no others, and fail unless each is found")
	flag.Parse()
	if o.seed == 0 {
		o.seed = uint64(rand.Uint32()) //nolint:gosec // not a secret
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, unix.SIGTERM)
	defer stop()
	if !o.teeth {
		found, err := soak(ctx, o)
		if err == nil && len(found) > 0 {
			err = fmt.Errorf("%d violations; seed %d; details in %s", len(found), o.seed, o.output)
		}
		return err
	}
	return showTeeth(ctx, o)
}

// What is done by the soak itself, so that it can be seen that the soak finds it.
const (
	injectCut   = "cut"   // a part of the output is dropped on its way to the client
	injectLeak  = "leak"  // sessions are forgotten, and stay
	injectStall = "stall" // streamshim is stopped for a while now and then
)

var injections = []string{injectCut, injectLeak, injectStall}

// signs are what each of them must be found by.
var signs = map[string]violationKind{injectCut: wrongOutput, injectLeak: leftBehind, injectStall: slowProbes}

// injects says whether the soak does this.
func (o options) injects(what string) bool {
	return slices.Contains(strings.Split(o.inject, ","), what)
}

// showTeeth runs once with all of them, and nothing else that goes wrong.
func showTeeth(ctx context.Context, o options) error {
	o.inject, o.only = strings.Join(injections, ","), "none"
	found, err := soak(ctx, o)
	if err != nil {
		return err
	}
	var missed []error
	for _, injected := range injections {
		if found[signs[injected]] == 0 {
			missed = append(missed, fmt.Errorf("the injected %s was not found", injected))
			continue
		}
		say("teeth: the injected %s was found (%s)", injected, signs[injected])
	}
	return errors.Join(missed...)
}
