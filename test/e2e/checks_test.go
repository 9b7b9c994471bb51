package e2e

import (
	"archive/tar"
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/streamshim/streamshim/internal/testutil"
	"github.com/streamshim/streamshim/test/internal/kubernetes"
)

// workPod is the pod that the checks of a node share: two HTTP servers, a port that resets whoever
// sends to it, a port that never reads, and a main process that answers each line on its stdin.
var workPod = podOptions{
	command: `mkdir -p /srv/first /srv/second
echo first >/srv/first/page; echo second >/srv/second/page; truncate -s 256M /srv/first/big
httpd -p 8080 -h /srv/first; httpd -p 8081 -h /srv/second
nc -ll -p 9001 -e /bin/true </dev/null >/dev/null 2>&1 &
nc -ll -p 9002 -e sleep 2147483647 </dev/null >/dev/null 2>&1 &
echo started
while read -r line; do echo "you said: $line"; done
exec sleep 2147483647`,
}

func checkExec(ctx context.Context, t *target) (string, error) {
	o := t.run(ctx, "exec", t.pod, "--", "sh", "-c", "echo out; echo err >&2; exit 7")
	if o.code != 7 || o.stdout != "out\n" || !strings.HasPrefix(o.stderr, "err\n") {
		return "", errors.New(o.String())
	}
	return "stdout, stderr, exit code 7", nil
}

func checkExecStdin(ctx context.Context, t *target) (string, error) {
	data := randomBytes(3_000_000)
	o := t.runInput(ctx, bytes.NewReader(data), "exec", "-i", t.pod, "--", "sha256sum")
	if want := fmt.Sprintf("%x", sha256.Sum256(data)); o.code != 0 || !strings.HasPrefix(o.stdout, want) {
		return "", errors.New(o.String())
	}
	return "3 MB, same sum", nil
}

func checkExecTerminal(ctx context.Context, t *target) (string, error) {
	s, err := t.startTerminal(ctx, "exec", "-it", t.pod, "--", "sh", "-c", `echo ready; read -r line; echo "got $line"; exit 3`)
	if err != nil {
		return "", err
	}
	defer s.close()
	if err := s.expect(ctx, "ready"); err != nil {
		return "", err
	}
	if err := s.write("something\n"); err != nil {
		return "", err
	}
	code, err := s.wait(ctx)
	if err != nil {
		return "", err
	}
	if code != 3 || !strings.Contains(s.output.String(), "got something") {
		return "", fmt.Errorf("exit code %d, output %q", code, s.output.String())
	}
	return "typed line answered, exit code 3", nil
}

func checkTerminalSize(ctx context.Context, t *target) (string, error) {
	return terminalSizes(ctx, t)
}

func checkTerminalSizeFarAway(ctx context.Context, t *target) (string, error) {
	flags, end, err := farAway(ctx, t)
	if err != nil {
		return "", err
	}
	defer end()
	return terminalSizes(ctx, t, flags...)
}

func terminalSizes(ctx context.Context, t *target, flags ...string) (string, error) {
	const runs = 20
	var mu sync.Mutex
	right := 0
	parallel(runs, 2, func(int) {
		s, err := t.startTerminal(ctx, append(flags[:len(flags):len(flags)], "exec", "-it", t.pod, "--", "stty", "size")...)
		if err != nil {
			return
		}
		defer s.close()
		if _, err := s.wait(ctx); err == nil && strings.Contains(s.output.String(), "40 100") {
			mu.Lock()
			right++
			mu.Unlock()
		}
	})
	return verdict(right == runs, "right %d of %d", right, runs)
}

// verdict is a result that reads the same whether it is good or bad.
func verdict(good bool, format string, args ...any) (string, error) {
	text := fmt.Sprintf(format, args...)
	if !good {
		return "", errors.New(text)
	}
	return text, nil
}

func checkMissingCommand(ctx context.Context, t *target) (string, error) {
	o := t.run(ctx, "exec", t.pod, "--", "no-such-command")
	return verdict(o.code == 127, "exit code %d", o.code)
}

func checkBackgroundChild(ctx context.Context, t *target) (string, error) {
	number := uniqueNumber()
	defer killSleepers(number)
	// Bounded by itself: without streamshim kubectl waits for the child.
	const limit = 12 * time.Second
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	o := t.run(ctx, "exec", t.pod, "--", "sh", "-c", "sleep "+number+" & echo hi; exit 4")
	if ctx.Err() != nil {
		return "", fmt.Errorf("still open after %v", limit)
	}
	return verdict(o.code == 4 && o.stdout == "hi\n", "exit code %d, stdout %q", o.code, o.stdout)
}

