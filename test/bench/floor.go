package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"time"

	"golang.org/x/sys/unix"

	"github.com/streamshim/streamshim/test/internal/node"
	"github.com/streamshim/streamshim/test/internal/wire"
)

// The floor of a copy is a process that does nothing but read from one descriptor and write to the
// other. This program runs itself as that process, so that its CPU time is its own.

// copyVariable makes this program such a process; its value is the size of the buffer.
const copyVariable = "STREAMSHIM_BENCH_COPY"

// copySizes are the buffer sizes that the best is chosen from.
var copySizes = []int{64 << 10, 128 << 10, 256 << 10, 1 << 20}

const (
	copyFrom = 3 // descriptors
	copyTo   = 4
)

// copyDescriptors is that process.
func copyDescriptors(size string) error {
	n, err := strconv.Atoi(size)
	if err != nil {
		return err
	}
	buffer := make([]byte, n)
	for {
		n, err := unix.Read(copyFrom, buffer)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil || n == 0 {
			return err
		}
		for p := buffer[:n]; len(p) > 0; {
			n, err := unix.Write(copyTo, p)
			if err != nil && !errors.Is(err, unix.EINTR) {
				return err
			}
			p = p[max(n, 0):]
		}
	}
}

// throughput is the result of moving some bytes.
type throughput struct {
	gigabytesPerSecond, cpuSecondsPerGigabyte float64
}

func throughputOf(bytes int64, wall, cpu time.Duration) throughput {
	gigabytes := float64(bytes) / 1e9
	return throughput{gigabytes / wall.Seconds(), cpu.Seconds() / gigabytes}
}

// measureCopy runs the copying process between two descriptors, which it closes; consume returns
// when everything has arrived.
func measureCopy(from, to *os.File, size int, bytes int64, consume func() error) (throughput, error) {
	program, err := os.Executable()
	if err != nil {
		return throughput{}, err
	}
	process := exec.Command(program)
	process.Env = []string{copyVariable + "=" + strconv.Itoa(size)}
	process.Stderr = os.Stderr
	process.ExtraFiles = []*os.File{from, to}
	begin := time.Now()
	err = process.Start()
	err = errors.Join(err, from.Close(), to.Close())
	if err != nil {
		return throughput{}, err
	}
	consumeErr := consume()
	wall := time.Since(begin)
	if err := errors.Join(consumeErr, process.Wait()); err != nil {
		return throughput{}, err
	}
	return throughputOf(bytes, wall, process.ProcessState.UserTime()+process.ProcessState.SystemTime()), nil
}

// tcpPair is a connection over the loopback interface: the client's end, and the other as a blocking
// descriptor.
func tcpPair() (net.Conn, *os.File, error) {
	listener, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		return nil, nil, err
	}
	defer listener.Close() //nolint:errcheck // it has served its purpose
	client, err := net.Dial("tcp4", listener.Addr().String())
	if err != nil {
		return nil, nil, err
	}
	server, err := listener.Accept()
	if err != nil {
		return nil, nil, errors.Join(err, client.Close())
	}
	file, err := blockingFile(server)
	return client, file, err
}

// blockingFile turns a connection into a blocking descriptor.
func blockingFile(conn net.Conn) (*os.File, error) {
	file, err := conn.(*net.TCPConn).File()
	if err != nil {
		return nil, err
	}
	if err := unix.SetNonblock(int(file.Fd()), false); err != nil {
		return nil, err
	}
	return file, conn.Close()
}

// pipe is a pipe as large as those of streamshim.
func pipe() (read, write *os.File, err error) {
	read, write, err = os.Pipe()
	if err != nil {
		return nil, nil, err
	}
	for _, file := range []*os.File{read, write} {
		if err := unix.SetNonblock(int(file.Fd()), false); err != nil {
			return nil, nil, err
		}
	}
	// Without CAP_SYS_RESOURCE and with many pipes it stays small, as in streamshim itself.
	_, _ = unix.FcntlInt(read.Fd(), unix.F_SETPIPE_SZ, 1<<20) //nolint:errcheck // as said
	return read, write, nil
}

// receiveAll reads as the client does and wants to see so many bytes.
func receiveAll(conn net.Conn, want int64) error {
	defer conn.Close() //nolint:errcheck // everything has come
	buffer := make([]byte, wire.ReadBuffer)
	for got := int64(0); ; {
		n, err := conn.Read(buffer)
		got += int64(n)
		if errors.Is(err, io.EOF) {
			if got != want {
				return fmt.Errorf("received %d bytes, not %d", got, want)
			}
			return nil
		}
		if err != nil {
			return err
		}
	}
}

// sendAll writes as the client does.
func sendAll(conn net.Conn, total int64) error {
	batch := make([]byte, wire.FramesPerWrite*(wire.HeaderLength+wire.FrameSize))
	for sent := int64(0); sent < total; {
		n, err := conn.Write(batch[:min(int64(len(batch)), total-sent)])
		if err != nil {
			return err
		}
		sent += int64(n)
	}
	return nil
}

// floors are the bare copies that correspond to the four directions.
type floors struct {
	busybox string
	pod     int // a process in the pod, whose server is dialled
	server  *podServer
}

// producer starts busybox's dd, the same as in the container, with its output to the file.
func (f floors) dd(stdin, stdout *os.File, args ...string) (wait func() error, err error) {
	process := exec.Command(f.busybox, append([]string{"dd"}, args...)...)
	process.Stdin, process.Stdout = stdin, stdout
	if err := process.Start(); err != nil {
		return nil, err
	}
	return process.Wait, nil
}

