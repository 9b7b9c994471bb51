// Package check checks whether streamshim can serve a node, and what to do if not. It changes nothing.
package check

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/streamshim/streamshim/pkg/config"
	"github.com/streamshim/streamshim/pkg/cri"
	"github.com/streamshim/streamshim/pkg/endpoint"
)

// Level is the outcome of a check.
type Level string

// Failed means that streamshim cannot work on this node, Warning that a part of it cannot.
const (
	OK      Level = "ok"
	Warning Level = "warning"
	Failed  Level = "failed"
)

// Result is the result of one check.
type Result struct {
	Name   string
	Level  Level
	Detail string // what was found
	Fix    string // what to do about it; empty if the check has passed
}

// callTimeout bounds each call to the upstream and each run of a program.
const callTimeout = 5 * time.Second

// DefaultKubeletConfig is where kubeadm puts the kubelet's configuration.
const DefaultKubeletConfig = "/var/lib/kubelet/config.yaml"

// Run does all checks, the most important ones first.
func Run(ctx context.Context, c config.Config, kubeletConfig string) []Result {
	results := []Result{privileges(), pidfd(), networkNamespaces(), subreaper()}
	results = append(results, upstreamResults(ctx, c)...)
	return append(results,
		ociRuntime(ctx, c),
		removedKeys(c),
		socket("listen socket", "--listen", c.Listen),
		running(c),
		adminSocket(c),
		stateDir(c),
		writes("audit log", c.Audit.Destination == "file", filepath.Dir(c.Audit.File), "audit.file"),
		writes("recordings", len(c.Recording.Rule) > 0, c.Recording.Directory, "recording.directory"),
		address("stream address", "--stream-address", c.StreamAddress),
		address("metrics address", "--metrics-address", c.MetricsAddress),
		traces(ctx, c),
		openFiles(),
		inotify(),
		kubelet(c, kubeletConfig, "/proc"),
	)
}

func ok(name, format string, args ...any) Result {
	return Result{Name: name, Level: OK, Detail: fmt.Sprintf(format, args...)}
}

func failed(name, fix, format string, args ...any) Result {
	return Result{Name: name, Level: Failed, Detail: fmt.Sprintf(format, args...), Fix: fix}
}

func warning(name, fix, format string, args ...any) Result {
	return Result{Name: name, Level: Warning, Detail: fmt.Sprintf(format, args...), Fix: fix}
}

// removedKeys warns of keys in the configuration file that have no effect any more.
func removedKeys(c config.Config) Result {
	const name = "configuration"
	if removed := c.Removed(); len(removed) > 0 {
		return warning(name, "remove it from the configuration file", "%s", strings.Join(removed, "; "))
	}
	return ok(name, "no key that was removed")
}

func privileges() Result {
	const name = "privileges"
	if uid := os.Geteuid(); uid != 0 {
		return failed(name, "run it as root, as the runtime is", "running as uid %d", uid)
	}
	return ok(name, "running as root")
}

// pidfd checks whether processes can be waited for without a race for their pid (Linux 5.4).
func pidfd() Result {
	const name = "pidfd"
	fd, err := unix.PidfdOpen(os.Getpid(), unix.PIDFD_NONBLOCK)
	if err != nil {
		return failed(name, "use Linux 5.10 or later; in a sandbox allow pidfd_open(2)", "pidfd_open: %v", err)
	}
	unix.Close(fd) //nolint:errcheck // only opened to see that it can be
	return ok(name, "available")
}

// networkNamespaces checks whether a thread may enter a network namespace, as port-forwards do.
func networkNamespaces() Result {
	const name = "network namespaces"
	fd, err := unix.Open("/proc/self/ns/net", unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return failed(name, "use a kernel with network namespaces and mount /proc", "%v", err)
	}
	defer unix.Close(fd) //nolint:errcheck // only read
	// Entering our own namespace changes nothing but needs the same privilege.
	if err := unix.Setns(fd, unix.CLONE_NEWNET); err != nil {
		return failed(name, "give the process CAP_SYS_ADMIN; in the systemd unit do not restrict namespaces", "setns: %v", err)
	}
	return ok(name, "may be entered")
}

func subreaper() Result {
	const name = "child subreaper"
	var was int32
	if err := unix.Prctl(unix.PR_GET_CHILD_SUBREAPER, uintptr(unsafe.Pointer(&was)), 0, 0, 0); err != nil {
		return failed(name, "use a kernel with PR_SET_CHILD_SUBREAPER (Linux 3.4)", "%v", err)
	}
	return ok(name, "available")
}