func checkAttach(ctx context.Context, t *target) (string, error) {
	command := t.kubectl(ctx, "attach", "-i", t.pod)
	var output testutil.Buffer
	command.Stdout = &output
	stdin, err := command.StdinPipe() // open until the answer is there: kubectl leaves with its stdin
	if err != nil {
		return "", err
	}
	if err := command.Start(); err != nil {
		return "", err
	}
	word := "hello-" + uniqueNumber()
	if _, err := io.WriteString(stdin, word+"\n"); err != nil {
		return "", err
	}
	err = until(ctx, func() error {
		if !strings.Contains(output.String(), "you said: "+word) {
			return fmt.Errorf("no answer, output %q", output.String())
		}
		return nil
	})
	_ = stdin.Close()
	_ = command.Process.Kill() // attach has no end of its own
	_ = command.Wait()
	return "line answered", err
}

func checkLogs(ctx context.Context, t *target) (string, error) {
	if o := t.run(ctx, "logs", t.pod); !strings.HasPrefix(o.stdout, "started\n") {
		return "", errors.New(o.String())
	}
	command := t.kubectl(ctx, "logs", "-f", "--tail=0", t.pod)
	var output testutil.Buffer
	command.Stdout = &output
	if err := command.Start(); err != nil {
		return "", err
	}
	defer func() {
		_ = command.Process.Kill() // logs -f has no end of its own
		_ = command.Wait()
	}()
	word := "followed-" + uniqueNumber()
	err := until(ctx, func() error {
		if o := t.run(ctx, "exec", t.pod, "--", "sh", "-c", "echo "+word+" >/proc/1/fd/1"); o.code != 0 {
			return fatal{errors.New(o.String())}
		}
		if !strings.Contains(output.String(), word) {
			return fmt.Errorf("not followed, output %q", output.String())
		}
		return nil
	})
	return "read and followed", err
}

func checkCopyFile(ctx context.Context, t *target) (string, error) {
	there, back := filepath.Join(t.folder, "there"), filepath.Join(t.folder, "back")
	data := randomBytes(5_000_000)
	if err := os.WriteFile(there, data, 0o600); err != nil {
		return "", err
	}
	remote := t.pod + ":/tmp/" + uniqueNumber()
	for _, args := range [][]string{{"cp", there, remote}, {"cp", remote, back}} {
		if o := t.run(ctx, args...); o.code != 0 {
			return "", errors.New(o.String())
		}
	}
	got, err := os.ReadFile(back)
	if err != nil {
		return "", err
	}
	return verdict(bytes.Equal(got, data), "5 MB there, %d bytes back", len(got))
}

func checkCopyTree(ctx context.Context, t *target) (string, error) {
	there, back := filepath.Join(t.folder, "tree"), filepath.Join(t.folder, "tree-back")
	for i := range 40 {
		path := filepath.Join(there, fmt.Sprintf("folder %d/sub", i%4), fmt.Sprintf("file %d", i))
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			return "", err
		}
		if err := os.WriteFile(path, randomBytes(i*i*100), 0o600); err != nil {
			return "", err
		}
	}
	remote := t.pod + ":/tmp/" + uniqueNumber()
	for _, args := range [][]string{{"cp", there, remote}, {"cp", remote, back}} {
		if o := t.run(ctx, args...); o.code != 0 {
			return "", errors.New(o.String())
		}
	}
	want, err := contents(there)
	if err != nil {
		return "", err
	}
	got, err := contents(back)
	if err != nil {
		return "", err
	}
	return verdict(bytes.Equal(got, want), "40 files there and back")
}

// contents is a folder's files as one archive, so that two can be compared.
func contents(folder string) ([]byte, error) {
	var text bytes.Buffer
	archive := tar.NewWriter(&text)
	if err := archive.AddFS(os.DirFS(folder)); err != nil {
		return nil, err
	}
	// Times and owners may differ.
	var sum bytes.Buffer
	for reader := tar.NewReader(&text); ; {
		header, err := reader.Next()
		if errors.Is(err, io.EOF) {
			return sum.Bytes(), nil
		}
		if err != nil {
			return nil, err
		}
		hash := sha256.New()
		if _, err := io.Copy(hash, reader); err != nil {
			return nil, err
		}
		fmt.Fprintf(&sum, "%s %x\n", header.Name, hash.Sum(nil))
	}
}

// checkSlowReader is kubernetes#60140. Over WebSocket whoever translates, the kubelet or the API server,
// closes its client's connection as soon as it has the status, and the client's next ping makes its
// kernel throw away what the client has not read yet. A node can see to it that output is never cut
// without an error, and hold the status back, but not where buffers take everything and hide the reader.
func checkSlowReader(ctx context.Context, t *target) (string, error) {
	const hidden = 5 // sessions of which the node may not have seen that the reader is slow
	const rounds = 3 // a busy machine hides more of them
	var best slowReads
	for round := range rounds {
		reads := t.readSlowlyAtOnce(ctx)
		if reads.complete == slowReaders {
			return reads.String(), nil
		}
		if round == 0 || reads.complete > best.complete {
			best.complete, best.missing = reads.complete, reads.missing
		}
		best.silent += reads.silent
		if t.protocol != kubernetes.WebSocket || best.silent > 0 {
			break
		}
		if best.complete >= slowReaders-hidden {
			return "", beyondNode{errors.New(best.String())}
		}
	}
	return "", errors.New(best.String())
}

