package vm

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/streamshim/streamshim/test/internal/node"
	"github.com/streamshim/streamshim/test/internal/tables"
)

// enabled is set by "make vm": without it go test ./... would build a disk and emulate a machine for half an hour.
const enabled = "STREAMSHIM_VM"

func TestNode(t *testing.T) {
	if os.Getenv(enabled) == "" {
		t.Skip("make vm runs it")
	}
	arch := os.Getenv("STREAMSHIM_VM_ARCH")
	if arch == "" {
		arch = runtime.GOARCH
	}
	out := command(t, nil, "./build.sh", arch)
	work := artefacts(t, arch)
	machine := Machine{Arch: arch, Folder: out[strings.LastIndexByte(out, '\n')+1:], Payload: filepath.Join(work, "payload"), Work: work}
	fill(t, machine)

	// What would hang for ever ends with the run's own limit, whose message would not have what the machine said.
	ctx := t.Context()
	if deadline, has := t.Deadline(); has {
		var cancel context.CancelFunc
		ctx, cancel = context.WithDeadline(ctx, deadline.Add(-time.Minute))
		defer cancel()
	}
	started := time.Now()
	var passed, failed int
	var rows []string
	result := errNoResult
	step := regexp.MustCompile(`^ *--- (PASS|FAIL|SKIP): (.*)$`)
	err := machine.Run(ctx, func(line string) {
		fmt.Printf("%s %5.0f s | %s\n", arch, time.Since(started).Seconds(), line)
		if match := step.FindStringSubmatch(line); match != nil {
			switch match[1] {
			case "PASS":
				passed++
			case "FAIL":
				failed++
				t.Errorf("in the machine: %s failed", match[2])
			}
		}
		if what, ok := strings.CutPrefix(line, "seen: "); ok {
			name, text, _ := strings.Cut(what, " | ")
			rows = append(rows, fmt.Sprintf("| %s | %s |", name, text))
		}
		if code, ok := strings.CutPrefix(line, "inside.test: exit code "); ok {
			if result = nil; code != "0" {
				result = fmt.Errorf("the tests in the machine ended with exit code %s", code)
			}
		}
	})
	for _, err := range []error{err, result} {
		if err != nil {
			t.Errorf("%v (%s)", err, work)
		}
	}
	if passed == 0 {
		t.Error("nothing has passed in the machine")
	}
	if path := os.Getenv("STREAMSHIM_VM_REPORT"); path != "" && !t.Failed() {
		text := fmt.Sprintf("### A booted Debian node, %s\n\nBy `make vm VM_ARCH=%s` on %s, in a virtual machine, in %.0f minutes: %d steps, all as they should be.\n\n| | seen |\n| --- | --- |\n%s\n",
			arch, arch, time.Now().UTC().Format(time.DateOnly), time.Since(started).Minutes(), passed, strings.Join(rows, "\n"))
		if err := tables.Replace(path, "vm "+arch, text); err != nil {
			t.Error(err)
		}
	}
	if !t.Failed() {
		if err := os.RemoveAll(work); err != nil {
			t.Error(err)
		}
	}
}

// artefacts is an empty folder that stays when the test fails.
func artefacts(t *testing.T, arch string) string {
	t.Helper()
	work, err := filepath.Abs("../../.artefacts/vm-" + arch)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.RemoveAll(work); err != nil {
		t.Fatal(err)
	}
	if err := os.MkdirAll(filepath.Join(work, "payload"), 0o755); err != nil {
		t.Fatal(err)
	}
	return work
}

// fill makes the payload: two packages, an older and a newer one, the programs that a node needs, and the tests.
func fill(t *testing.T, m Machine) {
	t.Helper()
	for name, version := range map[string]string{"old": "0.0.1", "new": "0.0.2"} {
		dir := filepath.Join(m.Work, name)
		command(t, nil, "make", "-C", "../..", "packages", "ARCH="+m.Arch, "PACKAGES_DIR="+dir, "PACKAGE_VERSION="+version, "VERSION="+name)
		if err := os.Rename(filepath.Join(dir, "streamshim_"+version+"_"+m.Arch+".deb"), filepath.Join(m.Payload, name+".deb")); err != nil {
			t.Fatal(err)
		}
	}
	environment := append(os.Environ(), "CGO_ENABLED=0", "GOARCH="+m.Arch)
	const module = "github.com/streamshim/streamshim/test/internal/"
	command(t, environment, "go", "build", "-trimpath", "-buildvcs=false", "-ldflags=-s -w", "-o", m.Payload+"/", module+"images/actor", module+"images/imageserver")
	command(t, environment, "go", "test", "-c", "-trimpath", "-ldflags=-s -w", "-o", m.Payload+"/inside.test", "./inside")
	programs := []string{"crictl", "kubelet"}
	if m.Arch != runtime.GOARCH { // the peers are this machine's
		programs = nil
		command(t, append(environment, "GOWORK=off"), "go", "-C", "../internal/peers/critools", "build", "-mod=readonly", "-trimpath", "-buildvcs=false", "-ldflags=-s -w", "-o", m.Payload+"/", "sigs.k8s.io/cri-tools/cmd/crictl")
	}
	for _, program := range programs {
		command(t, nil, "cp", "-L", filepath.Join(node.DefaultPrograms(), program), m.Payload)
	}
	// The port's driver may come later than everything else.
	const run = "#!/bin/sh\nmodprobe virtio_console\nuntil [ -e /dev/virtio-ports/run ]; do sleep 1; done\nexec >/dev/virtio-ports/run 2>&1\nexport PATH=/mnt/run:$PATH HOME=/root STREAMSHIM_VM=inside\ncd /tmp\ninside.test -test.v -test.timeout 0\necho \"inside.test: exit code $?\"\n"
	if err := os.WriteFile(filepath.Join(m.Payload, "run"), []byte(run), 0o755); err != nil {
		t.Fatal(err)
	}
}

func command(t *testing.T, environment []string, name string, arguments ...string) string {
	t.Helper()
	c := exec.Command(name, arguments...)
	c.Env = environment
	c.Stderr = os.Stderr
	out, err := c.Output()
	if err != nil {
		t.Fatalf("%s %v: %v: %s", name, arguments, err, out)
	}
	return strings.TrimSpace(string(out))
}
