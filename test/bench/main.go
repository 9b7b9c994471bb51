// Command bench measures streamshim and the bare containerd behind it one after the other, on the same
// container of a private node, with the same cheap client, and prints a table of every figure, the
// ratio, and a verdict against the project's bars. It needs root and what `make peers` builds.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/streamshim/streamshim/test/internal/node"
)

func main() {
	if size := os.Getenv(copyVariable); size != "" {
		if err := copyDescriptors(size); err != nil {
			fmt.Fprintln(os.Stderr, "copy:", err)
			os.Exit(1)
		}
		return
	}
	if err := run(); err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

// options are the command line.
type options struct {
	program, output, only, config string
	sizing, report                string
	length                        time.Duration
	quick                         bool
	rounds                        int
}

func run() error {
	var o options
	flag.StringVar(&o.program, "streamshim", "bin/streamshim", "the streamshim `program` to measure")
	flag.StringVar(&o.output, "output", ".artefacts/bench", "`folder` for results.md, results.svg and results.json")
	flag.StringVar(&o.only, "only", "", "measure only groups whose name matches this `expression`: "+strings.Join(groupNames(), ", "))
	flag.StringVar(&o.config, "config", "", "configuration `file` of streamshim")
	flag.BoolVar(&o.quick, "quick", false, "few rounds and small amounts: a look, not a measurement")
	flag.IntVar(&o.rounds, "rounds", 0, "number of rounds (default 9, with -quick 2)")
	flag.StringVar(&o.sizing, "sizing", "", "instead of the groups, measure exec probes with so many `pods`, for instance \"110 250\"")
	flag.DurationVar(&o.length, "length", time.Minute, "with -sizing: how long each line of the table is measured")
	flag.StringVar(&o.report, "report", "", "with -sizing: the `document` whose part is written")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, unix.SIGTERM)
	defer stop()

	only, err := regexp.Compile(o.only)
	if err != nil {
		return fmt.Errorf("-only: %w", err)
	}
	amount := scale{
		rounds: 9, execs: 60, bytes: 1 << 30, connections: 500, keystrokes: 1000, calls: 500,
		sessions: 1000, forwarded: 500, containers: 500, stormWaves: 2, cut: []int{300, 1000},
	}
	if o.quick {
		amount = scale{
			rounds: 2, execs: 30, bytes: 256 << 20, connections: 100, keystrokes: 200, calls: 200,
			sessions: 200, forwarded: 100, containers: 50, stormWaves: 1, cut: []int{300},
		}
	}
	if o.rounds > 0 {
		amount.rounds = o.rounds
	}
	numbers, err := parseNumbers(o.sizing)
	if err != nil {
		return err
	}
	b, done, err := newBench(ctx, o, amount)
	if err != nil {
		return err
	}
	if len(numbers) > 0 {
		z := &sizing{bench: b, numbers: numbers, length: o.length, report: o.report}
		err = z.run(ctx)
	} else if err = b.runGroups(ctx, only); err == nil {
		err = b.write(o.output)
	}
	progress("taking the node down")
	return errors.Join(err, done())
}

// newBench brings up a node with one pod and one container.
func newBench(ctx context.Context, o options, amount scale) (b *bench, done func() error, err error) {
	program, err := filepath.Abs(o.program)
	if err != nil {
		return nil, nil, err
	}
	// Always the same folder, so that what a run that was killed has left is taken down by the next.
	dir := filepath.Join(memoryFolder(), "streamshim-bench")
	args := []string{"--log-level", "info"}
	if o.config != "" {
		file, err := filepath.Abs(o.config)
		if err != nil {
			return nil, nil, err
		}
		args = append(args, "--config", file)
	}
	n, err := node.Start(ctx, node.Config{Dir: dir, Streamshim: program, StreamshimArgs: args})
	if err != nil {
		return nil, nil, err
	}
	b = &bench{scale: amount, results: results{}, copySize: map[string]int{}}
	done = func() error {
		if b.server != nil {
			_ = b.server.listener.Close() //nolint:errcheck // nobody dials it any more
		}
		err := n.Close()
		for _, a := range b.servers {
			err = errors.Join(err, a.remove())
		}
		return errors.Join(err, os.RemoveAll(dir))
	}
	if err := b.prepare(ctx, n); err != nil {
		return nil, nil, errors.Join(err, done())
	}
	return b, done, nil
}

// memoryFolder is a folder on a tmpfs, because that is what /run is on a node: on a disk, the runtime's
// synchronous writes of a few bytes for each exec would be a large part of what is measured.
func memoryFolder() string {
	for _, folder := range []string{"/run", "/dev/shm"} {
		var stat unix.Statfs_t
		if err := unix.Statfs(folder, &stat); err == nil && stat.Type == unix.TMPFS_MAGIC {
			return folder
		}
	}
	return os.TempDir()
}

func (b *bench) prepare(ctx context.Context, n *node.Node) error {
	b.node = n
	b.sides = []side{{containerd, n.Upstream()}, {streamshim, n.Runtime()}}
	var err error
	for _, name := range []string{"containerd", "streamshim"} {
		a, err := newAccount(name, n.PID(name))
		if err != nil {
			return err
		}
		b.servers = append(b.servers, a)
	}
	if b.sandbox, err = n.RunPod(ctx, node.PodSpec{}); err != nil {
		return err
	}
	var pid int
	if b.containerID, pid, b.container, err = b.runContainer(ctx, "unconfined", runtimeapi.SecurityProfile_Unconfined); err != nil {
		return err
	}
	if b.confined.id, _, b.confined.account, err = b.runContainer(ctx, "confined", runtimeapi.SecurityProfile_RuntimeDefault); err != nil {
		return err
	}
	if b.server, err = servePod(pid); err != nil {
		return err
	}
	b.floors = floors{busybox: n.Program("busybox"), pod: pid, server: b.server}
	return nil
}

// runContainer runs a container with a seccomp profile and returns its ID, its main process, and its
// cgroup.
func (b *bench) runContainer(ctx context.Context, name string, profile runtimeapi.SecurityProfile_ProfileType) (id string, pid int, own *account, err error) {
	id, err = b.node.RunContainer(ctx, b.sandbox, node.ContainerSpec{Name: name, Change: func(c *runtimeapi.ContainerConfig) {
		c.Linux.SecurityContext.Seccomp = &runtimeapi.SecurityProfile{ProfileType: profile}
	}})
	if err != nil {
		return "", 0, nil, err
	}
	if pid, err = node.ContainerPID(ctx, b.node.Upstream(), id); err != nil {
		return "", 0, nil, err
	}
	if own, err = accountOf(pid); err != nil {
		return "", 0, nil, err
	}
	if slices.ContainsFunc(b.servers, func(a *account) bool { return a.dir == own.dir }) {
		return "", 0, nil, errors.New("the container is in its runtime's cgroup, so their CPU times cannot be told apart")
	}
	return id, pid, own, nil
}
