package main

import (
	"context"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"sync"
	"time"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/streamshim/streamshim/test/internal/node"
	"github.com/streamshim/streamshim/test/internal/wire"
)

// side is one of the two CRI endpoints of the same node.
type side struct {
	name   subject
	client runtimeapi.RuntimeServiceClient
}

// bench is everything that a measurement needs.
type bench struct {
	node        *node.Node
	scale       scale
	results     results
	sides       []side
	servers     accounts // containerd with its shims, and both streamshims
	container   *account // the processes in the container, runc's own last steps there included
	sandbox     string   // IDs
	containerID string   // without a seccomp profile, as Kubernetes has it unless told otherwise
	confined    confined
	server      *podServer
	floors      floors
	copySize    map[string]int // the best buffer size of each floor
}

// scale is how much is measured.
type scale struct {
	rounds      int
	execs       int   // for each round and side
	bytes       int64 // of each direction
	connections int
	keystrokes  int
	calls       int
	sessions    int // idle terminals
	forwarded   int // idle forwarded connections
	containers  int // in the large list
	stormWaves  int
	cut         []int // idle sessions that are cut at once
}

const (
	stormSize = 50
	// keystrokeSessions are the idle sessions while keystrokes are measured.
	keystrokeSessions = 200
	concurrency       = 16 // of short connections
)

func producerArgs(bytes int64) []string {
	return []string{"if=/dev/zero", "bs=256k", "count=" + strconv.FormatInt(bytes>>18, 10), "status=none"}
}

func consumerArgs() []string { return []string{"of=/dev/null", "bs=256k", "status=none"} }

// cpu measures what the accounts spend while do runs.
func cpu(all accounts, do func() error) (time.Duration, error) {
	before, err := all.used()
	if err != nil {
		return 0, err
	}
	if err := do(); err != nil {
		return 0, err
	}
	after, err := all.used()
	return after - before, err
}

// latencies adds a round's percentiles to the results.
func (b *bench) latencies(id string, who subject, unit time.Duration, durations []time.Duration) {
	values := in(unit, durations)
	b.results.add(id+".p50", who, percentile(values, 50))
	b.results.add(id+".p99", who, percentile(values, 99))
}

// confined is a container with the runtime's default seccomp profile.
type confined struct {
	id      string
	account *account
}

func oneExec(ctx context.Context, s side, container string) (time.Duration, error) {
	begin := time.Now()
	session, err := wire.StartExec(ctx, s.client, container, wire.Command{Args: []string{"true"}, Stderr: true})
	if err != nil {
		return 0, err
	}
	_, err = session.Finish()
	return time.Since(begin), err
}

// exec: RPC, upgrade, `true`, status, close.
func (b *bench) exec(ctx context.Context, s side) error {
	return b.execIn(ctx, "exec", s, b.containerID, b.container)
}

// execConfined is the same in a container with a seccomp profile, which runc compiles each time.
func (b *bench) execConfined(ctx context.Context, s side) error {
	return b.execIn(ctx, "seccomp", s, b.confined.id, b.confined.account)
}

func (b *bench) execIn(ctx context.Context, id string, s side, container string, inContainer *account) error {
	var durations []time.Duration
	spent, err := cpu(append(accounts{inContainer}, b.servers...), func() error {
		for range b.scale.execs {
			d, err := oneExec(ctx, s, container)
			if err != nil {
				return err
			}
			durations = append(durations, d)
		}
		return nil
	})
	b.latencies(id, s.name, time.Millisecond, durations)
	b.results.add(id+".cpu", s.name, spent.Seconds()*1000/float64(b.scale.execs))
	return err
}

func (b *bench) execSync(ctx context.Context, s side) error {
	var durations []time.Duration
	spent, err := cpu(append(accounts{b.container}, b.servers...), func() error {
		for range b.scale.execs {
			begin := time.Now()
			response, err := s.client.ExecSync(ctx, &runtimeapi.ExecSyncRequest{ContainerId: b.containerID, Cmd: []string{"true"}, Timeout: 60})
			if err != nil {
				return err
			}
			if response.ExitCode != 0 {
				return fmt.Errorf("true: exit code %d", response.ExitCode)
			}
			durations = append(durations, time.Since(begin))
		}
		return nil
	})
	b.latencies("sync", s.name, time.Millisecond, durations)
	b.results.add("sync.cpu", s.name, spent.Seconds()*1000/float64(b.scale.execs))
	return err
}

