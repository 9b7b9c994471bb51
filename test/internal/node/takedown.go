package node

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

const (
	stopGrace     = 10 * time.Second // for a process to obey SIGTERM
	removeTimeout = time.Minute      // for all pods through the CRI
)

// resultsCache is where CNI's library records every attachment. It cannot be configured.
const resultsCache = "/var/lib/cni/results"

// takeDown ends all that may be left of a node, in whatever state the node is. It continues after errors and returns them
// all.
func (n *Node) takeDown() error {
	if n.state.Name == "" {
		// The node was never started, or node.json was lost. The caller may remove the folder next, so at least unmount all
		// below it.
		return n.unmountAll()
	}
	ids := n.knownIDs() // while containerd's folders still have them
	errs := n.stopCompanions()
	errs = append(errs, n.stopProcess(streamshimProcess, stopGrace))
	if n.process(containerdProcess).alive() {
		// First the orderly way. The rest of this function removes by force what that leaves.
		if err := n.removeAllPods(); err != nil {
			n.logf("could not remove all pods in the orderly way: %v", err)
		}
	}
	n.disconnect()
	errs = append(errs,
		n.stopProcess(containerdProcess, stopGrace),
		n.killShims(),
		n.deleteContainers(),
		n.stopProcess(imageServerProcess, stopGrace),
		n.removeCgroups(ids),
		n.unmountAll(),
		n.removeBridge(),
		n.removePortRules(),
		n.removeResults(ids),
	)
	if err := errors.Join(errs...); err != nil {
		return err // keeps node.json for another attempt
	}
	return n.removeFiles()
}

// knownIDs returns the IDs of all sandboxes and containers that containerd knows.
func (n *Node) knownIDs() []string {
	var ids []string
	for _, folder := range []string{
		"root/io.containerd.grpc.v1.cri/sandboxes", "root/io.containerd.grpc.v1.cri/containers",
		"run/state/io.containerd.runtime.v2.task/k8s.io", "run/runc/k8s.io",
	} {
		entries, err := os.ReadDir(n.path(folder))
		if err != nil {
			continue // containerd has not created it
		}
		for _, entry := range entries {
			ids = append(ids, entry.Name())
		}
	}
	slices.Sort(ids)
	return slices.Compact(ids)
}

func (n *Node) removeAllPods() error {
	connection, err := Dial(n.ContainerdSocket())
	if err != nil {
		return err
	}
	defer func() { _ = connection.Close() }()
	client := runtimeapi.NewRuntimeServiceClient(connection)
	ctx, cancel := context.WithTimeout(context.Background(), removeTimeout)
	defer cancel()
	pods, err := client.ListPodSandbox(ctx, &runtimeapi.ListPodSandboxRequest{})
	if err != nil {
		return err
	}
	var errs []error
	for _, pod := range pods.Items {
		errs = append(errs, removePod(ctx, client, pod.Id))
	}
	return errors.Join(errs...)
}

// killShims ends the shims of this node's containerd, and gVisor's processes. They have no parent and no record, but their
// command line has the socket of this containerd, or the root of this node's gVisor.
func (n *Node) killShims() error {
	var errs []error
	for pid, arguments := range commandLines() {
		shims := strings.HasPrefix(filepath.Base(arguments[0]), "containerd-shim-") && slices.Contains(arguments, n.containerdSocketPath())
		if !shims && !slices.Contains(arguments, "--root="+n.path("run/runsc/k8s.io")) {
			continue
		}
		shim, err := identify(pid)
		if err != nil {
			continue // gone meanwhile
		}
		n.logf("ending a shim that was left, process %d", pid)
		errs = append(errs, shim.stop(0))
	}
	return errors.Join(errs...)
}

// commandLines returns the arguments of all processes that have any.
func commandLines() map[int][]string {
	all := map[int][]string{}
	paths, _ := filepath.Glob("/proc/[0-9]*/cmdline") // the pattern is well-formed
	for _, path := range paths {
		text, err := os.ReadFile(path)
		pid, numberErr := strconv.Atoi(filepath.Base(filepath.Dir(path)))
		if err == nil && numberErr == nil && len(text) > 0 {
			all[pid] = strings.Split(strings.TrimSuffix(string(text), "\x00"), "\x00")
		}
	}
	return all
}

// deleteContainers removes what runc still has, with all processes in it. It finds them whatever their cgroup: a kubelet
// chooses its own parents.
func (n *Node) deleteContainers() error {
	entries, err := os.ReadDir(n.RuncRoot())
	if errors.Is(err, os.ErrNotExist) {
		return nil // was never created
	}
	errs := []error{err}
	for _, entry := range entries {
		if strings.HasPrefix(entry.Name(), ".") {
			continue // what a newer crun keeps there for itself
		}
		n.logf("deleting a container that was left: %s", entry.Name())
		ctx, cancel := context.WithTimeout(context.Background(), removeTimeout)
		output, err := exec.CommandContext(ctx, n.Program("runc"), "--root", n.RuncRoot(), "delete", "--force", entry.Name()).CombinedOutput()
		cancel()
		if err != nil {
			errs = append(errs, fmt.Errorf("runc delete %s: %w: %s", entry.Name(), err, output))
		}
	}
	return errors.Join(errs...)
}

