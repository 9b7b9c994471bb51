// Package node runs the container side of a Kubernetes node for tests: an image registry, a private containerd and, in
// front of it, streamshim. Everything is below one folder, with its own sockets, runtime roots, bridge and subnet. So
// several nodes can run side by side and beside a real one. It needs root and the programs that
// test/internal/peers/build.sh builds.
//
// Taking a node down leaves nothing behind: no pod, process, mount, network namespace, bridge, cgroup, iptables chain or
// CNI record. That holds even for a node whose owner was killed: the folder records what there is (node.json), and the next
// Start or Cleanup on it ends that first.
package node

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"hash/fnv"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"sync"
	"time"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// Config describes a node to start.
type Config struct {
	// Dir is the folder that everything is below. Its path has at most 80 bytes. It is created if it does not exist.
	Dir string
	// Name distinguishes nodes on one machine: bridge and subnet are derived from it. It has at most 12 lower-case letters,
	// digits and hyphens. If empty, it is derived from Dir.
	Name string
	// Streamshim is the path of the streamshim program. It runs with the node's own arguments and then StreamshimArgs. If
	// empty, there is no streamshim, and Socket is containerd's.
	Streamshim     string
	StreamshimArgs []string
	// Programs is the folder of containerd, runc and the others. It defaults to DefaultPrograms.
	Programs string
	// Logf is called with each line about what happens. It may be nil.
	Logf func(format string, args ...any)
}

// Node is a running node. Its methods may be called from several goroutines, except for those that start and stop parts of
// it.
type Node struct {
	dir  string
	logf func(string, ...any)
	lock *os.File // held from Start to Close or Detach

	mu    sync.Mutex
	state state
	pods  map[string]*runtimeapi.PodSandboxConfig // by sandbox ID, as given to RunPod

	upstream, front *grpc.ClientConn // equal if there is no streamshim
}

// state is what node.json holds: all that a later process needs to take the node down.
type state struct {
	Name           string             `json:"name"`
	Programs       string             `json:"programs"`
	Streamshim     string             `json:"streamshim,omitempty"`
	StreamshimArgs []string           `json:"streamshimArgs,omitempty"`
	Registry       string             `json:"registry,omitempty"` // host:port
	Processes      map[string]process `json:"processes"`
	Companions     []string           `json:"companions,omitempty"` // in the order they were started
}

// The names of a node's processes, which their records and log files have too.
const (
	containerdProcess  = "containerd"
	streamshimProcess  = "streamshim"
	imageServerProcess = "imageserver"
)

// maxDir keeps the node's own sockets within the 107 bytes of a Unix socket's path.
const maxDir = 80

// readyTimeout bounds the start of one process, on a machine that is busy with other tests.
const readyTimeout = 2 * time.Minute

// Start brings a node up and returns when it can run pods. It first takes down what an earlier node has left in the folder.
// If the owner of that node still lives, Start fails. The context bounds only the start. The caller ends the node with
// Close or releases it with Detach.
func Start(ctx context.Context, config Config) (*Node, error) {
	if err := Ready(config.Programs); err != nil {
		return nil, err
	}
	n, err := open(config.Dir, config.Logf)
	if err != nil {
		return nil, err
	}
	if err := n.start(ctx, config); err != nil {
		err = fmt.Errorf("start a node in %s: %w", config.Dir, err)
		return nil, errors.Join(err, n.Close())
	}
	return n, nil
}

// Open takes over a node that was released with Detach. It returns ErrNotRunning if nothing usable runs there. Then call
// Start or Cleanup.
func Open(ctx context.Context, dir string, logf func(string, ...any)) (*Node, error) {
	if _, err := os.Stat(filepath.Join(dir, "node.json")); err != nil {
		return nil, fmt.Errorf("%s: %w", dir, ErrNotRunning)
	}
	n, err := open(dir, logf)
	if err != nil {
		return nil, err
	}
	for _, name := range n.processNames() {
		if !n.process(name).alive() {
			n.Detach()
			return nil, fmt.Errorf("%s: %s: %w", dir, name, ErrNotRunning)
		}
	}
	if err := n.connect(); err != nil {
		n.Detach()
		return nil, err
	}
	if err := n.waitReady(ctx); err != nil {
		n.Detach()
		return nil, fmt.Errorf("%s: %w: %w", dir, err, ErrNotRunning)
	}
	return n, nil
}