func (b *bench) storm(ctx context.Context, s side) error {
	durations := make([]time.Duration, stormSize*b.scale.stormWaves)
	for wave := range b.scale.stormWaves {
		err := atOnce(stormSize, func(i int) (err error) {
			durations[wave*stormSize+i], err = oneExec(ctx, s, b.containerID)
			return err
		})
		if err != nil {
			return err
		}
	}
	b.results.add("storm.p99", s.name, percentile(in(time.Millisecond, durations), 99))
	return nil
}

// atOnce runs n of them at the same time.
func atOnce(n int, do func(i int) error) error {
	errs := make([]error, n)
	var group sync.WaitGroup
	for i := range n {
		group.Go(func() { errs[i] = do(i) })
	}
	group.Wait()
	return errors.Join(errs...)
}

// fourAtOnce calls do for each number below n, four at the same time. Each of the four ends with its first error.
func fourAtOnce(n int, do func(i int) error) error {
	return atOnce(4, func(i int) error {
		for ; i < n; i += 4 {
			if err := do(i); err != nil {
				return err
			}
		}
		return nil
	})
}

// rate measures the throughput of do and what the servers spend; the program in the container, the
// same for both sides, is not counted.
func (b *bench) rate(id string, who subject, do func() error) error {
	begin := time.Now()
	wall := time.Duration(0)
	spent, err := cpu(b.servers, func() error {
		err := do()
		wall = time.Since(begin)
		return err
	})
	if err != nil {
		return fmt.Errorf("%s: %w", id, err)
	}
	b.addThroughput(id, who, throughputOf(b.scale.bytes, wall, spent))
	return nil
}

func (b *bench) addThroughput(id string, who subject, t throughput) {
	b.results.add(id+".rate", who, t.gigabytesPerSecond)
	b.results.add(id+".cpu", who, t.cpuSecondsPerGigabyte)
}

func (b *bench) stdout(ctx context.Context, s side) error {
	session, err := wire.StartExec(ctx, s.client, b.containerID, wire.Command{Args: append([]string{"dd"}, producerArgs(b.scale.bytes)...), Stderr: true})
	if err != nil {
		return err
	}
	first, err := session.First(session.Stdout) // the session has started and data flows
	if err != nil {
		return err
	}
	return b.rate("stdout", s.name, func() error {
		received, err := session.Finish()
		if received += int64(first); err == nil && received != b.scale.bytes {
			err = fmt.Errorf("received %d bytes of %d", received, b.scale.bytes)
		}
		return err
	})
}

// A shell around dd keeps stdout open, which dd itself closes: containerd ends a session's stdin as
// soon as its stdout has ended.
func (b *bench) stdin(ctx context.Context, s side) error {
	consumer := []string{"sh", "-c", "echo; dd " + strings.Join(consumerArgs(), " ") + "; true"}
	session, err := wire.StartExec(ctx, s.client, b.containerID, wire.Command{Args: consumer, Stdin: true, Stderr: true})
	if err != nil {
		return err
	}
	if _, err := session.First(session.Stdout); err != nil { // the session has started
		return err
	}
	return b.rate("stdin", s.name, func() error {
		uploaded := make(chan error, 1)
		go func() { uploaded <- session.Upload(session.Stdin, b.scale.bytes) }()
		_, err := session.Finish()
		return errors.Join(err, <-uploaded)
	})
}

func (b *bench) download(ctx context.Context, s side) error {
	t, err := openTunnel(ctx, s.client, b.sandbox, b.server.port)
	if err != nil {
		return err
	}
	defer t.Close() //nolint:errcheck // everything has come
	return b.rate("down", s.name, func() error {
		// Our half stays open: containerd would cut the other one a second after its end.
		data, failure, err := t.connect(podRequest(modeSource, b.scale.bytes), false)
		if err != nil {
			return err
		}
		received, err := t.await(data, failure, b.scale.bytes)
		if err == nil && received != b.scale.bytes {
			err = fmt.Errorf("received %d bytes of %d", received, b.scale.bytes)
		}
		return err
	})
}

