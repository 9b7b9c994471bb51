package node

import (
	"bytes"
	"context"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"text/template"

	"github.com/streamshim/streamshim/test/internal/images"
)

// ImageHost is the registry host in the node's own image references. No such host exists: the node asks its image server
// for every host.
const ImageHost = "streamshim.test"

// Image returns the full reference of one of the images of test/internal/images, such as images.Busybox.
func Image(reference string) string { return ImageHost + "/" + reference }

// containerdConfiguration is the config.toml of containerd 2.3 and later.
var containerdConfiguration = template.Must(template.New("containerd").Parse(`version = 4
root = '{{.Dir}}/root'
state = '{{.Dir}}/run/state'
temp = '{{.Dir}}/tmp'
imports = []

[debug]
  level = 'info'

[plugins.'io.containerd.server.v1.grpc']
  address = '{{.Dir}}/run/containerd.sock'
[plugins.'io.containerd.server.v1.ttrpc']
  address = '{{.Dir}}/run/containerd.sock.ttrpc'

[plugins.'io.containerd.cri.v1.images']
  snapshotter = 'overlayfs'
  [plugins.'io.containerd.cri.v1.images'.pinned_images]
    sandbox = '{{.SandboxImage}}'
  [plugins.'io.containerd.cri.v1.images'.registry]
    config_path = '{{.Dir}}/certs.d'

[plugins.'io.containerd.cri.v1.runtime']
  # A machine without CAP_SYS_RESOURCE cannot set a sandbox's -998.
  restrict_oom_score_adj = true
  disable_apparmor = {{.NoAppArmor}}
  netns_mounts_under_state_dir = true
  cdi_spec_dirs = ['{{.Dir}}/cdi']
  [plugins.'io.containerd.cri.v1.runtime'.cni]
    bin_dirs = ['{{.Programs}}']
    conf_dir = '{{.Dir}}/cni'
  [plugins.'io.containerd.cri.v1.runtime'.containerd]
    default_runtime_name = 'runc'
    [plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.runc]
      runtime_type = 'io.containerd.runc.v2'
      runtime_path = '{{.Programs}}/containerd-shim-runc-v2'
      [plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.runc.options]
        BinaryName = '{{.Programs}}/runc'
        Root = '{{.Dir}}/run/runc'
        SystemdCgroup = false
{{- if .GVisor}}
    [plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.gvisor]
      runtime_type = 'io.containerd.runsc.v1'
      runtime_path = '{{.Programs}}/containerd-shim-runsc-v1'
      [plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.gvisor.options]
        TypeUrl = 'io.containerd.runsc.v1.options'
        ConfigPath = '{{.Dir}}/runsc.toml'
{{- end}}

[plugins.'io.containerd.grpc.v1.cri']
  disable_tcp_service = true
  stream_server_address = '127.0.0.1'
  stream_server_port = '0'
  enable_tls_streaming = false

# The rest only keeps containerd out of the system's own folders.
[plugins.'io.containerd.internal.v1.opt']
  path = '{{.Dir}}/opt'
[plugins.'io.containerd.image-verifier.v1.bindir']
  bin_dir = '{{.Dir}}/opt/image-verifier'
[plugins.'io.containerd.nri.v1.nri']
  disable = true
[plugins.'io.containerd.shim.v1.manager']
  socket_dir = '{{.ShimSockets}}'
`))

// olderContainerdConfiguration is the same for containerd 1.7, which later ones before 2.3 understand.
var olderContainerdConfiguration = template.Must(template.New("containerd").Parse(`version = 2
root = '{{.Dir}}/root'
state = '{{.Dir}}/run/state'
temp = '{{.Dir}}/tmp'
imports = []

[debug]
  level = 'info'
[grpc]
  address = '{{.Dir}}/run/containerd.sock'
[ttrpc]
  address = '{{.Dir}}/run/containerd.sock.ttrpc'

[plugins.'io.containerd.grpc.v1.cri']
  sandbox_image = '{{.SandboxImage}}'
  restrict_oom_score_adj = true
  disable_apparmor = {{.NoAppArmor}}
  netns_mounts_under_state_dir = true
  cdi_spec_dirs = ['{{.Dir}}/cdi']
  disable_tcp_service = true
  stream_server_address = '127.0.0.1'
  stream_server_port = '0'
  enable_tls_streaming = false
  [plugins.'io.containerd.grpc.v1.cri'.registry]
    config_path = '{{.Dir}}/certs.d'
  [plugins.'io.containerd.grpc.v1.cri'.cni]
    bin_dir = '{{.Programs}}'
    conf_dir = '{{.Dir}}/cni'
  [plugins.'io.containerd.grpc.v1.cri'.containerd]
    snapshotter = 'overlayfs'
    default_runtime_name = 'runc'
    [plugins.'io.containerd.grpc.v1.cri'.containerd.runtimes.runc]
      runtime_type = 'io.containerd.runc.v2'
      runtime_path = '{{.Programs}}/containerd-shim-runc-v2'
      [plugins.'io.containerd.grpc.v1.cri'.containerd.runtimes.runc.options]
        BinaryName = '{{.Programs}}/runc'
        Root = '{{.Dir}}/run/runc'
        SystemdCgroup = false

[plugins.'io.containerd.internal.v1.opt']
  path = '{{.Dir}}/opt'
[plugins.'io.containerd.nri.v1.nri']
  disable = true
`))

