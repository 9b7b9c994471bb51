package main

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"strconv"
	"time"

	"golang.org/x/sys/unix"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/streamshim/streamshim/test/internal/wire"
)

// death is how a client ends before its session does.
type death string

const (
	reset    death = "rst"        // the connection is reset, as when a process is killed with unread data
	finished death = "fin"        // it is closed
	halfShut death = "half-shut"  // only the client's direction is closed, and the rest a while later
	torn     death = "torn-frame" // in the middle of a frame
	mute     death = "mute"       // the client does not read any more, then it is reset
	lost     death = "lost"       // no packet reaches the client any more, and none comes from it
)

var deaths = []death{reset, finished, halfShut, torn, mute, lost}

// lostTime is how long a lost client stays lost: longer than the 55 s after which streamshim must have noticed.
const lostTime = 70 * time.Second

// doomedCommands are what runs while the client dies. None of them ends by itself.
var doomedCommands = []wire.Command{
	{Args: []string{"sh", "-c", "sleep 100000 & wait"}, Stdin: true, Stderr: true},
	{Args: []string{"sh", "-c", "sleep 100000 & wait"}, Stdin: true, TTY: true},
	{Args: []string{"yes"}, Stderr: true},
	{Args: []string{"yes"}, TTY: true},
	{Args: []string{"sh", "-c", "trap '' HUP TERM; while :; do sleep 1; done"}, Stdin: true, Stderr: true},
	{Args: []string{"sh", "-c", "(sleep 100000 | sleep 100000 | sleep 100000) & sleep 100000"}, Stdin: true, Stderr: true},
	{Args: []string{"cat"}, Stdin: true, Stderr: true},
}

// hostileCommands are run in hostile pods alone, where they may leave daemons behind, which nobody can find.
var hostileCommands = []wire.Command{
	{Args: []string{"sh", "-c", "for i in 1 2 3 4 5 6; do setsid sh -c 'sleep 300 & sleep 300' & done; wait"}, Stdin: true, Stderr: true},
	{Args: []string{"sh", "-c", "f() { f | f & }; f; sleep 300"}, Stdin: true, Stderr: true},
	{Args: []string{"sh", "-c", "while :; do sh -c 'sleep 0.01' & done"}, Stdin: true, Stderr: true},
	{Args: []string{"tail", "/dev/zero"}, Stderr: true},
	{Args: []string{"sh", "-c", "while :; do (trap '' HUP TERM; sleep 300) & sleep 0.05; done"}, Stdin: true, TTY: true},
	{Args: []string{"sh", "-c", "exec 3<>/dev/zero; i=4; while [ $i -lt 250 ]; do eval \"exec $i<&1\"; i=$((i+1)); done; sleep 300"}, Stdin: true, Stderr: true},
}

// doomed is a session whose client dies. That nothing stays of it is looked at in the end.
func doomed(command wire.Command, how death) func(context.Context, *client) error {
	return func(ctx context.Context, c *client) error {
		session, err := c.start(ctx, command)
		if err != nil {
			return err
		}
		// What goes wrong from here on is the client's own doing.
		_ = session.SetDeadline(time.Now().Add(2 * sessionLimit))
		alive := between(c.r, 0, 3*time.Second)
		end := time.Now().Add(alive)
		if how == mute {
			alive = between(c.r, time.Second, 10*time.Second)
			pause(ctx, alive)
		}
		_ = session.SetReadDeadline(end)
		for err := error(nil); err == nil; {
			_, err = session.Next()
		}
		c.die(ctx, session.Conn, how, session.Stdin)
		return nil
	}
}

// die ends the connection.
func (c *client) die(ctx context.Context, conn *wire.Conn, how death, stream uint32) {
	defer conn.Close() //nolint:errcheck // it is to be broken
	tcp := conn.Conn.(*net.TCPConn)
	switch how {
	case reset, mute:
		_ = tcp.SetLinger(0)
	case halfShut:
		_ = tcp.CloseWrite()
		pause(ctx, between(c.r, time.Second, 5*time.Second))
	case torn:
		frame := wire.AppendData(nil, stream, false, make([]byte, 1000))
		_ = conn.WriteFrames(frame[:1+c.r.IntN(len(frame)-1)]) //nolint:errcheck // as above
	case lost:
		if err := deafen(tcp); err != nil {
			c.s.violated(faultTrouble, "cut a client off: %v", err)
			return
		}
		pause(ctx, lostTime)
	}
}

// deafen makes the kernel drop all packets that come for a connection, so that nothing is acknowledged and no probe
// answered, as when a network is gone.
func deafen(conn *net.TCPConn) error {
	raw, err := conn.SyscallConn()
	if err != nil {
		return err
	}
	drop := []unix.SockFilter{{Code: unix.BPF_RET | unix.BPF_K, K: 0}}
	program := unix.SockFprog{Len: 1, Filter: &drop[0]}
	controlErr := raw.Control(func(fd uintptr) {
		err = unix.SetsockoptSockFprog(int(fd), unix.SOL_SOCKET, unix.SO_ATTACH_FILTER, &program)
	})
	return errors.Join(err, controlErr)
}