// cgroupParent is the parent of the cgroups of this package's pods. Pods of other clients, such as critest, are below
// "k8s.io", which is containerd's default.
func (n *Node) cgroupParent() string { return "/" + n.network() }

// removeCgroups kills what still runs in the cgroups of this node's pods and removes them, in every hierarchy (cgroup v1
// has several).
func (n *Node) removeCgroups(ids []string) error {
	hierarchies, err := mountPoints(func(m mount) bool { return m.kind == "cgroup" || m.kind == "cgroup2" })
	if err != nil {
		return err
	}
	var errs []error
	for _, hierarchy := range hierarchies {
		errs = append(errs, removeCgroup(filepath.Join(hierarchy, n.cgroupParent())))
		shared := filepath.Join(hierarchy, "k8s.io")
		for _, id := range ids {
			errs = append(errs, removeCgroup(filepath.Join(shared, id)))
		}
		_ = unix.Rmdir(shared) // fails, as it should, if it has pods of others
	}
	return errors.Join(errs...)
}

// removeCgroup removes a cgroup and those below it. It kills their processes.
func removeCgroup(root string) error {
	deadline := time.Now().Add(killTimeout)
	retry := time.NewTicker(20 * time.Millisecond) // the kernel releases a cgroup some time after its last process has ended
	defer retry.Stop()
	for {
		var folders []string
		err := filepath.WalkDir(root, func(path string, entry fs.DirEntry, err error) error {
			if err == nil && entry.IsDir() {
				folders = append(folders, path)
			}
			return nil // it may vanish meanwhile, which is the aim
		})
		if err != nil {
			return err
		}
		slices.Reverse(folders) // the deepest first
		var failure error
		for _, folder := range folders {
			killMembers(folder)
			if err := unix.Rmdir(folder); err != nil && !errors.Is(err, unix.ENOENT) {
				failure = fmt.Errorf("remove cgroup %s: %w", folder, err)
			}
		}
		if failure == nil {
			return nil
		}
		if time.Now().After(deadline) {
			return failure
		}
		<-retry.C
	}
}

func killMembers(cgroup string) {
	text, err := os.ReadFile(filepath.Join(cgroup, "cgroup.procs"))
	if err != nil {
		return
	}
	for _, field := range strings.Fields(string(text)) {
		if pid, err := strconv.Atoi(field); err == nil && pid > 1 {
			_ = unix.Kill(pid, unix.SIGKILL) // it may have ended meanwhile
		}
	}
}

type mount struct{ point, kind string }

