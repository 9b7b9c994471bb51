package kubernetes

import (
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
)

// Two paths that every kubelet uses, however it is configured.
const (
	devicePlugins = "/var/lib/kubelet/device-plugins"
	logLinks      = "/var/log/containers"
)

// checkNoKubelet fails if a real kubelet runs here, because ours would empty its folder of device plugins. Kubelets of
// other test clusters do not matter, because they have no plugins. Nor do kubelets with their own file system, as in a
// container.
func checkNoKubelet() error {
	ours, err := os.Readlink("/proc/self/ns/mnt")
	if err != nil {
		return err
	}
	paths, _ := filepath.Glob("/proc/[0-9]*/cmdline") // the pattern is well-formed
	for _, path := range paths {
		text, err := os.ReadFile(path)
		if err != nil {
			continue // it has ended meanwhile
		}
		arguments := strings.Split(strings.TrimSuffix(string(text), "\x00"), "\x00")
		namespace, _ := os.Readlink(filepath.Join(filepath.Dir(path), "ns/mnt")) // empty if it has ended meanwhile
		if filepath.Base(arguments[0]) != "kubelet" || namespace != ours || strings.Contains(string(text), "\x00--hostname-override=127.") {
			continue
		}
		return fmt.Errorf("a kubelet runs on this machine (process %s); please use another machine or VM, because a second one would empty %s",
			filepath.Base(filepath.Dir(path)), devicePlugins)
	}
	return nil
}

// removeTraces removes what the kubelets of a cluster have left at paths that cannot be configured.
func removeTraces(dir string) error {
	entries, err := os.ReadDir(logLinks)
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	var errs []error
	for _, entry := range entries {
		link := filepath.Join(logLinks, entry.Name())
		if target, err := os.Readlink(link); err == nil && strings.HasPrefix(target, dir+"/") {
			errs = append(errs, os.Remove(link))
		}
	}
	socket := filepath.Join(devicePlugins, "kubelet.sock")
	if connection, err := net.Dial("unix", socket); err == nil {
		return errors.Join(append(errs, connection.Close())...) // the kubelet of another cluster
	} else if errors.Is(err, unix.ECONNREFUSED) {
		errs = append(errs, os.Remove(socket))
	}
	// These fail, as they should, unless they are empty.
	_ = unix.Rmdir(logLinks)
	_ = unix.Rmdir(devicePlugins)
	_ = unix.Rmdir(filepath.Dir(devicePlugins))
	return errors.Join(errs...)
}
