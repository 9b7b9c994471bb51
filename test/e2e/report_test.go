package e2e

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/streamshim/streamshim/test/internal/kubernetes"
	"github.com/streamshim/streamshim/test/internal/node"
	"github.com/streamshim/streamshim/test/internal/tables"
)

// report collects results and writes them as tables.
type report struct {
	mu       sync.Mutex
	sections []*section
}

// section is one table.
type section struct {
	title, text string
	protocols   []kubernetes.Protocol // one column each per node; none means one column per node
	rows        []string
	cells       map[cell]string
}

type cell struct {
	row, node string
	protocol  kubernetes.Protocol
}

const (
	good       = "✓ "
	bad        = "✗ "
	impossible = "– "
)

func (r *report) section(title, text string, checks []check, protocols ...kubernetes.Protocol) *section {
	s := &section{title: title, text: text, protocols: protocols, cells: map[cell]string{}}
	for _, c := range checks {
		s.rows = append(s.rows, c.name)
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.sections = append(r.sections, s)
	return s
}

func (r *report) set(s *section, where cell, mark, text string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	s.cells[where] = mark + oneLine(text)
}

// get returns a cell's mark and text, empty if there is none yet.
func (r *report) get(s *section, where cell) string {
	r.mu.Lock()
	defer r.mu.Unlock()
	return s.cells[where]
}

const legend = `
✓ as it should be, ✗ not so, – not possible on that machine, empty: not run. The run fails if
streamshim has a ✗, with two exceptions, which are beyond a node:

1. Whoever translates WebSocket for kubectl, the kubelet or the API server, closes kubectl's connection
   as soon as it has the exit code. What is still in the buffers between it and kubectl is thrown away
   if kubectl's next ping comes first. streamshim holds the exit code back until kubectl has read the
   output. When that will be has to be estimated, and where the buffers take the whole output it
   cannot be (up to 32 MB, where Linux lets them grow that far); kubectl then ends with an error, never
   with exit code 0. The run fails if more than half are cut. With
   KUBECTL_REMOTE_COMMAND_WEBSOCKETS=false nothing is lost.
2. kubectl stops reading all connections of a port-forward when one of its local clients stops reading.
   Its SPDY library has no flow control.

CRI-O is not in this table: the run has none. What was tried on it is in
[install.md](install.md#on-a-cri-o-node).
`

var nodeTitles = map[string]string{"bare": "bare containerd", "shim": "through streamshim"}

// write writes the report as its part of the document at path.
func (r *report) write(path string, of *run, duration time.Duration) error {
	var text strings.Builder
	fmt.Fprintf(&text, `## Kubernetes: kubectl, API server and kubelet

What real kubectl, API server and kubelet see of a node, without streamshim and with it. This part is
written by a run of `+"`make e2e E2E=%s`"+`, not by hand: on %s, in %d minutes, with

%s
`, of.mode, time.Now().UTC().Format(time.DateOnly), int(duration.Minutes())+1, versions())
	text.WriteString(legend)
	for _, s := range r.sections {
		fmt.Fprintf(&text, "\n### %s\n\n%s\n\n| |", s.title, s.text)
		protocols := s.protocols
		if len(protocols) == 0 {
			protocols = []kubernetes.Protocol{""}
		}
		for _, name := range of.nodes {
			for _, protocol := range protocols {
				heading := nodeTitles[name]
				if protocol != "" {
					heading += ", " + string(protocol)
				}
				fmt.Fprintf(&text, " %s |", heading)
			}
		}
		text.WriteString("\n|" + strings.Repeat(" --- |", 1+len(of.nodes)*len(protocols)) + "\n")
		for _, row := range s.rows {
			fmt.Fprintf(&text, "| %s |", row)
			for _, name := range of.nodes {
				for _, protocol := range protocols {
					fmt.Fprintf(&text, " %s |", s.cells[cell{row, name, protocol}])
				}
			}
			text.WriteString("\n")
		}
	}
	return tables.Replace(path, "kubernetes", text.String())
}

// versions is a list of what the run was made of.
func versions() string {
	var kernel unix.Utsname
	_ = unix.Uname(&kernel) // fails never with a good pointer
	lines := []string{
		fmt.Sprintf("* Linux %s, %s, %d CPUs, cgroup %s", unix.ByteSliceToString(kernel.Release[:]), runtime.GOARCH, runtime.NumCPU(), cgroupVersion()),
	}
	for _, command := range [][]string{
		{"kubelet", "--version"}, {"etcd", "--version"}, {"containerd", "--version"}, {"runc", "--version"},
	} {
		output, err := exec.Command(filepath.Join(node.DefaultPrograms(), command[0]), command[1:]...).Output()
		if err != nil {
			output = []byte(err.Error())
		}
		first, _, _ := strings.Cut(string(output), "\n")
		lines = append(lines, fmt.Sprintf("* %s: %s", command[0], first))
	}
	return strings.Join(lines, "\n")
}

func cgroupVersion() string {
	if _, err := os.Stat("/sys/fs/cgroup/cgroup.controllers"); err == nil {
		return "v2"
	}
	return "v1"
}
