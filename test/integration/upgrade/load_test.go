package upgrade

import (
	"bufio"
	"bytes"
	"context"
	"crypto/md5"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"hash"
	"io"
	"net"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"k8s.io/client-go/tools/remotecommand"

	"github.com/streamshim/streamshim/internal/testutil"
	"github.com/streamshim/streamshim/test/internal/harness"
	"github.com/streamshim/streamshim/test/internal/node"
)

// load is a set of sessions that move data until they are told to end.
type load struct {
	t         *testing.T
	shim      *harness.Streamshim
	container string
	stop      chan struct{} // closed when the sessions must end
	running   sync.WaitGroup
	live      atomic.Int64 // sessions that have shown that they work
	moved     atomic.Int64 // bytes
	handovers atomic.Int64 // so far
	forwards  []*harness.Forward
}

func newLoad(t *testing.T, shim *harness.Streamshim, container string) *load {
	return &load{t: t, shim: shim, container: container, stop: make(chan struct{})}
}

// finish tells all sessions to end as they should, and waits for that.
func (l *load) finish() {
	close(l.stop)
	done := make(chan struct{})
	go func() {
		defer close(done)
		l.running.Wait()
	}()
	select {
	case <-done:
	case <-time.After(2 * testutil.Patience):
		l.t.Error("some sessions do not end")
	}
	for _, f := range l.forwards {
		f.Close()
	}
}

func (l *load) stopping() bool {
	select {
	case <-l.stop:
		return true
	default:
		return false
	}
}

// slowly returns the pause at this run's pace. pause is that at a pace of 1.
func slowly(pause time.Duration) time.Duration { return time.Duration(*pace) * pause }

// begin runs one session of a kind.
func (l *load) begin(name string, run func() error) {
	l.running.Go(func() {
		if err := run(); err != nil {
			l.t.Errorf("%s: %v", name, err)
		}
	})
}

// session is a session whose stdin and stdout are the test's.
type session struct {
	in    *io.PipeWriter
	out   *bufio.Reader
	ended chan error
}

func (l *load) exec(transport string, tty bool, args ...string) *session {
	stdin, in := io.Pipe()
	out, stdout := io.Pipe()
	s := &session{in: in, out: bufio.NewReaderSize(out, 64<<10), ended: make(chan error, 1)}
	options := remotecommand.StreamOptions{Stdin: stdin, Stdout: stdout, Tty: tty}
	u := l.shim.ExecURL(l.t, l.container, options, args...)
	l.running.Go(func() {
		err := harness.Stream(context.WithoutCancel(l.t.Context()), transport, u.String(), options)
		stdout.CloseWithError(io.EOF)
		stdin.CloseWithError(errors.New("the session has ended"))
		s.ended <- err
	})
	return s
}

// wantSum ends the input of a command that then prints a sum, and returns an error unless it is this one and the session ends
// with this exit code.
func (s *session) wantSum(sum []byte, code int) error {
	s.in.Close()
	line, err := s.out.ReadString('\n')
	if err != nil {
		return err
	}
	go io.Copy(io.Discard, s.out)
	if want := hex.EncodeToString(sum); !strings.HasPrefix(line, want) {
		return fmt.Errorf("sum %q, want %s", line, want)
	}
	return s.wantExit(code)
}

// wantExit returns an error unless the session has ended with this exit code.
func (s *session) wantExit(code int) error {
	select {
	case err := <-s.ended:
		if got := harness.ExitCodeOf(err); got != code {
			return fmt.Errorf("ended with %w, want exit code %d", err, code)
		}
		return nil
	case <-time.After(testutil.Patience):
		return errors.New("it does not end")
	}
}

// terminal types a line into a shell and waits for its output, again and again.
func (l *load) terminal(transport string) {
	s := l.exec(transport, true, "sh")
	l.begin("terminal over "+transport, func() error {
		for i := 0; ; i++ {
			if l.stopping() {
				io.WriteString(s.in, "exit 3\n")
				go io.Copy(io.Discard, s.out)
				return s.wantExit(3)
			}
			if _, err := fmt.Fprintf(s.in, "echo a$((%d * 3))b\n", i); err != nil {
				return fmt.Errorf("typing line %d: %w", i, err)
			}
			want := fmt.Sprintf("a%db", i*3)
			for {
				line, err := s.out.ReadString('\n')
				l.moved.Add(int64(len(line)))
				if err != nil {
					return fmt.Errorf("after line %d: %w", i, err)
				}
				if strings.Contains(line, want) {
					break
				}
				if strings.Contains(line, "a") && strings.HasSuffix(strings.TrimSpace(line), "b") && !strings.Contains(line, "echo") {
					return fmt.Errorf("%q instead of %q", line, want)
				}
			}
			if i == 0 {
				l.live.Add(1)
			}
			time.Sleep(slowly(10 * time.Millisecond))
		}
	})
}

