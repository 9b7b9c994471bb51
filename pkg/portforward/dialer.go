package portforward

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"time"

	"golang.org/x/sys/unix"

	"github.com/streamshim/streamshim/pkg/handover"
)

// Limits of one dial. Connecting to a listener on the same machine takes microseconds; only a listener with a full
// backlog takes seconds.
const (
	DefaultTryTimeout   = 5 * time.Second
	DefaultTotalTimeout = 10 * time.Second
	// maxPodAddresses bounds the attempts after both loopback addresses have refused.
	maxPodAddresses = 8
)

// keepAlive detects a vanished peer within four minutes. Probing every 15 s, Go's default, would be most of the
// cost of an idle connection.
var keepAlive = net.KeepAliveConfig{Enable: true, Idle: 2 * time.Minute, Interval: 30 * time.Second, Count: 4}

// loopback lists the loopback addresses in the order of attempts. They are numeric because localhost would be
// looked up in the host's files, or even in DNS (kubernetes#99850, k3s#5767).
var loopback = []netip.Addr{netip.AddrFrom4([4]byte{127, 0, 0, 1}), netip.IPv6Loopback()}

// Dialer connects to ports inside pods. The zero value is ready for use. Its methods are safe for concurrent use.
type Dialer struct {
	TryTimeout   time.Duration // per address; DefaultTryTimeout if zero
	TotalTimeout time.Duration // for all addresses; DefaultTotalTimeout if zero
}

// Dial connects to a port in the network namespace mounted at netnsPath, or in this process's own if netnsPath is
// empty (a host-network pod). It tries 127.0.0.1, then ::1, then the pod's own addresses, for programs that listen
// only on the pod's address (kubernetes#72488). In the host's namespace it tries only the loopback addresses.
//
// The error is a *RefusedError if nobody listens, ErrSandboxGone if the namespace no longer exists, or the
// context's cause if the context ended first. Otherwise it is the error of the first attempt that was not refused,
// which matches os.ErrDeadlineExceeded on a timeout. The connection has Nagle's algorithm off and keepalive on. It
// keeps the namespace alive; the caller must close it.
func (d Dialer) Dial(ctx context.Context, netnsPath string, port uint16) (*net.TCPConn, error) {
	pod, err := openNamespace(netnsPath)
	if err != nil {
		return nil, err
	}
	defer pod.close()
	return d.dial(ctx, pod, port)
}

func (d Dialer) dial(ctx context.Context, pod *namespace, port uint16) (*net.TCPConn, error) {
	end := time.Now().Add(orDefault(d.TotalTimeout, DefaultTotalTimeout))
	refused := &RefusedError{Port: port}
	var obstacle error // the first error that is not a refusal
	try := func(addresses []netip.Addr) (*net.TCPConn, error) {
		for _, address := range addresses {
			deadline := time.Now().Add(orDefault(d.TryTimeout, DefaultTryTimeout))
			if end.Before(deadline) {
				deadline = end
			}
			conn, err := connect(ctx, pod, netip.AddrPortFrom(address, port), deadline)
			switch {
			case err == nil:
				return conn, nil
			case ctx.Err() != nil:
				return nil, fmt.Errorf("connect to port %d of the pod: %w", port, context.Cause(ctx))
			case !nobodyListens(err) && obstacle == nil:
				obstacle = fmt.Errorf("connect to %s of the pod: %w", netip.AddrPortFrom(address, port), err)
			}
			refused.Tried = append(refused.Tried, address)
		}
		return nil, nil
	}

	conn, err := try(loopback)
	if conn == nil && err == nil && pod.file != nil {
		var own []netip.Addr
		if own, err = pod.addresses(maxPodAddresses); err == nil {
			conn, err = try(own)
		}
	}
	switch {
	case conn != nil || err != nil:
		return conn, err
	case obstacle != nil:
		return nil, obstacle
	}
	return nil, refused
}