func (f floors) stdout(size int, bytes int64) (throughput, error) {
	client, to, err := tcpPair()
	if err != nil {
		return throughput{}, err
	}
	from, write, err := pipe()
	if err != nil {
		return throughput{}, err
	}
	wait, err := f.dd(nil, write, producerArgs(bytes)...)
	if err != nil {
		return throughput{}, err
	}
	if err := write.Close(); err != nil {
		return throughput{}, err
	}
	result, err := measureCopy(from, to, size, bytes, func() error { return receiveAll(client, bytes) })
	return result, errors.Join(err, wait())
}

func (f floors) stdin(size int, bytes int64) (throughput, error) {
	client, from, err := tcpPair()
	if err != nil {
		return throughput{}, err
	}
	read, to, err := pipe()
	if err != nil {
		return throughput{}, err
	}
	wait, err := f.dd(read, nil, consumerArgs()...)
	if err != nil {
		return throughput{}, err
	}
	if err := read.Close(); err != nil {
		return throughput{}, err
	}
	return measureCopy(from, to, size, bytes, func() error {
		err := sendAll(client, bytes)
		return errors.Join(err, client.Close(), wait())
	})
}

// dial connects to the pod's server.
func (f floors) dial(request []byte) (net.Conn, error) {
	var conn net.Conn
	err := node.InNetworkNamespace(f.pod, func() (err error) {
		conn, err = net.Dial("tcp4", f.server.listener.Addr().String())
		return err
	})
	if err != nil {
		return nil, err
	}
	_, err = conn.Write(request)
	return conn, err
}

func (f floors) download(size int, bytes int64) (throughput, error) {
	client, to, err := tcpPair()
	if err != nil {
		return throughput{}, err
	}
	conn, err := f.dial(podRequest(modeSource, bytes))
	if err != nil {
		return throughput{}, err
	}
	from, err := blockingFile(conn)
	if err != nil {
		return throughput{}, err
	}
	return measureCopy(from, to, size, bytes, func() error { return receiveAll(client, bytes) })
}

func (f floors) upload(size int, bytes int64) (throughput, error) {
	client, from, err := tcpPair()
	if err != nil {
		return throughput{}, err
	}
	conn, err := f.dial(podRequest(modeSink, bytes))
	if err != nil {
		return throughput{}, err
	}
	defer conn.Close() //nolint:errcheck // everything has been answered
	to, err := conn.(*net.TCPConn).File()
	if err != nil {
		return throughput{}, err
	}
	// The answer is read through another description of the same socket, so this stays non-blocking
	// for Go; the copying process needs it blocking, and by then nothing is written here.
	if err := unix.SetNonblock(int(to.Fd()), false); err != nil {
		return throughput{}, err
	}
	return measureCopy(from, to, size, bytes, func() error {
		if err := errors.Join(sendAll(client, bytes), client.Close()); err != nil {
			return err
		}
		_, err := io.ReadFull(conn, make([]byte, 1))
		return err
	})
}

// runtimeFloor is what every exec through `runc exec` costs at least: runc alone, with the arguments that
// streamshim gives it, started by a process that does nothing else but wait for the command's end. CPU time is
// that of runc and, as for the two sides, of the container's cgroup, where its last steps happen.
func (b *bench) runtimeFloor(container string, inContainer *account, ids ...string) error {
	folder, err := os.MkdirTemp(memoryFolder(), "runc-exec")
	if err != nil {
		return err
	}
	defer os.RemoveAll(folder)
	process := filepath.Join(folder, "process.json")
	const spec = `{"user":{"uid":0,"gid":0},"args":["true"],"env":["PATH=/bin"],"cwd":"/","noNewPrivileges":true}`
	if err := os.WriteFile(process, []byte(spec), 0o600); err != nil {
		return err
	}
	var durations []time.Duration
	spentOutside := time.Duration(0)
	spent, err := cpu(accounts{inContainer}, func() error {
		for range b.scale.execs {
			command := exec.Command(b.node.Program("runc"), "--root", b.node.RuncRoot(),
				"--log", filepath.Join(folder, "log"), "--log-format", "json",
				"exec", "--process", process, "--detach", "--pid-file", filepath.Join(folder, "pid"), container)
			command.Env = []string{"PATH=" + os.Getenv("PATH")}
			begin := time.Now()
			if err := command.Run(); err != nil {
				return fmt.Errorf("runc exec: %w", err)
			}
			if err := awaitExit(filepath.Join(folder, "pid")); err != nil {
				return err
			}
			durations = append(durations, time.Since(begin))
			spentOutside += command.ProcessState.UserTime() + command.ProcessState.SystemTime()
		}
		return nil
	})
	if err != nil {
		return err
	}
	for _, id := range ids {
		b.latencies(id, bareCopy, time.Millisecond, durations)
		b.results.add(id+".cpu", bareCopy, (spent+spentOutside).Seconds()*1000/float64(b.scale.execs))
	}
	return nil
}

// awaitExit waits for the end of the process that a pid file names.
func awaitExit(pidFile string) error {
	text, err := os.ReadFile(pidFile)
	if err != nil {
		return err
	}
	pid, err := strconv.Atoi(string(text))
	if err != nil {
		return err
	}
	pidfd, err := unix.PidfdOpen(pid, 0)
	if err == unix.ESRCH {
		return nil // it was quick
	}
	if err != nil {
		return os.NewSyscallError("pidfd_open", err)
	}
	defer unix.Close(pidfd)
	for {
		_, err := unix.Poll([]unix.PollFd{{Fd: int32(pidfd), Events: unix.POLLIN}}, -1)
		if err != unix.EINTR {
			return os.NewSyscallError("poll", err)
		}
	}
}

func (b *bench) runtimeFloors(context.Context) error {
	return errors.Join(
		b.runtimeFloor(b.containerID, b.container, "exec", "sync"),
		b.runtimeFloor(b.confined.id, b.confined.account, "seccomp"),
	)
}