// configurationFor returns the template that the containerd in the folder of programs understands.
func configurationFor(programs string) (*template.Template, error) {
	out, err := exec.Command(filepath.Join(programs, "containerd"), "--version").Output()
	if err != nil {
		return nil, fmt.Errorf("ask containerd for its version: %w", err)
	}
	var major, minor int
	fields := strings.Fields(string(out)) // containerd MODULE v2.4.2 REVISION
	if len(fields) < 3 {
		return nil, fmt.Errorf("containerd says of its version: %q", out)
	}
	if _, err := fmt.Sscanf(fields[2], "v%d.%d", &major, &minor); err != nil {
		return nil, fmt.Errorf("containerd's version %q: %w", fields[2], err)
	}
	if major < 2 || major == 2 && minor < 3 {
		return olderContainerdConfiguration, nil
	}
	return containerdConfiguration, nil
}

// gVisorConfiguration is for gVisor's shim.
var gVisorConfiguration = template.Must(template.New("runsc").Parse(`binary_name = '{{.Programs}}/runsc'
root = '{{.Dir}}/run/runsc'
[runsc_config]
  # It cannot make a sandbox's cgroup where a container has controllers of its own, as on cgroup v1 without systemd.
  ignore-cgroups = 'true'
`))

// networkConfiguration is a CNI network of a bridge, an address and host ports.
var networkConfiguration = template.Must(template.New("cni").Parse(`{
  "cniVersion": "1.0.0",
  "name": "{{.Network}}",
  "plugins": [
    {
      "type": "bridge",
      "bridge": "{{.Bridge}}",
      "isGateway": true,
      "ipMasq": false,
      "hairpinMode": true,
      "ipam": {
        "type": "host-local",
        "dataDir": "{{.Dir}}/addresses",
        "ranges": [[{"subnet": "{{.Subnet}}"}]],
        "routes": [{"dst": "0.0.0.0/0"}]
      }
    },
    {"type": "portmap", "capabilities": {"portMappings": true}, "snat": true}
  ]
}
`))

// registryConfiguration sends requests for every registry host to the image server. Without its first line, containerd
// would then ask the real host for an image that the image server does not have.
var registryConfiguration = template.Must(template.New("hosts.toml").Parse(`server = "http://{{.Registry}}"
[host."http://{{.Registry}}"]
  capabilities = ["pull", "resolve"]
`))

var crictlConfiguration = template.Must(template.New("crictl.yaml").Parse(`runtime-endpoint: {{.Socket}}
image-endpoint: {{.Socket}}
timeout: 60
`))

// GVisorHandler is the runtime handler of pods that gVisor runs, on a node whose programs have it.
const GVisorHandler = "gvisor"

func (n *Node) hasGVisor() bool {
	_, err := os.Stat(n.Program("containerd-shim-runsc-v1"))
	return err == nil
}

// The names of the node's traces outside its folder.
func (n *Node) bridge() string  { return "ss-" + n.state.Name }
func (n *Node) network() string { return "streamshim-" + n.state.Name }

// subnet derives a subnet from the node's name, in 10.200.0.0 to 10.249.249.255.
func (n *Node) subnet() string {
	h := hash(n.state.Name)
	return fmt.Sprintf("10.%d.%d.0/24", 200+h%50, h/50%250)
}