// echo sends numbered bytes through cat and checks that each comes back.
func (l *load) echo(transport string) {
	s := l.exec(transport, false, "cat")
	l.begin("cat over "+transport, func() error {
		sent := sha256.New()
		var n atomic.Int64
		go func() {
			defer s.in.Close()
			for i := 0; !l.stopping(); i++ {
				block := numbered(i, 16<<10)
				if _, err := s.in.Write(block); err != nil {
					return // shows in what comes back
				}
				sent.Write(block)
				n.Add(int64(len(block)))
				time.Sleep(slowly(time.Millisecond))
			}
		}()
		got := sha256.New()
		received, err := l.copy(got, s.out)
		if err != nil {
			return err
		}
		if err := s.wantExit(0); err != nil {
			return err
		}
		if received != n.Load() || !bytes.Equal(got.Sum(nil), sent.Sum(nil)) {
			return fmt.Errorf("%d bytes came back of %d, or others", received, n.Load())
		}
		return nil
	})
}

// copy copies, and counts a session as live with the first byte.
func (l *load) copy(to hash.Hash, from io.Reader) (n int64, err error) {
	buffer := make([]byte, 64<<10)
	for {
		m, err := from.Read(buffer)
		if m > 0 && n == 0 {
			l.live.Add(1)
		}
		n += int64(m)
		l.moved.Add(int64(m))
		to.Write(buffer[:m])
		if err == io.EOF {
			return n, nil
		}
		if err != nil {
			return n, err
		}
	}
}

// numbered returns a block. No two parts of it are equal.
func numbered(i, size int) []byte {
	block := make([]byte, 0, size+32)
	for n := 0; len(block) < size; n++ {
		block = strconv.AppendInt(append(block, ' '), int64(i*1_000_000+n), 10)
	}
	return block
}

// upload sends bytes to sha256sum and compares the sum.
func (l *load) upload(transport string) {
	s := l.exec(transport, false, "sha256sum")
	l.begin("upload over "+transport, func() error {
		sent := sha256.New()
		for i := 0; !l.stopping(); i++ {
			block := numbered(i, 32<<10)
			if _, err := s.in.Write(block); err != nil {
				return fmt.Errorf("block %d: %w", i, err)
			}
			sent.Write(block)
			l.moved.Add(int64(len(block)))
			if i == 0 {
				l.live.Add(1)
			}
			time.Sleep(slowly(time.Millisecond))
		}
		return s.wantSum(sent.Sum(nil), 0)
	})
}

const blockSize = 1 << 20 // bytes, so that -size counts blocks

// putBlock puts a file of random bytes into the container and returns its content.
func (l *load) putBlock() []byte {
	l.t.Helper()
	block := make([]byte, blockSize)
	rand.Read(block)
	options := remotecommand.StreamOptions{Stdin: bytes.NewReader(block), Stdout: io.Discard}
	if err := l.shim.Exec(l.t, "SPDY", l.container, options, "sh", "-c", "cat > /tmp/block"); err != nil {
		l.t.Fatal(err)
	}
	return block
}

// awaitTurn returns when block i of -size may be moved. The blocks are spread evenly over all hand-overs, and the last one
// waits for the last hand-over. When the sessions must end, what is left is moved at once.
func (l *load) awaitTurn(i int) {
	pause := time.NewTimer(time.Duration(*times) * *apart / time.Duration(*size))
	defer pause.Stop()
	select {
	case <-pause.C:
	case <-l.stop:
		return
	}
	phase := int64(i * (*times + 1) / *size) // the time after so many hand-overs
	for l.handovers.Load() < phase {
		select {
		case <-time.After(time.Millisecond):
		case <-l.stop:
			return
		}
	}
}

// heading comes before each block that is moved, so that a block that is lost or doubled shows.
func heading(i int) string { return fmt.Sprintf("block %d\n", i) }