// upstreamResults checks the runtime with the same client that serve uses.
func upstreamResults(ctx context.Context, c config.Config) []Result {
	const name = "upstream"
	const fix = "start the runtime, or name its CRI socket with --upstream or the key upstream"
	if c.Upstream == "" {
		return []Result{failed(name, fix, "no runtime's socket is at the usual places, and none is named")}
	}
	upstream, err := cri.NewUpstream(c.Upstream, 0)
	if err != nil {
		return []Result{failed(name, fix, "%v", err)}
	}
	defer upstream.Close() //nolint:errcheck // nothing runs on it
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	version, err := upstream.Version(ctx)
	if err != nil {
		return []Result{upstreamFailure(name, fix, c.Upstream, err)}
	}
	if version.GetRuntimeApiVersion() != "v1" {
		return []Result{failed(name, "use a runtime that speaks CRI v1", "%s speaks CRI %s", c.Upstream, version.GetRuntimeApiVersion())}
	}
	return []Result{
		ok(name, "%s %s at %s", version.GetRuntimeName(), version.GetRuntimeVersion(), c.Upstream),
		upstreamConditions(ctx, upstream),
	}
}

// upstreamFailure finds the reason why the first call has failed.
func upstreamFailure(name, fix, address string, err error) Result {
	if status.Code(err) == codes.Unimplemented {
		return failed(name, "name the CRI socket of the runtime with --upstream or the key upstream",
			"what listens on %s speaks gRPC and not CRI v1", address)
	}
	path, pathErr := endpoint.Path(address)
	if pathErr != nil {
		return failed(name, fix, "%v", pathErr)
	}
	switch conn, dialErr := net.DialTimeout("unix", path, callTimeout); {
	case errors.Is(dialErr, unix.ENOENT):
		return failed(name, fix, "there is no socket %s", path)
	case errors.Is(dialErr, unix.EPROTOTYPE):
		return failed(name, fix, "%s is a socket of another type (datagram or sequenced packets)", path)
	case errors.Is(dialErr, unix.ECONNREFUSED):
		if info, statErr := os.Stat(path); statErr == nil && info.Mode().Type() != os.ModeSocket {
			return failed(name, fix, "%s is no socket", path)
		}
		return failed(name, fix, "nobody listens on %s", path)
	case dialErr != nil:
		return failed(name, fix, "%v", dialErr)
	default:
		conn.Close() //nolint:errcheck // only dialled to see whether somebody listens
	}
	return failed(name, "look at the runtime's log, and see whether this is its CRI socket; name another one with --upstream or the key upstream",
		"what listens on %s does not answer a CRI call: %s", path, status.Convert(err).Message())
}

func upstreamConditions(ctx context.Context, upstream *cri.Upstream) Result {
	const name = "upstream conditions"
	response, err := upstream.Status(ctx)
	if err != nil {
		return warning(name, "look at the runtime's log", "no status: %v", err)
	}
	others := ""
	for _, condition := range response.GetStatus().GetConditions() {
		switch {
		case condition.GetStatus():
		case condition.GetType() == runtimeapi.RuntimeReady, condition.GetType() == runtimeapi.NetworkReady:
			return warning(name, "fix the runtime first; until then pods cannot start", "%s is false: %s", condition.GetType(), condition.GetMessage())
		default: // a condition of the runtime's own, such as ContainerdHasNoDeprecationWarnings, which is rarely true
			others += fmt.Sprintf("; %s is false, which does not matter here", condition.GetType())
		}
	}
	return ok(name, "ready%s", others)
}

// socket checks whether serve could listen on a Unix socket.
func socket(name, flag, address string) Result {
	path, err := endpoint.Path(address)
	if err != nil {
		return failed(name, "write unix:///path", "%v", err)
	}
	conn, err := net.DialTimeout("unix", path, callTimeout)
	if err == nil {
		conn.Close() //nolint:errcheck // only dialled to see who answers
		return ok(name, "%s is being served", path)
	}
	if info, statErr := os.Stat(path); statErr == nil && info.Mode().Type() != os.ModeSocket {
		return failed(name, "remove the file or choose another socket with "+flag, "%s exists and is no socket", path)
	}
	if err := writable(filepath.Dir(path)); err != nil {
		return failed(name, "choose another socket with "+flag, "%v", err)
	}
	return ok(name, "%s can be created", path)
}

