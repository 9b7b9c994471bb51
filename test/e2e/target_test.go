package e2e

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/creack/pty"
	"golang.org/x/sys/unix"

	"github.com/streamshim/streamshim/internal/testutil"
	"github.com/streamshim/streamshim/test/internal/images"
	"github.com/streamshim/streamshim/test/internal/kubernetes"
	"github.com/streamshim/streamshim/test/internal/node"
)

// target is where one check runs: a node and what kubectl speaks.
type target struct {
	cluster  *kubernetes.Cluster
	node     *kubernetes.Node
	name     string // of the node in this test: "bare" or "shim"
	protocol kubernetes.Protocol
	pod      string // the node's pod that checks share
	folder   string // for files, of this check's own
	// streamshim is the program; empty where there is none.
	streamshim string
}

func (t *target) kubectl(ctx context.Context, args ...string) *exec.Cmd {
	return t.cluster.Kubectl(ctx, t.protocol, args...)
}

// outcome is how a command ended.
type outcome struct {
	stdout, stderr string
	code           int
	elapsed        time.Duration
}

func (o outcome) String() string {
	return fmt.Sprintf("exit code %d, stdout %.100q, stderr %.200q", o.code, o.stdout, o.stderr)
}

// run runs kubectl to its end.
func (t *target) run(ctx context.Context, args ...string) outcome {
	return t.runInput(ctx, nil, args...)
}

func (t *target) runInput(ctx context.Context, input io.Reader, args ...string) outcome {
	command := t.kubectl(ctx, args...)
	var stdout, stderr bytes.Buffer
	command.Stdin, command.Stdout, command.Stderr = input, &stdout, &stderr
	start := time.Now()
	err := command.Run()
	o := outcome{stdout.String(), stderr.String(), 0, time.Since(start)}
	if err != nil {
		o.code = exitCode(err)
		if ctx.Err() != nil {
			o.stderr += " (did not end in time)"
		}
	}
	return o
}

// exitCode is -1 for a command that was killed or did not run.
func exitCode(err error) int {
	if err == nil {
		return 0
	}
	if exit, ok := errors.AsType[*exec.ExitError](err); ok {
		return exit.ExitCode()
	}
	return -1
}

// must is run for commands that only prepare a check.
func (t *target) must(ctx context.Context, args ...string) (string, error) {
	if o := t.run(ctx, args...); o.code != 0 {
		return "", fmt.Errorf("kubectl %s: %s", strings.Join(args, " "), o)
	} else {
		return o.stdout, nil
	}
}

// terminal is a kubectl that runs on a terminal of 40 lines of 100 columns.
type terminal struct {
	command *exec.Cmd
	master  *os.File
	output  testutil.Buffer
	ended   chan struct{} // closed when kubectl has ended and its output has been read
	err     error         // what Wait returned, valid after ended
}

func (t *target) startTerminal(ctx context.Context, args ...string) (*terminal, error) {
	s := &terminal{command: t.kubectl(ctx, args...), ended: make(chan struct{})}
	var err error
	s.master, err = pty.StartWithSize(s.command, &pty.Winsize{Rows: 40, Cols: 100})
	if err != nil {
		return nil, err
	}
	go func() {
		defer close(s.ended)
		_, _ = io.Copy(&s.output, s.master) // ends with EIO
		s.err = s.command.Wait()
	}()
	return s, nil
}

// close ends kubectl if it still runs. The output and the exit code stay readable.
func (s *terminal) close() {
	_ = s.command.Process.Kill() // no more than a no-op when it has ended
	<-s.ended
	_ = s.master.Close()
}

func (s *terminal) write(line string) error {
	_, err := io.WriteString(s.master, line)
	return err
}

// wait waits until kubectl has ended.
func (s *terminal) wait(ctx context.Context) (int, error) {
	select {
	case <-s.ended:
		return exitCode(s.err), nil
	case <-ctx.Done():
		return 0, fmt.Errorf("kubectl still runs; its output is %q", s.output.String())
	}
}

// expect waits until the output contains the text.
func (s *terminal) expect(ctx context.Context, text string) error {
	err := until(ctx, func() error {
		if strings.Contains(s.output.String(), text) {
			return nil
		}
		select {
		case <-s.ended:
			return fatal{fmt.Errorf("kubectl ended with exit code %d", exitCode(s.err))}
		default:
			return errors.New("not there yet")
		}
	})
	if err != nil {
		return fmt.Errorf("no %q in the output %.200q: %w", text, s.output.String(), err)
	}
	return nil
}

// fatal is an error that makes until stop asking.
type fatal struct{ error }

// until asks again and again until there is no error.
func until(ctx context.Context, ask func() error) error {
	retry := time.NewTicker(100 * time.Millisecond)
	defer retry.Stop()
	for {
		err := ask()
		if stop := (fatal{}); err == nil || errors.As(err, &stop) {
			return err
		}
		select {
		case <-ctx.Done():
			return err
		case <-retry.C:
		}
	}
}