// largeOutput has one session write -size blocks to its client, and compares each byte. The command writes a block for each line
// that it gets.
func (l *load) largeOutput(transport string, block []byte) {
	s := l.exec(transport, false, "sh", "-c", "i=0; while read -r line; do echo block $i; cat /tmp/block; i=$((i+1)); done; exit 6")
	l.begin("large output over "+transport, func() error {
		go func() {
			defer s.in.Close()
			for i := range *size {
				l.awaitTurn(i)
				if _, err := io.WriteString(s.in, "next\n"); err != nil {
					return // shows in what comes
				}
			}
		}()
		got := make([]byte, blockSize)
		for i := range *size {
			if line, err := s.out.ReadString('\n'); line != heading(i) {
				return fmt.Errorf("before block %d comes %.40q, %w", i, line, err)
			}
			if i == 0 {
				l.live.Add(1)
			}
			if n, err := io.ReadFull(s.out, got); err != nil || !bytes.Equal(got, block) {
				return fmt.Errorf("of block %d come %d bytes, or others: %w", i, n, err)
			}
			l.moved.Add(blockSize)
		}
		if n, err := io.Copy(io.Discard, s.out); n > 0 || err != nil {
			return fmt.Errorf("behind all blocks come %d bytes, %w", n, err)
		}
		return s.wantExit(6)
	})
}

// largeInput has one session read -size blocks from its client, and checks their sum.
func (l *load) largeInput(transport string, block []byte) {
	s := l.exec(transport, false, "sh", "-c", "md5sum; exit 8")
	l.begin("large input over "+transport, func() error {
		sent := md5.New() // three times as quick as SHA-256, and nobody forges
		for i := range *size {
			l.awaitTurn(i)
			to := io.MultiWriter(sent, s.in)
			if _, err := io.WriteString(to, heading(i)); err != nil {
				return fmt.Errorf("block %d: %w", i, err)
			}
			if _, err := to.Write(block); err != nil {
				return fmt.Errorf("block %d: %w", i, err)
			}
			l.moved.Add(blockSize)
			if i == 0 {
				l.live.Add(1)
			}
		}
		return s.wantSum(sent.Sum(nil), 8)
	})
}

// count reads lines with consecutive numbers from a command that ends with its stdin.
func (l *load) count(transport string) {
	script := fmt.Sprintf("i=0; while true; do seq $i $((i+999)) || exit; i=$((i+1000)); sleep %f; done & cat >/dev/null; kill $!; wait $!; echo end; exit 5",
		slowly(20*time.Millisecond).Seconds())
	s := l.exec(transport, false, "sh", "-c", script)
	l.begin("numbers over "+transport, func() error {
		for i := 0; ; i++ {
			line, err := s.out.ReadString('\n')
			if err != nil {
				return fmt.Errorf("after %d: %w", i, err)
			}
			l.moved.Add(int64(len(line)))
			if strings.HasSuffix(line, "end\n") {
				go io.Copy(io.Discard, s.out)
				return s.wantExit(5)
			}
			// The signal may cut the last one.
			if want := strconv.Itoa(i) + "\n"; line != want && !l.stopping() {
				return fmt.Errorf("%q instead of %q", line, want)
			}
			if i == 0 {
				l.live.Add(1)
			}
			if l.stopping() {
				s.in.Close()
			}
		}
	})
}

// silent does nothing until its end, which its exit code shows.
func (l *load) silent(transport string) {
	s := l.exec(transport, false, "sh", "-c", "echo ready; read -r word; exit $word")
	l.begin("silent over "+transport, func() error {
		if line, err := s.out.ReadString('\n'); err != nil || line != "ready\n" {
			return fmt.Errorf("%q, %w", line, err)
		}
		l.live.Add(1)
		<-l.stop
		io.WriteString(s.in, "7\n")
		go io.Copy(io.Discard, s.out)
		return s.wantExit(7)
	})
}