func adminSocket(c config.Config) Result {
	const name = "admin socket"
	if c.Admin == "" {
		return ok(name, "switched off")
	}
	return socket(name, "--admin", c.Admin)
}

// writes checks whether files could be created in a directory.
func writes(name string, on bool, dir, key string) Result {
	if !on {
		return ok(name, "switched off")
	}
	if err := writable(dir); err != nil {
		return failed(name, "choose another place with the key "+key, "%v", err)
	}
	return ok(name, "in %s", dir)
}

// address checks whether serve could listen on a TCP address. An address in use is fine, because streamshim may be
// using it.
func address(name, flag, hostPort string) Result {
	if hostPort == "" {
		return ok(name, "switched off")
	}
	listener, err := net.Listen("tcp", hostPort)
	switch {
	case errors.Is(err, unix.EADDRINUSE):
		return ok(name, "%s is being served", hostPort)
	case err != nil:
		return failed(name, "choose an address of this node with "+flag, "%v", err)
	}
	listener.Close() //nolint:errcheck // only opened to see that it can be
	return ok(name, "%s", hostPort)
}

// traces checks whether a receiver accepts spans. Without one, sessions work, and spans are lost.
func traces(ctx context.Context, c config.Config) Result {
	const name = "traces"
	if c.Traces.Endpoint == "" {
		return ok(name, "switched off")
	}
	const fix = "start the OTLP/gRPC receiver, or name it with the key traces.endpoint; until then spans are lost"
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	var dialer interface {
		DialContext(ctx context.Context, network, address string) (net.Conn, error)
	} = &net.Dialer{}
	if !c.Traces.Insecure {
		dialer = &tls.Dialer{Config: &tls.Config{NextProtos: []string{"h2"}, MinVersion: tls.VersionTLS12}} // as its client does
	}
	conn, err := dialer.DialContext(ctx, "tcp", c.Traces.Endpoint)
	var noTLS tls.RecordHeaderError
	switch {
	case errors.As(err, &noTLS):
		return warning(name, "set traces.insecure = true if that is meant", "%s does not speak TLS", c.Traces.Endpoint)
	case err != nil:
		return warning(name, fix, "%v", err)
	}
	conn.Close() //nolint:errcheck // only dialled to see whether somebody listens
	return ok(name, "%s accepts connections", c.Traces.Endpoint)
}

// stateDir checks whether files can be created, and whether they vanish with the next boot as they should.
func stateDir(c config.Config) Result {
	const name = "state directory"
	if err := writable(c.StateDir); err != nil {
		return failed(name, "choose another one with --state-dir", "%v", err)
	}
	var fs unix.Statfs_t
	if err := unix.Statfs(existing(c.StateDir), &fs); err == nil && fs.Type != unix.TMPFS_MAGIC {
		return warning(name, "use a directory on a tmpfs, such as /run/streamshim: starts are faster and nothing survives a boot",
			"%s is not on a tmpfs", c.StateDir)
	}
	return ok(name, "%s", c.StateDir)
}

// writable returns why files cannot be created in dir, or dir itself cannot be created.
func writable(dir string) error {
	there := existing(dir)
	if err := unix.Access(there, unix.W_OK|unix.X_OK); err != nil {
		return &os.PathError{Op: "write in", Path: there, Err: err}
	}
	return nil
}

// existing returns dir, or its nearest parent that exists.
func existing(dir string) string {
	for {
		if _, err := os.Stat(dir); err == nil || dir == "/" || dir == "." {
			return dir
		}
		dir = filepath.Dir(dir)
	}
}

// inotify checks whether an instance can be created. All port-forwards share one to watch for the end of their pods.
func inotify() Result {
	const name = "inotify"
	fd, err := unix.InotifyInit1(unix.IN_CLOEXEC)
	if err != nil {
		return failed(name, "raise the sysctl fs.inotify.max_user_instances", "inotify_init1: %v", err)
	}
	unix.Close(fd) //nolint:errcheck // only opened to see that it can be
	return ok(name, "available")
}

// openFiles checks the limit of descriptors. A session holds about six.
func openFiles() Result {
	const name, enough = "open files", 16384
	var limit unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &limit); err != nil {
		return warning(name, "allow getrlimit(2)", "%v", err)
	}
	if limit.Max < enough {
		return warning(name, "set LimitNOFILE=1024:1048576 in the systemd unit", "at most %d, enough for about %d sessions", limit.Max, limit.Max/8)
	}
	return ok(name, "%s", strconv.FormatUint(limit.Max, 10))
}
