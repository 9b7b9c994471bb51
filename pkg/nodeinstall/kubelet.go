package nodeinstall

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strings"

	"sigs.k8s.io/yaml"

	"github.com/streamshim/streamshim/pkg/endpoint"
)

// Kind is how the kubelet of a node is configured.
type Kind string

// The kinds of kubelets.
const (
	// Plain is a service of its own with a configuration file, and maybe kubeadm's flags, which win.
	Plain Kind = "plain"
	// K3s and RKE2 run the kubelet themselves. A drop-in of their configuration gives it a flag. Their own
	// setting container-runtime-endpoint will not do: it turns their containerd off.
	K3s  Kind = "k3s"
	RKE2 Kind = "rke2"
)

// Places of the default kubelets.
const (
	defaultKubeletConfig = "/var/lib/kubelet/config.yaml"
	kubeadmFlags         = "kubeadm-flags.env"
	dropIn               = "90-streamshim.yaml"
	// k3sRuntime is where K3s and RKE2 have their containerd.
	k3sRuntime = "unix:///run/k3s/containerd/containerd.sock"
)

// Kubelet is the kubelet of this node and the place where its runtime's endpoint is written.
type Kubelet struct {
	Kind    Kind
	Service string // its unit
	File    string // its configuration, for K3s and RKE2 the drop-in

	// What the running kubelet's command line says; empty when it does not, or when none runs.
	Kubeconfig string
	Hostname   string
	flag       string // --container-runtime-endpoint
}

// FindKubelet finds out which kubelet this node has. What is not empty in named is taken as it is. root is
// / and proc /proc, except in tests.
func FindKubelet(ctx context.Context, services Services, named Kubelet, root, proc string) (*Kubelet, error) {
	k := named
	flags := runningKubelet(proc)
	k.flag = flags["container-runtime-endpoint"]
	if k.Kind == "" {
		k.Kind = Plain
		for _, kind := range []Kind{RKE2, K3s} {
			if distributionService(ctx, services, kind) != "" {
				k.Kind = kind
			}
		}
	}
	switch k.Kind {
	case K3s, RKE2:
		if k.Service == "" {
			if k.Service = distributionService(ctx, services, k.Kind); k.Service == "" {
				return nil, fmt.Errorf("no service of %s runs here", k.Kind)
			}
		}
		k.File = orElse(k.File, filepath.Join(root, "etc/rancher", string(k.Kind), "config.yaml.d", dropIn))
		k.Kubeconfig = orElse(k.Kubeconfig, filepath.Join(root, "var/lib/rancher", string(k.Kind), "agent/kubelet.kubeconfig"))
	case Plain:
		k.Service = orElse(k.Service, "kubelet.service")
		k.File = orElse(k.File, orElse(flags["config"], filepath.Join(root, defaultKubeletConfig)))
		k.Kubeconfig = orElse(k.Kubeconfig, orElse(flags["kubeconfig"], filepath.Join(root, "etc/kubernetes/kubelet.conf")))
	default:
		return nil, fmt.Errorf("%q is no kind of kubelet: plain, k3s or rke2", k.Kind)
	}
	k.Hostname = orElse(k.Hostname, flags["hostname-override"])
	return &k, nil
}

func distributionService(ctx context.Context, services Services, kind Kind) string {
	names := []string{"k3s.service", "k3s-agent.service"}
	if kind == RKE2 {
		names = []string{"rke2-server.service", "rke2-agent.service"}
	}
	for _, name := range names {
		if services.Active(ctx, name) {
			return name
		}
	}
	return ""
}

func orElse(s, otherwise string) string {
	if s == "" {
		return otherwise
	}
	return s
}

// runningKubelet is the flags of the kubelet that runs, by their names.
func runningKubelet(proc string) map[string]string {
	flags := map[string]string{}
	names, _ := filepath.Glob(filepath.Join(proc, "[0-9]*", "comm")) // the pattern is good
	for _, comm := range names {
		if name, err := os.ReadFile(comm); err != nil || strings.TrimSpace(string(name)) != "kubelet" {
			continue
		}
		line, err := os.ReadFile(filepath.Join(filepath.Dir(comm), "cmdline"))
		if err != nil {
			continue // ended meanwhile
		}
		args := strings.Split(strings.TrimSuffix(string(line), "\x00"), "\x00")
		for n, arg := range args {
			name, value, joined := strings.Cut(strings.TrimLeft(arg, "-"), "=")
			if !joined && n+1 < len(args) {
				value = args[n+1]
			}
			if strings.HasPrefix(arg, "-") {
				flags[name] = value
			}
		}
		return flags
	}
	return flags
}

// Describe says where the endpoint is written.
func (k *Kubelet) Describe() string { return fmt.Sprintf("%s, in %s", k.Service, k.File) }

var dropInEndpoint = regexp.MustCompile(`(?m)^- container-runtime-endpoint=(\S+)$`)

var endpointFlag = regexp.MustCompile(`(--container-runtime-endpoint[= ])([^\s"']+)`)

