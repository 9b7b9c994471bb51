package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/streamshim/streamshim/test/internal/images"
	"github.com/streamshim/streamshim/test/internal/node"
)

// podKind says what may happen to a pod.
type podKind string

const (
	stable  podKind = "stable"  // lives through the whole soak; probes go here
	victim  podKind = "victim"  // is killed and removed under its sessions, and made again
	hostile podKind = "hostile" // has few processes and little memory, and commands that use them up
)

// pod is one pod with two containers.
type pod struct {
	kind    podKind
	name    string
	sandbox string
	shell   string // ID of the container in which commands run
	lab     string // ID of the container that is attached to, and whose main process answers lines; not in hostile pods
	pid     int    // of the shell container's main process
	port    uint16 // of the soak's own server inside the pod
	server  net.Listener

	mu   sync.Mutex
	gone time.Time // when its end began; zero as long as it lives
}

func (p *pod) dead() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return !p.gone.IsZero()
}

func (p *pod) markDead() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.gone = time.Now()
}

// pods are all pods that there are now.
type pods struct {
	s       *soakRun
	stable  []*pod
	servers sync.WaitGroup

	mu               sync.Mutex
	victims, hostile []*pod
	numbers          int
	cut              int // of which containerd did not say whether they were made
}

const (
	stablePods  = 3
	victimPods  = 4
	hostilePods = 2

	hostileProcesses = 64
	hostileMemory    = 48 << 20
	// leastShares is what the kubelet gives a container that asks for no CPU.
	leastShares = 2
)

func newPods(ctx context.Context, s *soakRun) (*pods, error) {
	ps := &pods{s: s}
	for i := range stablePods {
		namespace := "default"
		if i == 0 {
			namespace = "recorded"
		}
		p, err := ps.make(ctx, stable, namespace)
		if err != nil {
			return nil, err
		}
		ps.stable = append(ps.stable, p)
	}
	for range victimPods {
		p, err := ps.make(ctx, victim, "victims")
		if err != nil {
			return nil, err
		}
		ps.victims = append(ps.victims, p)
	}
	for range hostilePods {
		p, err := ps.make(ctx, hostile, "hostile")
		if err != nil {
			return nil, err
		}
		ps.hostile = append(ps.hostile, p)
	}
	return ps, nil
}

func (ps *pods) make(ctx context.Context, kind podKind, namespace string) (*pod, error) {
	ps.mu.Lock()
	ps.numbers++
	p := &pod{kind: kind, name: fmt.Sprintf("%s-%d", kind, ps.numbers)}
	ps.mu.Unlock()
	var err error
	n := ps.s.node
	if p.sandbox, err = n.RunPod(ctx, node.PodSpec{Name: p.name, Namespace: namespace}); err != nil {
		ps.mu.Lock()
		ps.cut++
		ps.mu.Unlock()
		return nil, err
	}
	spec := node.ContainerSpec{}
	if kind == hostile {
		spec.MemoryLimit = hostileMemory
		spec.Change = func(c *runtimeapi.ContainerConfig) { c.Linux.Resources.CpuShares = leastShares }
	}
	if p.shell, err = n.RunContainer(ctx, p.sandbox, spec); err != nil {
		return nil, err
	}
	if p.pid, err = node.ContainerPID(ctx, n.Upstream(), p.shell); err != nil {
		return nil, err
	}
	if kind == hostile {
		return p, limitProcesses(p.pid, hostileProcesses)
	}
	if p.lab, err = n.RunContainer(ctx, p.sandbox, node.ContainerSpec{Name: "lab", Image: node.Image(images.Lab), Stdin: true}); err != nil {
		return nil, err
	}
	err = node.InNetworkNamespace(p.pid, func() (err error) {
		p.server, err = net.Listen("tcp4", "127.0.0.1:0")
		return err
	})
	if err != nil {
		return nil, err
	}
	p.port = uint16(p.server.Addr().(*net.TCPAddr).Port)
	ps.servers.Go(func() { ps.serve(p.server) })
	return p, nil
}

// serve answers each connection: a line with a number n is answered with the numbers from 1 to n.
func (ps *pods) serve(listener net.Listener) {
	for {
		conn, err := listener.Accept()
		if err != nil {
			return // closed
		}
		ps.servers.Go(func() {
			defer conn.Close() //nolint:errcheck // its client sees what is missing
			_ = conn.SetDeadline(time.Now().Add(sessionLimit))
			line, err := bufio.NewReader(conn).ReadString('\n')
			n, numberErr := strconv.Atoi(strings.TrimSpace(line))
			if err != nil || numberErr != nil {
				return
			}
			if _, err := conn.Write(sequence(n)); err != nil {
				return
			}
			_ = conn.(*net.TCPConn).CloseWrite()
			_, _ = io.Copy(io.Discard, conn) //nolint:errcheck // until the other end closes
		})
	}
}

// close ends what is not the node's.
func (ps *pods) close() {
	for _, p := range ps.all() {
		if p.server != nil {
			p.server.Close() //nolint:errcheck // nobody dials it any more
		}
	}
	ps.servers.Wait()
}

