package cri

import (
	"bytes"
	"os"
	"os/exec"
	"strings"
	"testing"

	"github.com/streamshim/streamshim/test/internal/harness"
	"github.com/streamshim/streamshim/test/internal/node"
)

// TestContainerdAPIAndVerboseStatusAgree starts what the test of the same name in pkg/cri needs. That test compares what
// the package reads of containers from containerd's own API and from the CRI.
func TestContainerdAPIAndVerboseStatusAgree(t *testing.T) {
	n := harness.Shared.Node
	var containers []string
	for _, spec := range []node.PodSpec{{Name: "plain"}, {Name: "userns", UserNamespace: n.HasUserNamespaces(t)}} {
		pod, id := runContainer(t, n, spec, node.ContainerSpec{Env: map[string]string{"COLOUR": "green"}, Stdin: true, StdinOnce: true})
		containers = append(containers, pod+"/"+id)
	}
	test := exec.Command("go", "test", "-race", "-vet=off", "-v", "-count", "1", "-run", "^"+t.Name()+"$", "github.com/streamshim/streamshim/pkg/cri")
	test.Env = append(os.Environ(), "STREAMSHIM_CONTAINERD="+n.ContainerdSocket(), "STREAMSHIM_RUNC_ROOT="+n.RuncRoot(),
		"STREAMSHIM_CONTAINERS="+strings.Join(containers, " "))
	output, err := test.CombinedOutput()
	if err != nil || !bytes.Contains(output, []byte("--- PASS: "+t.Name()+"/")) {
		t.Errorf("%v\n%s", err, output)
	}
}