// Endpoint is the runtime's endpoint that the kubelet has, or would have after a restart.
func (k *Kubelet) Endpoint() (string, error) {
	if k.Kind != Plain {
		text, err := os.ReadFile(k.File)
		if errors.Is(err, os.ErrNotExist) {
			return k3sRuntime, nil
		}
		if err != nil {
			return "", err
		}
		if match := dropInEndpoint.FindSubmatch(text); match != nil {
			return string(match[1]), nil
		}
		return "", fmt.Errorf("%s is not what was written there; remove it", k.File)
	}
	if text, err := os.ReadFile(k.flagsFile()); err == nil {
		if match := endpointFlag.FindSubmatch(text); match != nil {
			return withScheme(string(match[2])), nil
		}
	}
	if k.flag != "" {
		return "", fmt.Errorf("the kubelet has --container-runtime-endpoint=%s, which wins, from its unit or a drop-in (\"systemctl cat %s\"): take it from there, so that %s decides, or change it by hand",
			k.flag, k.Service, k.File)
	}
	text, err := os.ReadFile(k.File)
	if err != nil {
		return "", fmt.Errorf("the kubelet's configuration: %w; name it with --kubelet-config", err)
	}
	var c struct {
		ContainerRuntimeEndpoint string `json:"containerRuntimeEndpoint"`
	}
	if err := yaml.Unmarshal(text, &c); err != nil {
		return "", fmt.Errorf("%s: %w", k.File, err)
	}
	return withScheme(orElse(c.ContainerRuntimeEndpoint, "unix:///run/containerd/containerd.sock")), nil // the kubelet's default
}

func withScheme(address string) string {
	if path, err := endpoint.Path(address); err == nil {
		return "unix://" + path
	}
	return address
}

func (k *Kubelet) flagsFile() string { return filepath.Join(filepath.Dir(k.File), kubeadmFlags) }

// SetEndpoint writes the endpoint where the kubelet finds it after a restart. Everything else there stays
// as it is.
func (k *Kubelet) SetEndpoint(address string) error {
	if k.Kind != Plain {
		if endpoint.Same(address, k3sRuntime) {
			return remove(k.File)
		}
		// The + adds to what other files say.
		return writeFile(k.File, []byte("# Written by \"streamshim node install\".\nkubelet-arg+:\n- container-runtime-endpoint="+address+"\n"), 0o600)
	}
	if text, err := os.ReadFile(k.flagsFile()); err == nil && endpointFlag.Match(text) {
		return replaceFile(k.flagsFile(), endpointFlag.ReplaceAll(text, []byte("${1}"+address)))
	}
	text, err := os.ReadFile(k.File)
	if err != nil {
		return err
	}
	changed, err := setKey(text, address)
	if err != nil {
		return fmt.Errorf("%s: %w", k.File, err)
	}
	return replaceFile(k.File, changed)
}

// Forget removes what only a kubelet with streamshim needs.
func (k *Kubelet) Forget() error {
	if k.Kind != Plain {
		return remove(k.File)
	}
	return nil
}

// replaceFile keeps the file's mode.
func replaceFile(path string, text []byte) error {
	if target, err := filepath.EvalSymlinks(path); err == nil {
		path = target // the link stays one
	}
	info, err := os.Stat(path)
	if err != nil {
		return err
	}
	return writeFile(path, text, info.Mode().Perm())
}

var endpointKey = regexp.MustCompile(`(?m)^([ \t]*"?containerRuntimeEndpoint"?[ \t]*:[ \t]*)("[^"\n]*"|'[^'\n]*'|[^\s,#]*)`)

// setKey writes the endpoint into a kubelet's configuration, YAML or JSON, and leaves every other byte.
func setKey(text []byte, address string) ([]byte, error) {
	quoted := []byte(`"` + address + `"`)
	var changed []byte
	switch trimmed := bytes.TrimSpace(text); {
	case endpointKey.Match(text):
		changed = endpointKey.ReplaceAll(text, append([]byte("${1}"), quoted...))
	case bytes.HasPrefix(trimmed, []byte("{")):
		start := bytes.IndexByte(text, '{') + 1
		comma := ","
		if bytes.Equal(bytes.Join(bytes.Fields(trimmed), nil), []byte("{}")) {
			comma = ""
		}
		changed = append(append(append([]byte{}, text[:start]...), "\n  \"containerRuntimeEndpoint\": "+string(quoted)+comma...), text[start:]...)
	default:
		changed = append([]byte{}, text...)
		if len(changed) > 0 && !bytes.HasSuffix(changed, []byte("\n")) {
			changed = append(changed, '\n')
		}
		changed = append(changed, "containerRuntimeEndpoint: "+string(quoted)+"\n"...)
	}
	var c struct {
		ContainerRuntimeEndpoint string `json:"containerRuntimeEndpoint"`
	}
	if err := yaml.Unmarshal(changed, &c); err != nil {
		return nil, err
	}
	if c.ContainerRuntimeEndpoint != address {
		return nil, errors.New("containerRuntimeEndpoint cannot be set by changing one line; set it by hand")
	}
	return changed, nil
}