// ErrNotRunning is what Open returns for a folder without a live node.
var ErrNotRunning = errors.New("no node runs here")

// ErrInUse is what Start, Open and Cleanup return when another process holds the node.
var ErrInUse = errors.New("the node belongs to another process, which still runs")

// Cleanup takes down what a dead owner has left in the folder, or a node that was released with Detach. A folder without a
// node is no error. Logs stay.
func Cleanup(dir string, logf func(string, ...any)) error {
	if _, err := os.Stat(dir); errors.Is(err, os.ErrNotExist) {
		return nil
	}
	n, err := open(dir, logf)
	if err != nil {
		return err
	}
	return n.Close()
}

// open takes the folder's lock and reads its state, if there is one.
func open(dir string, logf func(string, ...any)) (*Node, error) {
	dir, err := filepath.Abs(dir)
	if err != nil {
		return nil, err
	}
	if len(dir) > maxDir {
		return nil, fmt.Errorf("node: the folder's path is longer than %d bytes, too long for Unix sockets: %s", maxDir, dir)
	}
	if logf == nil {
		logf = func(string, ...any) {}
	}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return nil, err
	}
	// Temporary folders have mode 0700, which keeps a pod's root user out of its root file system.
	if err := os.Chmod(dir, 0o755); err != nil {
		return nil, err
	}
	lock, err := os.OpenFile(filepath.Join(dir, "lock"), os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, err
	}
	if err := unix.Flock(int(lock.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		return nil, errors.Join(fmt.Errorf("%s: %w", dir, ErrInUse), lock.Close())
	}
	n := &Node{dir: dir, logf: logf, lock: lock, pods: map[string]*runtimeapi.PodSandboxConfig{}}
	text, err := os.ReadFile(n.path("node.json"))
	if err == nil {
		err = json.Unmarshal(text, &n.state)
	}
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, errors.Join(fmt.Errorf("read %s: %w", n.path("node.json"), err), lock.Close())
	}
	if n.state.Processes == nil {
		n.state.Processes = map[string]process{}
	}
	return n, nil
}

func (n *Node) start(ctx context.Context, config Config) error {
	if n.state.Name != "" {
		n.logf("taking down what an earlier node left in %s", n.dir)
		if err := n.takeDown(); err != nil {
			return err
		}
	}
	n.state = state{
		Name: config.Name, Programs: config.Programs,
		Streamshim: config.Streamshim, StreamshimArgs: config.StreamshimArgs,
		Processes: map[string]process{},
	}
	if n.state.Programs == "" {
		n.state.Programs = DefaultPrograms()
	}
	if n.state.Name == "" {
		n.state.Name = fmt.Sprintf("%08x", hash(n.dir))
	}
	if !regexp.MustCompile(`^[a-z0-9-]{1,12}$`).MatchString(n.state.Name) {
		return fmt.Errorf("the name %q is not of 1 to 12 lower-case letters, digits and hyphens", n.state.Name)
	}
	if err := n.save(); err != nil {
		return err
	}
	if err := n.startImageServer(ctx); err != nil {
		return err
	}
	if err := n.writeConfiguration(); err != nil {
		return err
	}
	if err := n.startContainerd(); err != nil {
		return err
	}
	if err := n.connect(); err != nil {
		return err
	}
	if n.state.Streamshim != "" {
		if err := n.startStreamshim(); err != nil {
			return err
		}
	}
	return n.waitReady(ctx)
}

// Close takes the node down, in whatever state it is, and releases the folder. Only the logs stay in it. It may be called
// twice.
func (n *Node) Close() error {
	if n.lock == nil {
		return nil
	}
	err := n.takeDown()
	n.Detach()
	if err != nil {
		return fmt.Errorf("take down the node in %s: %w", n.dir, err)
	}
	return nil
}