// doomedWebSocket is a WebSocket session whose client vanishes while output flows.
func doomedWebSocket(ctx context.Context, c *client) error {
	conn, err := c.webSocket(ctx, &runtimeapi.ExecRequest{
		ContainerId: c.pod.shell, Cmd: []string{"yes"}, Stdin: true, Stdout: true, Stderr: true,
	})
	if err != nil {
		return err
	}
	defer conn.Close() //nolint:errcheck // it is to be broken
	pause(ctx, between(c.r, 0, 2*time.Second))
	_ = conn.NetConn().(*net.TCPConn).SetLinger(c.r.IntN(2) - 1)
	return nil
}

// halfUpgraded asks for a URL and opens it wrongly or incompletely.
func halfUpgraded(ctx context.Context, c *client) error {
	bounded, cancel := context.WithTimeout(ctx, callLimit)
	defer cancel()
	response, err := c.runtime().Exec(bounded, &runtimeapi.ExecRequest{ContainerId: c.pod.shell, Cmd: []string{"true"}, Stdout: true, Stderr: true})
	if err != nil {
		return fmt.Errorf("start: %w", err)
	}
	if c.r.IntN(3) == 0 {
		return nil // never opened
	}
	conn, err := wire.Upgrade(response.Url, "v4.channel.k8s.io")
	if err != nil {
		return err
	}
	frames, _ := conn.AppendStream(nil, "streamtype", "error")
	_ = conn.WriteFrames(frames[:c.r.IntN(len(frames))]) //nolint:errcheck // as below
	pause(ctx, between(c.r, 0, 3*time.Second))
	c.die(ctx, conn, []death{reset, finished}[c.r.IntN(2)], 0)
	return nil
}

// doomedSync is an ExecSync whose caller goes away, or whose timeout is over, while the command runs.
func doomedSync(ctx context.Context, c *client) error {
	limit := callLimit
	timeout := int64(1)
	if c.r.IntN(2) == 0 {
		limit, timeout = between(c.r, 50*time.Millisecond, 2*time.Second), 30
	}
	bounded, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	response, err := c.runtime().ExecSync(bounded, &runtimeapi.ExecSyncRequest{
		ContainerId: c.pod.shell, Cmd: []string{"sh", "-c", "sleep 100000 & sleep 100000"}, Timeout: timeout,
	})
	if response.GetExitCode() != 0 { // killed with its pod
		return fmt.Errorf("exit code %d", response.GetExitCode())
	}
	if err == nil {
		return wrongError{"an ExecSync that cannot end has succeeded"}
	}
	return nil
}

// doomedForward leaves a forwarded connection in the middle of its data.
func doomedForward(ctx context.Context, c *client) error {
	bounded, cancel := context.WithTimeout(ctx, callLimit)
	defer cancel()
	response, err := c.runtime().PortForward(bounded, &runtimeapi.PortForwardRequest{PodSandboxId: c.pod.sandbox})
	if err != nil {
		return fmt.Errorf("start: %w", err)
	}
	conn, err := wire.Upgrade(response.Url, "portforward.k8s.io")
	if err != nil {
		return err
	}
	port := strconv.Itoa(int(c.pod.port))
	frames, _ := conn.AppendStream(nil, "streamtype", "error", "port", port, "requestid", "1")
	frames, data := conn.AppendStream(frames, "streamtype", "data", "port", port, "requestid", "1")
	_ = conn.WriteFrames(wire.AppendData(frames, data, false, []byte("100000\n"))) //nolint:errcheck // it is to be broken
	pause(ctx, between(c.r, 0, 2*time.Second))
	c.die(ctx, conn, deaths[c.r.IntN(len(deaths)-1)], data) // all but lost
	return nil
}

// chooseDoomed chooses a session whose client dies.
func chooseDoomed(r *rand.Rand) sessionKind {
	switch r.IntN(10) {
	case 0:
		return sessionKind{name: "dying-websocket", run: doomedWebSocket}
	case 1:
		return sessionKind{name: "half-upgraded", run: halfUpgraded}
	case 2:
		return sessionKind{name: "dying-execsync", run: doomedSync}
	case 3:
		return sessionKind{name: "dying-forward", run: doomedForward}
	}
	how := deaths[r.IntN(len(deaths))]
	return sessionKind{name: "dying-" + string(how), run: doomed(doomedCommands[r.IntN(len(doomedCommands))], how)}
}

func chooseHostile(r *rand.Rand) sessionKind {
	how := []death{reset, finished, mute}[r.IntN(3)]
	return sessionKind{name: "hostile-" + string(how), run: doomed(hostileCommands[r.IntN(len(hostileCommands))], how)}
}
