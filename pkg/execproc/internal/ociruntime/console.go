package ociruntime

import (
	"fmt"
	"net"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"
)

// maxSocketPath is the size of sun_path without its final NUL, unix(7).
const maxSocketPath = 107

// ConsoleSocket receives from the runtime the master of the terminal that it made in the container's /dev/pts
// (runc, docs/terminals.md: "detached, new terminal").
type ConsoleSocket struct {
	listener *net.UnixListener
	Path     string
	tempDir  string // to be removed; set if the state directory's path was too long
}

// NewConsoleSocket listens at path, or at a shorter one if path is too long for a socket. Path holds the one used.
func NewConsoleSocket(path string) (*ConsoleSocket, error) {
	s := &ConsoleSocket{Path: path}
	if len(path) > maxSocketPath {
		dir, err := os.MkdirTemp("", "streamshim-")
		if err != nil {
			return nil, fmt.Errorf("console socket: %w", err)
		}
		s.tempDir, s.Path = dir, filepath.Join(dir, "s")
	}
	listener, err := net.ListenUnix("unix", &net.UnixAddr{Name: s.Path, Net: "unix"})
	if err != nil {
		if s.tempDir != "" {
			os.Remove(s.tempDir)
		}
		return nil, fmt.Errorf("console socket: %w", err)
	}
	s.listener = listener
	return s, nil
}

// Receive returns the terminal. The runtime has returned by now, so what it sent is in the socket's queue. The
// timeout is for a runtime that sent nothing.
func (s *ConsoleSocket) Receive(timeout time.Duration) (*os.File, error) {
	deadline := time.Now().Add(timeout)
	if err := s.listener.SetDeadline(deadline); err != nil {
		return nil, err
	}
	conn, err := s.listener.AcceptUnix()
	if err != nil {
		return nil, fmt.Errorf("the runtime did not connect to the console socket: %w", err)
	}
	defer conn.Close()
	if err := conn.SetDeadline(deadline); err != nil {
		return nil, err
	}
	name, control := messageBuffers()
	_, n, _, _, err := conn.ReadMsgUnix(name, control) // sets MSG_CMSG_CLOEXEC
	if err != nil {
		return nil, fmt.Errorf("read console socket: %w", err)
	}
	return terminalOf(control[:n])
}

// Queued returns the terminal if it was sent, without waiting. Receive with a short timeout would not do: on a busy
// machine the time may be over before the queue is looked at.
func (s *ConsoleSocket) Queued() (*os.File, error) {
	raw, err := s.listener.SyscallConn()
	if err != nil {
		return nil, fmt.Errorf("console socket: %w", err)
	}
	var conn int
	var acceptErr error
	if err := raw.Control(func(fd uintptr) {
		conn, _, acceptErr = unix.Accept4(int(fd), unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK)
	}); err != nil {
		return nil, fmt.Errorf("console socket: %w", err)
	}
	if acceptErr != nil {
		return nil, fmt.Errorf("the runtime did not connect to the console socket: %w", acceptErr)
	}
	defer unix.Close(conn) //nolint:errcheck // nothing was written
	name, control := messageBuffers()
	_, n, _, _, err := unix.Recvmsg(conn, name, control, unix.MSG_CMSG_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("read console socket: %w", err)
	}
	return terminalOf(control[:n])
}

// messageBuffers returns room for what a runtime sends: the terminal's name and its descriptor.
func messageBuffers() (name, control []byte) {
	const maxDescriptors = 8 // one is expected; leave room to receive, and close, a few extra
	return make([]byte, 4096), make([]byte, unix.CmsgSpace(4*maxDescriptors))
}

// terminalOf returns the one descriptor of a message.
func terminalOf(control []byte) (*os.File, error) {
	fds, err := parseDescriptors(control)
	if err == nil && len(fds) != 1 {
		err = fmt.Errorf("the runtime sent %d descriptors over the console socket, not one", len(fds))
	}
	if err != nil {
		for _, fd := range fds {
			unix.Close(fd)
		}
		return nil, err
	}
	// Do it before os.NewFile, which puts only non-blocking descriptors into Go's poller. A blocking one pins a
	// thread, and Close cannot interrupt it.
	if err := unix.SetNonblock(fds[0], true); err != nil {
		unix.Close(fds[0])
		return nil, fmt.Errorf("make terminal non-blocking: %w", err)
	}
	return os.NewFile(uintptr(fds[0]), "terminal"), nil
}

func parseDescriptors(control []byte) ([]int, error) {
	messages, err := unix.ParseSocketControlMessage(control)
	if err != nil {
		return nil, fmt.Errorf("console socket: %w", err)
	}
	var all []int
	for i := range messages {
		if fds, err := unix.ParseUnixRights(&messages[i]); err == nil {
			all = append(all, fds...)
		}
	}
	return all, nil
}

// Close stops listening and removes the socket.
func (s *ConsoleSocket) Close() {
	s.listener.Close() // also unlinks the path
	if s.tempDir != "" {
		os.Remove(s.tempDir)
	}
}