// connect makes one connection: the socket inside the pod's namespace, everything else outside.
func connect(ctx context.Context, pod *namespace, to netip.AddrPort, deadline time.Time) (*net.TCPConn, error) {
	if ctx.Err() != nil {
		return nil, context.Cause(ctx)
	}
	domain, address := socketAddress(to)
	fd, err := pod.socket(domain)
	if err != nil {
		return nil, err
	}
	file := os.NewFile(uintptr(fd), "tcp") // non-blocking, so it waits in Go's poller
	defer file.Close()
	raw, err := file.SyscallConn()
	if err != nil {
		return nil, err
	}
	if err := file.SetWriteDeadline(deadline); err != nil {
		return nil, err
	}
	interrupted := make(chan struct{})
	stop := context.AfterFunc(ctx, func() {
		defer close(interrupted)
		file.SetWriteDeadline(time.Unix(1, 0))
	})

	// On Linux, connect can be called again to get the state of a connection attempt: EALREADY while it lasts, 0
	// or EISCONN once connected, else its error. So spurious wakeups of the poller are harmless (golang/go#14548,
	// golang/go#19289).
	var connectErr error
	waitErr := raw.Write(func(fd uintptr) (done bool) {
		connectErr = unix.Connect(int(fd), address)
		return connectErr != unix.EINPROGRESS && connectErr != unix.EALREADY && connectErr != unix.EINTR
	})
	if !stop() {
		<-interrupted
	}
	if waitErr != nil && errors.Is(context.Cause(ctx), handover.ErrFrozen) {
		// The pod may already have the connection although we do not know yet. If it accepts only one, it must not
		// see that reset for another dial.
		raw.Control(func(fd uintptr) { //nolint:errcheck // fails on a closed socket only
			if connectErr = unix.Connect(int(fd), address); connectErr == nil || connectErr == unix.EISCONN {
				waitErr = nil
			}
		})
	}
	switch {
	case waitErr != nil:
		// The pod may have the connection all the same, and a FIN would tell it that a truncated upload is
		// complete.
		raw.Control(func(fd uintptr) { //nolint:errcheck // fails on a closed socket only
			_ = unix.SetsockoptLinger(int(fd), unix.SOL_SOCKET, unix.SO_LINGER, &unix.Linger{Onoff: 1}) // every socket has this option
		})
		return nil, waitErr
	case connectErr != nil && connectErr != unix.EISCONN:
		return nil, os.NewSyscallError("connect", connectErr)
	}

	general, err := net.FileConn(file) // duplicates the descriptor
	if err != nil {
		return nil, err
	}
	conn := general.(*net.TCPConn) // has TCP_NODELAY, like all of Go's
	// The kernel may pick as our port the very port that has no listener. The socket is then connected to itself.
	if conn.LocalAddr().(*net.TCPAddr).AddrPort() == conn.RemoteAddr().(*net.TCPAddr).AddrPort() {
		conn.SetLinger(0)
		conn.Close()
		return nil, os.NewSyscallError("connect", unix.ECONNREFUSED)
	}
	if err := conn.SetKeepAliveConfig(keepAlive); err != nil {
		conn.SetLinger(0)
		conn.Close()
		return nil, err
	}
	return conn, nil
}

// nobodyListens reports whether the error says that an address has no listener: refused, or no such address or
// address family in the namespace (IPv6 off, loopback down).
func nobodyListens(err error) bool {
	for _, each := range []error{
		unix.ECONNREFUSED, unix.EADDRNOTAVAIL, unix.EAFNOSUPPORT, unix.ENETUNREACH, unix.EHOSTUNREACH,
	} {
		if errors.Is(err, each) {
			return true
		}
	}
	return false
}

func socketAddress(to netip.AddrPort) (domain int, address unix.Sockaddr) {
	if to.Addr().Is4() {
		return unix.AF_INET, &unix.SockaddrInet4{Port: int(to.Port()), Addr: to.Addr().As4()}
	}
	return unix.AF_INET6, &unix.SockaddrInet6{Port: int(to.Port()), Addr: to.Addr().As16()}
}

func orDefault(value, standard time.Duration) time.Duration {
	if value == 0 {
		return standard
	}
	return value
}
