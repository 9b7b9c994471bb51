package check

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"

	"sigs.k8s.io/yaml"

	"github.com/streamshim/streamshim/pkg/config"
	"github.com/streamshim/streamshim/pkg/endpoint"
)

// kubeadmFlags is in the same directory as the kubelet's configuration, and overrides it.
const kubeadmFlags = "kubeadm-flags.env"

var endpointFlag = regexp.MustCompile(`--container-runtime-endpoint[= ]([^\s"']+)`)

// kubelet checks whether the kubelet talks to streamshim. Its flags override its configuration. They may come from
// kubeadm's file, or from elsewhere, such as a drop-in of its unit on OpenShift. The flags of a running kubelet are read
// from proc.
func kubelet(c config.Config, file, proc string) Result {
	const name = "kubelet"
	flags := filepath.Join(filepath.Dir(file), kubeadmFlags)
	written := ""
	if text, err := os.ReadFile(flags); err == nil {
		if match := endpointFlag.FindSubmatch(text); match != nil {
			written = string(match[1])
		}
	}
	if written != "" && !endpoint.Same(written, c.Listen) {
		return warning(name, fmt.Sprintf("write --container-runtime-endpoint=%s in %s and restart the kubelet", c.Listen, flags),
			"its flags name %q, which wins over its configuration", written)
	}
	switch running := runningFlag(proc); {
	case running != "" && !endpoint.Same(running, c.Listen):
		return warning(name, fmt.Sprintf("write --container-runtime-endpoint=%s where \"systemctl cat kubelet\" shows the flag, and restart the kubelet", c.Listen),
			"it runs with --container-runtime-endpoint=%s, which wins over its configuration", running)
	case running != "":
		return ok(name, "talks to streamshim (its command line)")
	case written != "":
		return ok(name, "talks to streamshim (%s)", flags)
	}
	text, err := os.ReadFile(file)
	if errors.Is(err, os.ErrNotExist) {
		return warning(name, "name the kubelet's configuration with --kubelet-config, or ignore this when there is no kubelet", "%s is not there", file)
	}
	if err != nil {
		return warning(name, "run it as root", "%v", err)
	}
	// The kubelet's own type would bring half of Kubernetes into the binary.
	var k struct {
		ContainerRuntimeEndpoint string `json:"containerRuntimeEndpoint"`
	}
	if err := yaml.Unmarshal(text, &k); err != nil {
		return warning(name, "correct "+file, "%s: %v", file, err)
	}
	if !endpoint.Same(k.ContainerRuntimeEndpoint, c.Listen) {
		return warning(name, fmt.Sprintf("set containerRuntimeEndpoint: %s in %s and restart the kubelet", c.Listen, file),
			"it talks to %q, not to streamshim", k.ContainerRuntimeEndpoint)
	}
	return ok(name, "talks to streamshim")
}

// runningFlag returns the endpoint in the command line of the running kubelet, or "".
func runningFlag(proc string) string {
	names, err := filepath.Glob(filepath.Join(proc, "[0-9]*", "comm"))
	if err != nil {
		return "" // cannot happen: the pattern is valid
	}
	for _, comm := range names {
		if text, err := os.ReadFile(comm); err != nil || string(text) != "kubelet\n" {
			continue
		}
		arguments, err := os.ReadFile(filepath.Join(filepath.Dir(comm), "cmdline"))
		if err != nil {
			continue // it has ended
		}
		if match := endpointFlag.FindSubmatch(bytes.ReplaceAll(arguments, []byte{0}, []byte{' '})); match != nil {
			return string(match[1])
		}
	}
	return ""
}
