package critest

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/streamshim/streamshim/test/internal/images"
	"github.com/streamshim/streamshim/test/internal/node"
)

// pinnedDigest is the digest that critest v1.36.0 has compiled in for test-image-digest
// (pkg/validate/image.go).
const pinnedDigest = "9700f9a2f5bf2c45f2f605a0bd3bce7cf37420ec9d3ed50ac2758413308766bf"

// Suite runs critest on one node.
type Suite struct {
	node    *node.Node
	program string // critest, adapted to the node's images
	output  string // folder for reports and logs
}

// NewSuite prepares critest for a node. Reports and logs go below the output folder.
//
// critest pulls one image by a digest that only its authors' image has. The program that is run is
// therefore a copy of critest with those 64 digits replaced by the digest of the node's own image;
// nothing else in it differs.
func NewSuite(ctx context.Context, n *node.Node, output string) (*Suite, error) {
	digest, err := n.ImageDigest(ctx, images.CritestDigest)
	if err != nil {
		return nil, err
	}
	program, err := os.ReadFile(n.Program("critest"))
	if err != nil {
		return nil, fmt.Errorf("%w; please run test/internal/peers/build.sh", err)
	}
	adapted := bytes.ReplaceAll(program, []byte(pinnedDigest), []byte(strings.TrimPrefix(digest, "sha256:")))
	if bytes.Equal(adapted, program) || len(adapted) != len(program) {
		return nil, errors.New("this critest has another digest compiled in; pinnedDigest needs a change")
	}
	s := &Suite{node: n, program: filepath.Join(n.Dir(), "critest"), output: output}
	if err := os.WriteFile(s.program, adapted, 0o755); err != nil {
		return nil, err
	}
	return s, os.MkdirAll(output, 0o755)
}

// Run runs critest against a CRI endpoint (a URL) and returns its results. That specs fail is no
// error. The name names the files: NAME.log and NAME.json. Shared memory stays, see removeNewSegments.
func (s *Suite) Run(ctx context.Context, name, endpoint string, args ...string) (Results, error) {
	temporary := filepath.Join(s.node.Dir(), "tmp", name)
	if err := os.MkdirAll(temporary, 0o755); err != nil {
		return nil, err
	}
	logPath, reportPath := filepath.Join(s.output, name+".log"), filepath.Join(s.output, name+".json")
	if err := os.Remove(reportPath); err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, err // an old report must not pass for this run's
	}
	log, err := os.Create(logPath)
	if err != nil {
		return nil, err
	}
	defer func() { _ = log.Close() }()

	command := exec.CommandContext(ctx, s.program, append([]string{
		"-runtime-endpoint", endpoint, "-image-endpoint", endpoint,
		"-ginkgo.no-color", "-ginkgo.json-report", reportPath,
	}, args...)...)
	command.Dir = temporary
	command.Env = append(os.Environ(), "TMPDIR="+temporary, "CONTAINER_RUNTIME_ENDPOINT=", "IMAGE_SERVICE_ENDPOINT=")
	command.Stdout, command.Stderr = log, log
	command.Cancel = func() error { return command.Process.Signal(unix.SIGTERM) } // lets it clean up
	command.WaitDelay = 30 * time.Second
	runErr := command.Run()
	results, err := ReadResults(reportPath)
	if err != nil {
		return nil, errors.Join(fmt.Errorf("critest wrote no report, see %s: %w", logPath, err), runErr)
	}
	return results, nil
}

// hostSpecs are the specs that use ports of the host: two runs at once would take them from each other.
const hostSpecs = "port ?forward|host port|HostNetwork"

// RunWithoutHost is Run of all specs that may run beside another run, RunOnHost that of the others.
func (s *Suite) RunWithoutHost(ctx context.Context, name, endpoint string) (Results, error) {
	return s.Run(ctx, name, endpoint, "-ginkgo.skip", hostSpecs)
}

// RunOnHost is what RunWithoutHost leaves out.
func (s *Suite) RunOnHost(ctx context.Context, name, endpoint string) (Results, error) {
	return s.Run(ctx, name+"-host", endpoint, "-ginkgo.focus", hostSpecs)
}

// segment is a line of /proc/sysvipc/shm.
type segment struct {
	id, size, attached int
}

func sharedMemorySegments() (map[int]segment, error) {
	file, err := os.Open("/proc/sysvipc/shm")
	if err != nil {
		return nil, err
	}
	defer func() { _ = file.Close() }()
	return parseSegments(file)
}

func parseSegments(table io.Reader) (map[int]segment, error) {
	text, err := io.ReadAll(table)
	if err != nil {
		return nil, err
	}
	segments := map[int]segment{}
	for i, line := range strings.Split(strings.TrimSpace(string(text)), "\n") {
		fields := strings.Fields(line) // key shmid perms size cpid lpid nattch ...
		if i == 0 || len(fields) < 7 {
			continue
		}
		id, errID := strconv.Atoi(fields[1])
		size, errSize := strconv.Atoi(fields[3])
		attached, errAttached := strconv.Atoi(fields[6])
		if err := errors.Join(errID, errSize, errAttached); err != nil {
			return nil, fmt.Errorf("read /proc/sysvipc/shm: %w", err)
		}
		segments[id] = segment{id, size, attached}
	}
	return segments, nil
}

// removeNewSegments removes the shared memory that critest's HostIpc specs make on the host, 1 MiB
// each, and leave. No critest may run meanwhile: it looks for its own.
func removeNewSegments(before map[int]segment) error {
	after, err := sharedMemorySegments()
	if err != nil {
		return err
	}
	for id, s := range after {
		if _, old := before[id]; old || s.size != 1<<20 || s.attached != 0 {
			continue
		}
		if _, err := unix.SysvShmCtl(id, unix.IPC_RMID, nil); err != nil {
			return fmt.Errorf("remove shared memory segment %d: %w", id, err)
		}
	}
	return nil
}

// requireFreePorts fails when something listens on the host ports that specs are served on.
func requireFreePorts(ctx context.Context) error {
	for port := 12000; port <= 12003; port++ {
		request, err := http.NewRequestWithContext(ctx, http.MethodGet, fmt.Sprintf("http://127.0.0.1:%d/", port), nil)
		if err != nil {
			return err
		}
		if response, err := http.DefaultClient.Do(request); err == nil {
			return errors.Join(fmt.Errorf("host port %d, which critest's specs use, is taken; is another critest running?", port), response.Body.Close())
		}
	}
	return nil
}