// short runs one command after the other, each with input and output.
func (l *load) short(transport string) {
	l.begin("short over "+transport, func() error {
		for i := 0; !l.stopping(); i++ {
			var out bytes.Buffer
			input := strconv.Itoa(i)
			options := remotecommand.StreamOptions{Stdin: strings.NewReader(input), Stdout: &out}
			u := l.shim.ExecURL(l.t, l.container, options, "sh", "-c", "cat; exit 4")
			err := harness.Stream(context.WithoutCancel(l.t.Context()), transport, u.String(), options)
			if harness.ExitCodeOf(err) != 4 || out.String() != input {
				return fmt.Errorf("run %d: %q, %w", i, out.String(), err)
			}
			if i == 0 {
				l.live.Add(1)
			}
			time.Sleep(slowly(100*time.Millisecond) - 100*time.Millisecond)
		}
		return nil
	})
}

// attach reads the numbers that a container's main process prints.
func (l *load) attach(transport, container string) {
	out, stdout := io.Pipe()
	options := remotecommand.StreamOptions{Stdout: stdout}
	u := l.shim.AttachURL(l.t, container, options)
	ctx, cancel := context.WithCancel(context.WithoutCancel(l.t.Context()))
	l.running.Go(func() {
		err := harness.Stream(ctx, transport, u.String(), options)
		if err == nil {
			err = io.EOF
		}
		stdout.CloseWithError(err)
	})
	l.begin("attach over "+transport, func() error {
		defer cancel()
		defer out.Close()
		lines := bufio.NewReader(out)
		last := -1
		for i := 0; ; i++ {
			line, err := lines.ReadString('\n')
			if l.stopping() {
				return nil
			}
			if err != nil {
				return fmt.Errorf("after %d: %w", last, err)
			}
			l.moved.Add(int64(len(line)))
			n, err := strconv.Atoi(strings.TrimSpace(line))
			if err != nil || last >= 0 && n != last+1 {
				return fmt.Errorf("%q after %d", line, last)
			}
			if last < 0 {
				l.live.Add(1)
			}
			last = n
		}
	})
}

// forward opens connections to an echo server in the pod over one port-forward. They send and read back until the end.
func (l *load) forward(pod *harness.Pod, transport string, connections int) {
	port := pod.Listen("127.0.0.1", func(conn *net.TCPConn) {
		io.Copy(conn, conn)
		conn.CloseWrite()
	})
	f := harness.StartForward(l.t, l.shim.Runtime, pod.ID, transport, port)
	l.forwards = append(l.forwards, f)
	for range connections {
		conn, err := f.Dial(port)
		if err != nil {
			l.t.Fatal(err)
		}
		conn.SetDeadline(time.Time{})
		sent, got := sha256.New(), sha256.New()
		l.begin("forwarded connection over "+transport+", there", func() error {
			defer conn.CloseWrite()
			for i := 0; !l.stopping(); i++ {
				block := numbered(i, 8<<10)
				if _, err := conn.Write(block); err != nil {
					return err
				}
				sent.Write(block)
				time.Sleep(slowly(5 * time.Millisecond))
			}
			return nil
		})
		l.begin("forwarded connection over "+transport+", and back", func() error {
			defer conn.Close()
			if _, err := l.copy(got, conn); err != nil {
				return err
			}
			if !bytes.Equal(sent.Sum(nil), got.Sum(nil)) {
				return errors.New("not what was sent came back")
			}
			return nil
		})
	}
}

// probe does what the kubelet does, every 200 ms.
func (l *load) probe() {
	l.begin("probe", func() error {
		ticker := time.NewTicker(200 * time.Millisecond)
		defer ticker.Stop()
		longest := time.Duration(0)
		for i := 0; ; i++ {
			select {
			case <-l.stop:
				l.t.Logf("%d probes, the longest took %v", i, longest)
				return nil
			case <-ticker.C:
			}
			start := time.Now()
			response, err := l.shim.ExecSync(l.t.Context(), l.container, 10*time.Second, "echo", "alive")
			longest = max(longest, time.Since(start))
			if err != nil || response.ExitCode != 0 || string(response.Stdout) != "alive\n" {
				return fmt.Errorf("probe %d: %v, %w", i, response, err)
			}
		}
	})
}

// await waits until this many sessions have shown that they work.
func (l *load) await(n int64) {
	testutil.Eventually(l.t, fmt.Sprintf("%d sessions are live", n), func() bool { return l.live.Load() >= n || l.t.Failed() })
}

// counter runs a container whose main process prints numbers.
func counter(t *testing.T) string {
	return harness.RunContainer(t, node.ContainerSpec{Command: []string{"sh", "-c", "i=0; while true; do echo $i; i=$((i+1)); sleep 0.05; done"}})
}