const slowReaders = 10

// slowReads is how slow readers fared.
type slowReads struct {
	complete int
	silent   int // cut, with exit code 0
	missing  int // bytes, at the most
}

func (r slowReads) String() string {
	if r.complete == slowReaders {
		return fmt.Sprintf("complete %d of %d", r.complete, slowReaders)
	}
	return fmt.Sprintf("complete %d of %d; %d cut with exit code 0; up to %.1f MB missing", r.complete, slowReaders, r.silent, float64(r.missing)/1e6)
}

// readSlowlyAtOnce lets slow readers read the output of a command each.
func (t *target) readSlowlyAtOnce(ctx context.Context) (reads slowReads) {
	const size = 20_000_000
	var mu sync.Mutex
	parallel(slowReaders, slowReaders, func(int) {
		got, code := t.readSlowly(ctx, size)
		mu.Lock()
		defer mu.Unlock()
		if got == size && code == 0 {
			reads.complete++
			return
		}
		if code == 0 {
			reads.silent++
		}
		reads.missing = max(reads.missing, size-got)
	})
	return reads
}

// readSlowly reads what a command writes at 1.25 MB/s.
func (t *target) readSlowly(ctx context.Context, size int) (got, code int) {
	command := t.kubectl(ctx, "exec", t.pod, "--", "head", "-c", fmt.Sprint(size), "/dev/zero")
	stdout, err := command.StdoutPipe()
	if err != nil || command.Start() != nil {
		return 0, -1
	}
	pace := time.NewTicker(50 * time.Millisecond)
	defer pace.Stop()
	block := make([]byte, 62_500)
	for err == nil {
		<-pace.C
		var n int
		n, err = io.ReadFull(stdout, block)
		got += n
	}
	return got, exitCode(command.Wait())
}

// checkClientKilled is kubernetes#89031.
func checkClientKilled(ctx context.Context, t *target) (string, error) {
	const limit = 20 * time.Second
	flags := []string{"-it", "-i", "none"}
	var mu sync.Mutex
	var left, failed []string
	var longest time.Duration
	parallel(len(flags), len(flags), func(i int) {
		number := uniqueNumber()
		defer killSleepers(number)
		gone, err := t.killClient(ctx, flags[i], number, limit)
		mu.Lock()
		defer mu.Unlock()
		longest = max(longest, gone)
		if errors.Is(err, errLeft) {
			left = append(left, flags[i])
		} else if err != nil {
			failed = append(failed, err.Error())
		}
	})
	if len(failed) > 0 {
		return "", errors.New(strings.Join(failed, "; "))
	}
	if len(left) > 0 {
		slices.Sort(left)
		return "", fmt.Errorf("left after %v: %s", limit, strings.Join(left, ", "))
	}
	return fmt.Sprintf("nothing left, gone within %d s", int(longest.Seconds())+1), nil
}

var errLeft = errors.New("the process was left")

func (t *target) killClient(ctx context.Context, flags, number string, limit time.Duration) (time.Duration, error) {
	args := []string{"exec", flags, t.pod, "--", "sleep", number}
	if flags == "none" {
		args = slices.Delete(args, 1, 2)
	}
	var kill func()
	if flags == "-it" {
		s, err := t.startTerminal(ctx, args...)
		if err != nil {
			return 0, err
		}
		kill = s.close
	} else {
		command := t.kubectl(ctx, args...)
		if flags == "-i" {
			stdin, err := command.StdinPipe()
			if err != nil {
				return 0, err
			}
			defer func() { _ = stdin.Close() }()
		}
		if err := command.Start(); err != nil {
			return 0, err
		}
		kill = func() {
			_ = command.Process.Kill() // it runs, or we see it by the process that never came
			_ = command.Wait()
		}
	}
	err := within(ctx, 30*time.Second, func(ctx context.Context) error { return waitSleepers(ctx, number, 1) })
	kill()
	if err != nil {
		return 0, fmt.Errorf("kubectl exec %s: the process did not start: %w", flags, err)
	}
	start := time.Now()
	if err := within(ctx, limit, func(ctx context.Context) error { return waitSleepers(ctx, number, 0) }); err != nil {
		return 0, errLeft
	}
	return time.Since(start), nil
}

func randomBytes(n int) []byte {
	data := make([]byte, n)
	source := rand.NewChaCha8([32]byte{byte(n), byte(n >> 8), byte(n >> 16)})
	_, _ = source.Read(data) // never fails
	return data
}
