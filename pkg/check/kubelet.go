package check

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"

	"sigs.k8s.io/yaml"

	"github.com/streamshim/streamshim/pkg/config"
)

// kubeadmFlags lies beside the kubelet's configuration. What it says wins.
const kubeadmFlags = "kubeadm-flags.env"

var endpointFlag = regexp.MustCompile(`--container-runtime-endpoint[= ]([^\s"']+)`)

// kubelet says whether the kubelet talks to streamshim.
func kubelet(c config.Config, file string) Result {
	const name = "kubelet"
	flags := filepath.Join(filepath.Dir(file), kubeadmFlags)
	if text, err := os.ReadFile(flags); err == nil {
		if match := endpointFlag.FindSubmatch(text); match != nil && string(match[1]) != c.Listen {
			return warning(name, fmt.Sprintf("write --container-runtime-endpoint=%s in %s and restart the kubelet", c.Listen, flags),
				"its flags name %q, which wins over its configuration", match[1])
		} else if match != nil {
			return ok(name, "talks to streamshim (%s)", flags)
		}
	}
	text, err := os.ReadFile(file)
	if errors.Is(err, os.ErrNotExist) {
		return warning(name, "name the kubelet's configuration with --kubelet-config, or ignore this when there is no kubelet", "%s is not there", file)
	}
	if err != nil {
		return warning(name, "run it as root", "%v", err)
	}
	// Not the kubelet's own type, which brings half of Kubernetes into the binary.
	var k struct {
		ContainerRuntimeEndpoint string `json:"containerRuntimeEndpoint"`
	}
	if err := yaml.Unmarshal(text, &k); err != nil {
		return warning(name, "mend "+file, "%s: %v", file, err)
	}
	if k.ContainerRuntimeEndpoint != c.Listen {
		return warning(name, fmt.Sprintf("set containerRuntimeEndpoint: %s in %s and restart the kubelet", c.Listen, file),
			"it talks to %q, not to streamshim", k.ContainerRuntimeEndpoint)
	}
	return ok(name, "talks to streamshim")
}