// Detach releases the node but leaves it running. Open or Cleanup finds it, in another process too.
func (n *Node) Detach() {
	n.disconnect()
	if n.lock != nil {
		_ = n.lock.Close() // releases the lock
		n.lock = nil
	}
}

// Dir returns the node's folder.
func (n *Node) Dir() string { return n.dir }

// ContainerdSocket returns containerd's CRI endpoint as a URL, "unix:///...".
func (n *Node) ContainerdSocket() string { return "unix://" + n.containerdSocketPath() }

// Socket returns the endpoint for a kubelet: streamshim's, or containerd's if the node has no streamshim.
func (n *Node) Socket() string {
	if n.state.Streamshim == "" {
		return n.ContainerdSocket()
	}
	return "unix://" + n.path("run/streamshim.sock")
}

// AdminSocket returns the path of streamshim's admin socket, without "unix://".
func (n *Node) AdminSocket() string { return n.path("run/admin.sock") }

// RuncRoot returns the state root of the node's runc containers, as in "runc --root".
func (n *Node) RuncRoot() string { return n.path("run/runc/k8s.io") }

// LogPath returns the log of "containerd", "streamshim" or "imageserver".
func (n *Node) LogPath(process string) string { return n.path("log/" + process + ".log") }

// Program returns the path of a program that the node uses, such as "runc" or "critest".
func (n *Node) Program(name string) string { return filepath.Join(n.state.Programs, name) }

// PID returns the process ID of "containerd" or "streamshim", or 0 if it does not run.
func (n *Node) PID(process string) int {
	p := n.process(process)
	if !p.alive() {
		return 0
	}
	return p.PID
}

// Crictl returns a crictl command for Socket. The caller runs it.
func (n *Node) Crictl(args ...string) *exec.Cmd {
	return exec.Command(n.Program("crictl"), append([]string{"--config", n.path("crictl.yaml")}, args...)...)
}

// Connection returns a gRPC connection to Socket. The node closes it.
func (n *Node) Connection() *grpc.ClientConn { return n.front }

// Runtime returns a CRI client of Socket.
func (n *Node) Runtime() runtimeapi.RuntimeServiceClient {
	return runtimeapi.NewRuntimeServiceClient(n.front)
}

// Upstream returns a CRI client of containerd itself.
func (n *Node) Upstream() runtimeapi.RuntimeServiceClient {
	return runtimeapi.NewRuntimeServiceClient(n.upstream)
}

// KillContainerd ends containerd with SIGKILL and waits until it is gone. Pods go on.
func (n *Node) KillContainerd() error {
	return n.stopProcess(containerdProcess, 0)
}

// StartContainerd starts containerd again after KillContainerd and waits until it is ready.
func (n *Node) StartContainerd(ctx context.Context) error {
	if err := n.startContainerd(); err != nil {
		return err
	}
	return n.waitFor(ctx, containerdProcess, n.Upstream())
}

// StopStreamshim ends streamshim with SIGTERM, and with SIGKILL if it takes longer than the grace period. With a grace
// period of zero it sends SIGKILL at once. It waits until streamshim is gone.
func (n *Node) StopStreamshim(grace time.Duration) error {
	return n.stopProcess(streamshimProcess, grace)
}

// StartStreamshim starts streamshim again after StopStreamshim and waits until it is ready.
func (n *Node) StartStreamshim(ctx context.Context) error {
	if err := n.startStreamshim(); err != nil {
		return err
	}
	return n.waitFor(ctx, streamshimProcess, n.Runtime())
}

func (n *Node) path(name string) string      { return filepath.Join(n.dir, name) }
func (n *Node) containerdSocketPath() string { return n.path("run/containerd.sock") }
func (n *Node) processNames() []string {
	names := []string{imageServerProcess, containerdProcess}
	if n.state.Streamshim != "" {
		names = append(names, streamshimProcess)
	}
	return names
}