func (b *bench) upload(ctx context.Context, s side) error {
	t, err := openTunnel(ctx, s.client, b.sandbox, b.server.port)
	if err != nil {
		return err
	}
	defer t.Close() //nolint:errcheck // everything has been answered
	return b.rate("up", s.name, func() error {
		data, _, err := t.connect(podRequest(modeSink, b.scale.bytes), false)
		if err != nil {
			return err
		}
		uploaded := make(chan error, 1)
		go func() { uploaded <- t.Conn.Upload(data, b.scale.bytes) }()
		_, err = t.First(data)
		return errors.Join(err, <-uploaded)
	})
}

func (b *bench) shortConnections(ctx context.Context, s side) error {
	t, err := openTunnel(ctx, s.client, b.sandbox, b.server.port)
	if err != nil {
		return err
	}
	defer t.Close() //nolint:errcheck // everything has come
	var durations []time.Duration
	for range b.scale.connections {
		begin := time.Now()
		data, failure, err := t.connect(podRequest(modeAnswer, 0), true)
		if err != nil {
			return err
		}
		if _, err := t.await(data, failure, untilEnd); err != nil {
			return err
		}
		durations = append(durations, time.Since(begin))
	}
	b.results.add("short.p50", s.name, percentile(in(time.Millisecond, durations), 50))
	return b.concurrentConnections(t, s)
}

// concurrentConnections keeps some connections open at any time, all over one tunnel.
func (b *bench) concurrentConnections(t *tunnel, s side) error {
	open := map[uint32]*int{} // by stream: how many streams of the connection are open
	connect := func() error {
		data, failure, err := t.connect(podRequest(modeAnswer, 0), true)
		left := 2
		open[data], open[failure] = &left, &left
		return err
	}
	begin := time.Now()
	for range concurrency {
		if err := connect(); err != nil {
			return err
		}
	}
	total := 2 * b.scale.connections
	for done, opened := 0, concurrency; done < total; {
		e, err := t.Next()
		if err != nil {
			return err
		}
		if e.Reset {
			return fmt.Errorf("stream %d was reset", e.Stream)
		}
		left := open[e.Stream]
		if !e.Fin || left == nil {
			continue
		}
		delete(open, e.Stream)
		if *left--; *left > 0 {
			continue
		}
		done++
		if opened < total {
			opened++
			if err := connect(); err != nil {
				return err
			}
		}
	}
	b.results.add("short.rate", s.name, float64(total)/time.Since(begin).Seconds())
	return nil
}

// idleSessions opens terminals, measures keystrokes among the first of them and the memory of all,
// and ends them.
func (b *bench) idleSessions(ctx context.Context, s side) (err error) {
	sessions := make([]*wire.Exec, b.scale.sessions)
	defer func() {
		ends := atOnce(concurrency, func(i int) error {
			var errs []error
			for ; i < len(sessions); i += concurrency {
				if sessions[i] != nil {
					errs = append(errs, endTerminal(sessions[i]))
				}
			}
			return errors.Join(errs...)
		})
		err = errors.Join(err, ends)
	}()
	open := func(from, to int) error {
		return atOnce(2, func(i int) error {
			for i += from; i < to; i += 2 {
				session, err := wire.StartExec(ctx, s.client, b.containerID, wire.Command{Args: []string{"cat"}, Stdin: true, TTY: true})
				if err != nil {
					return err
				}
				sessions[i] = session
				if err := echo(session); err != nil { // it has really started
					return err
				}
				session.Release()
			}
			return nil
		})
	}
	before, err := b.settledMemory()
	if err != nil {
		return err
	}
	some := min(keystrokeSessions, len(sessions))
	if err := open(0, some); err != nil {
		return err
	}
	if err := b.keystrokes(s, sessions[0]); err != nil {
		return err
	}
	if err := open(some, len(sessions)); err != nil {
		return err
	}
	after, err := b.settledMemory()
	b.results.add("idle.tty", s.name, float64(after-before)/float64(len(sessions)))
	return err
}