func (ps *pods) all() []*pod {
	ps.mu.Lock()
	defer ps.mu.Unlock()
	all := append([]*pod{}, ps.stable...)
	return append(append(all, ps.victims...), ps.hostile...)
}

// pick chooses a pod for an ordinary session.
func (ps *pods) pick(r *rand.Rand) *pod {
	ps.mu.Lock()
	defer ps.mu.Unlock()
	if r.IntN(10) < 3 {
		if p := ps.victims[r.IntN(len(ps.victims))]; !p.dead() {
			return p
		}
	}
	return ps.stable[r.IntN(len(ps.stable))]
}

func (ps *pods) pickHostile(r *rand.Rand) *pod {
	ps.mu.Lock()
	defer ps.mu.Unlock()
	return ps.hostile[r.IntN(len(ps.hostile))]
}

// limitProcesses is what a kubelet's podPidsLimit does.
func limitProcesses(pid, limit int) error {
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/cgroup", pid))
	if err != nil {
		return err
	}
	for line := range strings.Lines(string(text)) {
		fields := strings.SplitN(strings.TrimSpace(line), ":", 3)
		root := "/sys/fs/cgroup"
		switch fields[1] {
		case "pids":
			root += "/pids"
		case "":
		default:
			continue
		}
		err = os.WriteFile(filepath.Join(root, fields[2], "pids.max"), []byte(strconv.Itoa(limit)), 0)
		if err == nil {
			return nil
		}
	}
	return fmt.Errorf("limit the processes of a hostile pod: %w", err)
}

// killPods ends victims in the ways in which pods end, and makes new ones.
func (s *soakRun) killPods(ctx context.Context) {
	if s.teeth {
		return
	}
	r := s.random("pods", 0)
	for pause(ctx, between(r, 3*time.Second, 8*time.Second)) {
		i, way := r.IntN(victimPods+hostilePods), r.IntN(3)
		var slot **pod
		if i < victimPods {
			slot = &s.pods.victims[i]
		} else {
			slot = &s.pods.hostile[i-victimPods]
		}
		if err := s.replace(ctx, slot, way); err != nil && ctx.Err() == nil {
			if s.excused(time.Now().Add(-callLimit), time.Now(), func(e excuse) bool { return e.upstream || e.calls }) == "" {
				s.violated(failedCall, "replace pod %s: %v", (*slot).name, err)
			}
		}
	}
}

// callLimit bounds CRI calls that are not probes.
const callLimit = 60 * time.Second

// replace ends a pod and puts a new one into its slot. It is called again for one whose end has failed.
func (s *soakRun) replace(ctx context.Context, slot **pod, way int) error {
	old := *slot
	first := !old.dead()
	old.markDead()
	if first {
		s.note("pod %s ends, way %d", old.name, way)
	}
	bounded, cancel := context.WithTimeout(ctx, callLimit)
	defer cancel()
	if first {
		switch way {
		case 0:
			_ = unix.Kill(old.pid, unix.SIGKILL) //nolint:errcheck // as an OOM killer; it is still there, as we have not removed it
			pause(ctx, time.Second)
		case 1:
			if _, err := s.node.Runtime().StopContainer(bounded, &runtimeapi.StopContainerRequest{ContainerId: old.shell}); err != nil {
				return err
			}
		}
	}
	if err := s.node.RemovePod(bounded, old.sandbox); err != nil {
		return err
	}
	if old.server != nil {
		old.server.Close() //nolint:errcheck // its pod is gone
	}
	fresh, err := s.pods.make(bounded, old.kind, string(old.kind)+"s")
	if err != nil {
		return err
	}
	s.pods.mu.Lock()
	defer s.pods.mu.Unlock()
	*slot = fresh
	return nil
}

// removeHostile removes the pods in which anything may be left by right.
func (ps *pods) removeHostile(ctx context.Context) error {
	var errs []error
	for _, p := range ps.hostile {
		p.markDead()
		errs = append(errs, ps.s.node.RemovePod(ctx, p.sandbox))
	}
	return errors.Join(errs...)
}

// removeUnknown removes what a kubelet would: pods that containerd has and the soak does not, because the answer to
// RunPodSandbox or to a removal never came.
func (ps *pods) removeUnknown(ctx context.Context) error {
	known := map[string]bool{}
	for _, p := range ps.all() {
		known[p.sandbox] = !p.dead()
	}
	answer, err := ps.s.node.Upstream().ListPodSandbox(ctx, &runtimeapi.ListPodSandboxRequest{})
	if err != nil {
		return err
	}
	var errs []error
	for _, sandbox := range answer.Items {
		if !known[sandbox.Id] {
			errs = append(errs, ps.s.node.RemovePod(ctx, sandbox.Id))
		}
	}
	return errors.Join(errs...)
}

// interrupted is how many pods were being made when containerd was killed.
func (ps *pods) interrupted() int {
	ps.mu.Lock()
	defer ps.mu.Unlock()
	return ps.cut
}