// save replaces node.json atomically.
func (n *Node) save() error {
	text, err := json.MarshalIndent(n.state, "", "  ")
	if err != nil {
		return err
	}
	temporary := n.path("node.json.new")
	if err := os.WriteFile(temporary, append(text, '\n'), 0o600); err != nil {
		return err
	}
	return os.Rename(temporary, n.path("node.json"))
}

func (n *Node) connect() error {
	var err error
	if n.upstream, err = Dial(n.ContainerdSocket()); err != nil {
		return err
	}
	n.front, err = Dial(n.Socket())
	return err
}

func (n *Node) disconnect() {
	for _, connection := range []**grpc.ClientConn{&n.upstream, &n.front} {
		if *connection != nil {
			_ = (*connection).Close() // fails only if it is closed already
			*connection = nil
		}
	}
}

// callTimeout bounds calls whose caller does not bound them. A call that hangs then shows in an error with its name, and
// its test can clean up.
const callTimeout = 3 * time.Minute

// Dial returns a client of a CRI socket, unix://... No call of it lasts for ever.
func Dial(endpoint string) (*grpc.ClientConn, error) {
	bounded := func(ctx context.Context, method string, request, reply any, conn *grpc.ClientConn, invoke grpc.UnaryInvoker, options ...grpc.CallOption) error {
		if _, has := ctx.Deadline(); has {
			return invoke(ctx, method, request, reply, conn, options...)
		}
		bounded, cancel := context.WithTimeout(ctx, callTimeout)
		defer cancel()
		err := invoke(bounded, method, request, reply, conn, options...)
		if err != nil && ctx.Err() == nil && bounded.Err() != nil {
			return status.Errorf(codes.DeadlineExceeded, "%s of %s did not return within %v: %v", method, endpoint, callTimeout, err)
		}
		return err
	}
	return grpc.NewClient(endpoint,
		grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithNoProxy(),
		grpc.WithUnaryInterceptor(bounded),
		grpc.WithConnectParams(grpc.ConnectParams{
			// The default backoff of a second and more would delay each restart of containerd.
			Backoff:           backoff.Config{BaseDelay: 20 * time.Millisecond, Multiplier: 1.5, MaxDelay: 500 * time.Millisecond},
			MinConnectTimeout: 5 * time.Second,
		}))
}

// waitReady returns when both ends answer and pods can have a network.
func (n *Node) waitReady(ctx context.Context) error {
	if err := n.waitFor(ctx, containerdProcess, n.Upstream()); err != nil {
		return err
	}
	if n.state.Streamshim == "" {
		return nil
	}
	return n.waitFor(ctx, streamshimProcess, n.Runtime())
}

func (n *Node) waitFor(ctx context.Context, name string, client runtimeapi.RuntimeServiceClient) error {
	ctx, cancel := context.WithTimeout(ctx, readyTimeout)
	defer cancel()
	retry := time.NewTicker(50 * time.Millisecond)
	defer retry.Stop()
	for {
		err := checkReady(ctx, client)
		if err == nil {
			return nil
		}
		if !n.process(name).alive() {
			return fmt.Errorf("%s ended at once; its log %s ends with:\n%s", name, n.LogPath(name), n.logTail(name))
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("%s did not become ready: %w; its log %s ends with:\n%s", name, err, n.LogPath(name), n.logTail(name))
		case <-retry.C:
		}
	}
}

func checkReady(ctx context.Context, client runtimeapi.RuntimeServiceClient) error {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	response, err := client.Status(ctx, &runtimeapi.StatusRequest{})
	if err != nil {
		return err
	}
	for _, condition := range response.GetStatus().GetConditions() {
		// containerd adds its own conditions, for example about deprecated settings.
		needed := condition.GetType() == runtimeapi.RuntimeReady || condition.GetType() == runtimeapi.NetworkReady
		if needed && !condition.GetStatus() {
			return fmt.Errorf("%s is not yet: %s", condition.GetType(), condition.GetMessage())
		}
	}
	return nil
}

func hash(s string) uint32 {
	h := fnv.New32a()
	_, _ = h.Write([]byte(s)) // never fails
	return h.Sum32()
}