// mountPoints returns the mount points for which the condition holds, in the order in which they were mounted.
func mountPoints(condition func(mount) bool) ([]string, error) {
	table, err := os.ReadFile("/proc/self/mounts")
	if err != nil {
		return nil, err
	}
	unescape := strings.NewReplacer(`\040`, " ", `\011`, "\t", `\012`, "\n", `\134`, `\`) // fstab(5)
	var points []string
	for line := range strings.Lines(string(table)) {
		fields := strings.Fields(line)
		if len(fields) < 3 {
			continue
		}
		if m := (mount{unescape.Replace(fields[1]), fields[2]}); condition(m) {
			points = append(points, m.point)
		}
	}
	return points, nil
}

func (n *Node) ownMounts() ([]string, error) {
	return mountPoints(func(m mount) bool { return strings.HasPrefix(m.point, n.dir+"/") })
}

// unmountAll unmounts all below the folder: root file systems, network namespaces, shm.
func (n *Node) unmountAll() error {
	points, err := n.ownMounts()
	if err != nil {
		return err
	}
	slices.Reverse(points)
	var errs []error
	for _, point := range points {
		// Detached, because a process may still be ending. EINVAL means that it went with its parent.
		if err := unix.Unmount(point, unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW); err != nil && !errors.Is(err, unix.EINVAL) && !errors.Is(err, unix.ENOENT) {
			errs = append(errs, fmt.Errorf("unmount %s: %w", point, err))
		}
	}
	return errors.Join(errs...)
}

func (n *Node) removeBridge() error {
	if _, err := os.Stat(filepath.Join("/sys/class/net", n.bridge())); errors.Is(err, os.ErrNotExist) {
		return nil
	}
	_, err := run("ip", "link", "delete", n.bridge())
	return err
}

// removePortRules removes the iptables rules of CNI's portmap for this node's network. It removes portmap's common chains
// if no network uses them any more.
func (n *Node) removePortRules() error {
	const common = "CNI-HOSTPORT-DNAT"
	rules, err := run("iptables", "-w", "10", "-t", "nat", "-S")
	if errors.Is(err, exec.ErrNotFound) || errors.Is(err, os.ErrNotExist) {
		return nil // without iptables portmap could not create any
	}
	if err != nil {
		return err
	}
	if !strings.Contains(rules, common) {
		return nil
	}
	var errs []error
	remove := func(args ...string) {
		_, err := run("iptables", append([]string{"-w", "10", "-t", "nat"}, args...)...)
		errs = append(errs, err)
	}
	commonInUse := false
	var jumps [][]string // from the built-in chains into the common ones
	for line := range strings.Lines(rules) {
		words := splitRule(strings.TrimSpace(line))
		switch {
		case len(words) < 3 || words[0] != "-A":
		case words[1] == common && slices.ContainsFunc(words, func(w string) bool { return strings.HasPrefix(w, `dnat name: "`+n.network()+`" id:`) }):
			chain := words[len(words)-1]
			remove(append([]string{"-D"}, words[1:]...)...)
			remove("-F", chain)
			remove("-X", chain)
		case words[1] == common:
			commonInUse = true
		case slices.Contains(words, "CNI-HOSTPORT-DNAT") || slices.Contains(words, "CNI-HOSTPORT-MASQ"):
			if !strings.HasPrefix(words[1], "CNI-") {
				jumps = append(jumps, words)
			}
		}
	}
	if !commonInUse {
		for _, jump := range jumps {
			remove(append([]string{"-D"}, jump[1:]...)...)
		}
		for _, chain := range []string{common, "CNI-HOSTPORT-SETMARK", "CNI-HOSTPORT-MASQ"} {
			if strings.Contains(rules, "-N "+chain+"\n") {
				remove("-F", chain)
				remove("-X", chain)
			}
		}
	}
	return errors.Join(errs...)
}

// splitRule splits a line of "iptables -S" into arguments. Quoted arguments may have spaces and escaped quotes.
func splitRule(line string) []string {
	var words []string
	var word strings.Builder
	quoted, escaped, pending := false, false, false
	for _, c := range line {
		switch {
		case escaped:
			word.WriteRune(c)
			escaped = false
		case c == '\\':
			escaped = true
		case c == '"':
			quoted, pending = !quoted, true
		case c == ' ' && !quoted:
			if pending {
				words = append(words, word.String())
			}
			word.Reset()
			pending = false
		default:
			word.WriteRune(c)
			pending = true
		}
	}
	if pending {
		words = append(words, word.String())
	}
	return words
}

// removeResults removes CNI's records of this node's pods. Those of its own network are found by its name, those of the
// loopback network, which all nodes share, by sandbox ID.
func (n *Node) removeResults(ids []string) error {
	entries, err := os.ReadDir(resultsCache)
	if errors.Is(err, os.ErrNotExist) {
		return nil // CNI was never used here
	}
	errs := []error{err}
	for _, entry := range entries {
		ours := strings.HasPrefix(entry.Name(), n.network()+"-") ||
			slices.ContainsFunc(ids, func(id string) bool { return strings.Contains(entry.Name(), id) })
		if ours {
			errs = append(errs, os.Remove(filepath.Join(resultsCache, entry.Name())))
		}
	}
	// Both fail, as they should, unless they are empty.
	_ = unix.Rmdir(resultsCache)
	_ = unix.Rmdir(filepath.Dir(resultsCache))
	return errors.Join(errs...)
}

// removeFiles removes all but the logs. It fails if something is mounted below the folder, because it would remove what is
// mounted.
func (n *Node) removeFiles() error {
	points, err := n.ownMounts()
	if err != nil {
		return err
	}
	if len(points) > 0 {
		return fmt.Errorf("still mounted: %s", strings.Join(points, ", "))
	}
	if !strings.HasPrefix(n.shimSockets(), n.dir+"/") {
		if err := os.RemoveAll(n.shimSockets()); err != nil {
			return err
		}
	}
	entries, err := os.ReadDir(n.dir)
	if err != nil {
		return err
	}
	for _, entry := range entries {
		if name := entry.Name(); name != "log" && name != "lock" && name != "node.json" {
			if err := os.RemoveAll(n.path(name)); err != nil {
				return err
			}
		}
	}
	n.state = state{Processes: map[string]process{}}
	return os.Remove(n.path("node.json")) // last, because until here another attempt must be possible
}

// lookPath also finds a program that is not in the PATH of every root shell.
func lookPath(name string) (string, error) {
	path, err := exec.LookPath(name)
	for _, folder := range []string{"/usr/sbin", "/sbin"} {
		if err != nil {
			path, err = exec.LookPath(filepath.Join(folder, name))
		}
	}
	return path, err
}

// run runs a program of the system and returns its output.
func run(name string, args ...string) (string, error) {
	path, err := lookPath(name)
	if err != nil {
		return "", err
	}
	ctx, cancel := context.WithTimeout(context.Background(), removeTimeout)
	defer cancel()
	output, err := exec.CommandContext(ctx, path, args...).CombinedOutput()
	if err != nil {
		return "", fmt.Errorf("%s %s: %w: %s", name, strings.Join(args, " "), err, output)
	}
	return string(output), nil
}