// shimSockets is the folder of the shims' sockets. Their names have 64 characters, so a node whose folder has a long path
// puts them elsewhere.
func (n *Node) shimSockets() string {
	inside := n.path("s")
	if len(inside)+len("/")+64 < 107 {
		return inside
	}
	return filepath.Join(os.TempDir(), fmt.Sprintf("streamshim-%s-%08x", n.state.Name, hash(n.dir)))
}

func (n *Node) writeConfiguration() error {
	forContainerd, err := configurationFor(n.state.Programs)
	if err != nil {
		return err
	}
	_, err = os.Stat("/sys/kernel/security/apparmor/profiles")
	values := map[string]any{
		"Dir": n.dir, "Programs": n.state.Programs, "Registry": n.state.Registry, "Socket": n.Socket(),
		"SandboxImage": Image(images.Sandbox), "NoAppArmor": err != nil, "ShimSockets": n.shimSockets(),
		"GVisor": n.hasGVisor(), "Network": n.network(), "Bridge": n.bridge(), "Subnet": n.subnet(),
	}
	for _, folder := range []string{n.path("run"), n.path("tmp"), n.path("cdi"), n.path("opt"), n.path("pods"), n.shimSockets()} {
		if err := os.MkdirAll(folder, 0o711); err != nil {
			return err
		}
	}
	for name, content := range map[string]*template.Template{
		"containerd.toml":             forContainerd,
		"cni/10-streamshim.conflist":  networkConfiguration,
		"certs.d/_default/hosts.toml": registryConfiguration,
		"crictl.yaml":                 crictlConfiguration,
		"runsc.toml":                  gVisorConfiguration,
	} {
		var text bytes.Buffer
		if err := content.Execute(&text, values); err != nil {
			return err
		}
		if err := os.MkdirAll(filepath.Dir(n.path(name)), 0o755); err != nil {
			return err
		}
		if err := os.WriteFile(n.path(name), text.Bytes(), 0o644); err != nil {
			return err
		}
	}
	return nil
}

func (n *Node) startContainerd() error {
	return n.startProcess(containerdProcess, n.Program("containerd"), []string{"--config", n.path("containerd.toml")})
}

func (n *Node) startStreamshim() error {
	return n.startProcess(streamshimProcess, n.state.Streamshim, append([]string{
		"serve", "--listen", n.Socket(), "--upstream", n.ContainerdSocket(),
		"--stream-address", "127.0.0.1:0",
		"--admin", "unix://" + n.AdminSocket(),
		"--state-dir", n.path("run/streamshim"), "--log-level", "debug", "--log-format", "text",
	}, n.state.StreamshimArgs...))
}

// startImageServer builds the image server and starts it on a socket that is already open. So its address is known, and
// requests wait for it instead of failing.
func (n *Node) startImageServer(ctx context.Context) error {
	const module = "github.com/streamshim/streamshim/test/internal/images/"
	build := exec.CommandContext(ctx, "go", "build", "-trimpath", "-buildvcs=false", "-ldflags=-s -w",
		"-o", n.path("bin")+"/", module+"actor", module+"imageserver")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if output, err := build.CombinedOutput(); err != nil {
		return fmt.Errorf("build the image server (from inside the module): %w\n%s", err, output)
	}
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return err
	}
	defer func() { _ = listener.Close() }() // the image server has a duplicate
	file, err := listener.(*net.TCPListener).File()
	if err != nil {
		return err
	}
	defer func() { _ = file.Close() }()
	n.state.Registry = listener.Addr().String()
	return n.startProcess(imageServerProcess, n.path("bin/imageserver"), []string{
		"-busybox", n.Program("busybox"), "-actor", n.path("bin/actor"), "-listen-fd", "3",
	}, file)
}

// ImageDigest asks the image server for the digest of one of its images, such as images.Busybox.
func (n *Node) ImageDigest(ctx context.Context, reference string) (string, error) {
	repository, tag, _ := strings.Cut(reference, ":")
	request, err := http.NewRequestWithContext(ctx, http.MethodHead, "http://"+n.state.Registry+"/v2/"+repository+"/manifests/"+tag, nil)
	if err != nil {
		return "", err
	}
	response, err := http.DefaultClient.Do(request)
	if err != nil {
		return "", fmt.Errorf("ask the image server for %s: %w", reference, err)
	}
	if err := response.Body.Close(); err != nil {
		return "", err
	}
	digest := response.Header.Get("Docker-Content-Digest")
	if response.StatusCode != http.StatusOK || digest == "" {
		return "", fmt.Errorf("the image server has no %s: %s", reference, response.Status)
	}
	return digest, nil
}