// settledMemory is the servers' memory once it has stopped to shrink: a garbage collector gives back
// what it has freed over some seconds.
func (b *bench) settledMemory() (int64, error) {
	least, err := b.servers.memory()
	for range 6 {
		time.Sleep(500 * time.Millisecond)
		now, err := b.servers.memory()
		if err != nil {
			return 0, err
		}
		least = min(least, now)
	}
	return least, err
}

func (b *bench) keystrokes(s side, session *wire.Exec) error {
	var durations []time.Duration
	for range b.scale.keystrokes {
		begin := time.Now()
		if err := echo(session); err != nil {
			return err
		}
		durations = append(durations, time.Since(begin))
	}
	b.latencies("key", s.name, time.Microsecond, durations)
	return nil
}

// echo types a character and waits until the terminal echoes it.
func echo(session *wire.Exec) error {
	if err := session.WriteFrames(wire.AppendData(nil, session.Stdin, false, []byte("x"))); err != nil {
		return err
	}
	return session.Expect(session.Stdout, "x")
}

// endTerminal ends the line and then the input, which ends cat.
func endTerminal(session *wire.Exec) error {
	if err := session.WriteFrames(wire.AppendData(nil, session.Stdin, false, []byte("\r\x04"))); err != nil {
		return errors.Join(err, session.Close())
	}
	_, err := session.Finish()
	return err
}

func (b *bench) idleConnections(ctx context.Context, s side) error {
	t, err := openTunnel(ctx, s.client, b.sandbox, b.server.port)
	if err != nil {
		return err
	}
	defer t.Close() //nolint:errcheck // ends them all
	before, err := b.settledMemory()
	if err != nil {
		return err
	}
	for range b.scale.forwarded {
		data, _, err := t.connect(podRequest(modeHold, 0), false)
		if err != nil {
			return err
		}
		if _, err := t.First(data); err != nil {
			return err
		}
	}
	after, err := b.settledMemory()
	b.results.add("idle.forward", s.name, float64(after-before)/float64(b.scale.forwarded))
	return err
}

// calls alternates between the sides call by call, as the difference is a small one.
func (b *bench) calls(ctx context.Context, id string, call func(runtimeapi.RuntimeServiceClient) error) error {
	durations := map[subject][]time.Duration{}
	for range b.scale.calls {
		for _, s := range b.sides {
			begin := time.Now()
			if err := call(s.client); err != nil {
				return err
			}
			durations[s.name] = append(durations[s.name], time.Since(begin))
		}
	}
	for _, s := range b.sides {
		b.results.add(id, s.name, percentile(in(time.Microsecond, durations[s.name]), 50))
	}
	return ctx.Err()
}

func (b *bench) smallCalls(ctx context.Context) error {
	return b.calls(ctx, "call.small", func(client runtimeapi.RuntimeServiceClient) error {
		_, err := client.Version(ctx, &runtimeapi.VersionRequest{})
		return err
	})
}

func (b *bench) largeCalls(ctx context.Context) error {
	return b.calls(ctx, "call.large", func(client runtimeapi.RuntimeServiceClient) error {
		response, err := client.ListContainers(ctx, &runtimeapi.ListContainersRequest{})
		if err == nil && len(response.Containers) <= b.scale.containers {
			err = fmt.Errorf("ListContainers: %d containers, not more than %d", len(response.Containers), b.scale.containers)
		}
		return err
	})
}

// floorRates measures the four bare copies, the first time with each size of buffer.
func (b *bench) floorRates() error {
	for id, measure := range map[string]func(int, int64) (throughput, error){
		"stdout": b.floors.stdout, "stdin": b.floors.stdin, "down": b.floors.download, "up": b.floors.upload,
	} {
		if b.copySize[id] == 0 {
			best := 0.0
			for _, size := range copySizes {
				t, err := measure(size, b.scale.bytes)
				if err != nil {
					return fmt.Errorf("floor of %s: %w", id, err)
				}
				if t.gigabytesPerSecond > best {
					best, b.copySize[id] = t.gigabytesPerSecond, size
				}
			}
			progress("floor of %s: the best buffer is %d KiB", id, b.copySize[id]>>10)
		}
		t, err := measure(b.copySize[id], b.scale.bytes)
		if err != nil {
			return fmt.Errorf("floor of %s: %w", id, err)
		}
		b.addThroughput(id, bareCopy, t)
	}
	return nil
}