// podOptions are what the checks' pods differ in.
type podOptions struct {
	name    string
	command string // of sh -c; sleeps for ever when empty
	pod     string // more fields of the pod's spec, in YAML's flow form
	main    string // more fields of the container, likewise
}

// createPod makes a pod on the target's node and does not wait for it.
func (t *target) createPod(ctx context.Context, options podOptions) error {
	command := options.command
	if command == "" {
		command = "exec sleep 2147483647"
	}
	extra := func(fields string) string {
		if fields == "" {
			return ""
		}
		return ", " + fields
	}
	manifest := fmt.Sprintf(`{apiVersion: v1, kind: Pod, metadata: {name: %s}, spec: {
nodeName: %s, automountServiceAccountToken: false, enableServiceLinks: false, dnsPolicy: Default,
terminationGracePeriodSeconds: 1, containers: [{name: main, image: %q, imagePullPolicy: IfNotPresent, stdin: true,
command: [sh, -c, %q]%s}]%s}}`, options.name, t.node.Address, node.Image(images.Busybox), command, extra(options.main), extra(options.pod))
	if o := t.runInput(ctx, strings.NewReader(manifest), "create", "-f", "-"); o.code != 0 {
		return fmt.Errorf("create pod %s: %s", options.name, o)
	}
	return nil
}

// runPod makes a pod and waits until it is Ready. Delete it with deletePod.
func (t *target) runPod(ctx context.Context, options podOptions) error {
	if err := t.createPod(ctx, options); err != nil {
		return err
	}
	if o := t.run(ctx, "wait", "--for=condition=Ready", "--timeout=60s", "pod/"+options.name); o.code != 0 {
		why := t.run(ctx, "get", "events", "--field-selector", "involvedObject.name="+options.name, "-o", "jsonpath={range .items[*]}{.message}{\"\\n\"}{end}")
		return fmt.Errorf("pod %s does not become Ready: %s%s", options.name, o.stderr, why.stdout)
	}
	return nil
}

// deletePod removes a pod, in the background of the cluster.
func (t *target) deletePod(name string) {
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	_ = t.run(ctx, "delete", "pod", name, "--wait=false", "--ignore-not-found", "--grace-period=0", "--force")
}

// podField reads one field of a pod by a JSON path.
func (t *target) podField(ctx context.Context, pod, path string) (string, error) {
	return t.must(ctx, "get", "pod", pod, "-o", "jsonpath={"+path+"}")
}

var uniqueNumbers atomic.Int64

// uniqueNumber is an argument for sleep that no other process on this machine has.
func uniqueNumber() string {
	return strconv.FormatInt(1_000_000_000+int64(os.Getpid()%1_000_000)*1000+uniqueNumbers.Add(1), 10)
}

// sleepers returns the processes, in all containers, whose last two arguments are "sleep" and the number.
func sleepers(number string) []int {
	var pids []int
	paths, _ := filepath.Glob("/proc/[0-9]*/cmdline") // the pattern is well-formed
	for _, path := range paths {
		text, err := os.ReadFile(path)
		if err != nil || !bytes.HasSuffix(text, []byte("\x00"+number+"\x00")) {
			continue
		}
		arguments := strings.Split(strings.TrimSuffix(string(text), "\x00"), "\x00")
		if len(arguments) == 2 && filepath.Base(arguments[0]) == "sleep" {
			if pid, err := strconv.Atoi(filepath.Base(filepath.Dir(path))); err == nil {
				pids = append(pids, pid)
			}
		}
	}
	return pids
}

// waitSleepers waits until there are so many of them.
func waitSleepers(ctx context.Context, number string, count int) error {
	return until(ctx, func() error {
		if pids := sleepers(number); len(pids) != count {
			return fmt.Errorf("%d processes instead of %d", len(pids), count)
		}
		return nil
	})
}

// killSleepers ends what a check on bare containerd has left behind.
func killSleepers(numbers ...string) {
	for _, number := range numbers {
		for _, pid := range sleepers(number) {
			_ = unix.Kill(pid, unix.SIGKILL) // gone meanwhile is as good
		}
	}
}

// within bounds a step of a check.
func within(ctx context.Context, limit time.Duration, step func(context.Context) error) error {
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	return step(ctx)
}

// parallel runs a function for 0 to n-1 at the same time, at most limit at once.
func parallel(n, limit int, run func(i int)) {
	var group sync.WaitGroup
	slots := make(chan struct{}, limit)
	for i := range n {
		slots <- struct{}{}
		group.Go(func() {
			defer func() { <-slots }()
			run(i)
		})
	}
	group.Wait()
}

// oneLine makes an error's text fit for a cell of a table.
func oneLine(text string) string {
	text = strings.Join(strings.Fields(text), " ")
	text = strings.ReplaceAll(text, "|", `\|`)
	if runes := []rune(text); len(runes) > 160 {
		text = string(slices.Concat(runes[:159], []rune("…")))
	}
	return text
}
