package cri

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/http"
	"os"
	"path/filepath"

	"github.com/pelletier/go-toml/v2"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

const (
	crioRuntimeName = "cri-o" // VersionResponse.runtime_name

	// crioRuntimeTypeVM is the runtime_type of handlers that run containers in virtual machines. The others, "oci"
	// (also written "") and "pod" (conmon-rs), use an OCI runtime's command line.
	crioRuntimeTypeVM = "vm"

	// crioConfigLimit bounds CRI-O's response to a request for its configuration, in bytes.
	crioConfigLimit = 4 << 20
)

// crioHandlerAnnotation, in a sandbox's spec, names its runtime handler, "" being the default. CRI-O does not fill
// in PodSandboxStatus.runtime_handler.
const crioHandlerAnnotation = "io.kubernetes.cri-o.RuntimeHandler"

// crioBinaryAnnotations, in a container's spec, name the binary that CRI-O chose for a handler with
// platform_runtime_paths. The first is the newer name.
var crioBinaryAnnotations = []string{"platform-runtime-path.crio.io", "io.kubernetes.cri-o.PlatformRuntimePath"}

// crioRuntimes is CRI-O's table of runtime handlers.
type crioRuntimes struct {
	defaultHandler string
	handlers       map[string]crioHandler
}

type crioHandler struct {
	RuntimePath string `toml:"runtime_path"`
	RuntimeType string `toml:"runtime_type"`
	RuntimeRoot string `toml:"runtime_root"`
}

// crioRuntime finds the OCI runtime behind a CRI-O container. A container's status does not say: the sandbox knows
// the handler, CRI-O's configuration describes the handler, and the OCI runtime's directory for the container
// proves it.
func (r *resolver) crioRuntime(ctx context.Context, id string, info containerInfo) (ociRuntime, error) {
	runtimes, err := r.crioRuntimes(ctx)
	if err != nil {
		return ociRuntime{}, fmt.Errorf("CRI-O's configuration: %w", err)
	}
	handler, known, err := r.crioHandler(ctx, info.SandboxID)
	if err != nil {
		return ociRuntime{}, err
	}
	if !known {
		return r.crioRuntimeByState(id, info, runtimes)
	}
	if handler == "" {
		handler = runtimes.defaultHandler
	}
	settings, ok := runtimes.handlers[handler]
	if !ok {
		return ociRuntime{}, fmt.Errorf("CRI-O's configuration has no runtime handler %q", handler)
	}
	return r.crioOCIRuntime(id, info, handler, settings)
}

// crioHandler asks for a sandbox's handler. known is false if the answer does not name it.
func (r *resolver) crioHandler(ctx context.Context, sandboxID string) (handler string, known bool, err error) {
	response, err := r.upstream.runtime.PodSandboxStatus(ctx, &runtimeapi.PodSandboxStatusRequest{PodSandboxId: sandboxID, Verbose: true})
	if err != nil {
		return "", false, err
	}
	if handler := response.GetStatus().GetRuntimeHandler(); handler != "" {
		return handler, true, nil
	}
	info, err := parseSandboxInfo(response.GetInfo())
	if err != nil {
		return "", false, err
	}
	if info.RuntimeSpec == nil {
		return "", false, nil
	}
	handler, known = info.RuntimeSpec.Annotations[crioHandlerAnnotation]
	return handler, known, nil
}

// crioRuntimeByState chooses the only handler whose OCI runtime keeps state for the container.
func (r *resolver) crioRuntimeByState(id string, info containerInfo, runtimes crioRuntimes) (ociRuntime, error) {
	var found ociRuntime
	for name, settings := range runtimes.handlers {
		runtime, err := r.crioOCIRuntime(id, info, name, settings)
		if err != nil || runtime.binary == "" {
			continue
		}
		if found.binary != "" && found != runtime {
			return ociRuntime{}, fmt.Errorf("both %s and %s may be the container's OCI runtime", found.binary, runtime.binary)
		}
		found = runtime
	}
	if found.binary == "" {
		return ociRuntime{}, errors.New("none of CRI-O's runtime handlers has state for the container")
	}
	return found, nil
}

func (r *resolver) crioOCIRuntime(id string, info containerInfo, name string, settings crioHandler) (ociRuntime, error) {
	runtime := ociRuntime{kind: settings.RuntimeType}
	if runtime.kind == "" {
		runtime.kind = "oci"
	}
	if runtime.kind == crioRuntimeTypeVM {
		return runtime, nil
	}
	binary := settings.RuntimePath
	if info.RuntimeSpec != nil {
		for _, annotation := range crioBinaryAnnotations {
			if path := info.RuntimeSpec.Annotations[annotation]; filepath.IsAbs(path) {
				binary = path
				break
			}
		}
	}
	if binary == "" {
		binary = name // CRI-O looks up a handler without a path by its name
	}
	if !runcCompatible(binary) {
		return runtime, nil
	}
	binary, err := r.lookPath(binary)
	if err != nil {
		return runtime, fmt.Errorf("OCI runtime of CRI-O's handler %q: %w", name, err)
	}
	// CRI-O's own default for an empty root was /run/runc and is /run/crun (1.31).
	roots := []string{settings.RuntimeRoot}
	if settings.RuntimeRoot == "" {
		roots = []string{"/run/" + name, "/run/crun", "/run/runc"}
	}
	for _, root := range roots {
		_, err := os.Stat(filepath.Join(root, id))
		if err == nil {
			runtime.binary, runtime.root = binary, root
			return runtime, nil
		}
		if !errors.Is(err, fs.ErrNotExist) {
			return runtime, fmt.Errorf("state of CRI-O's handler %q: %w", name, err)
		}
	}
	return runtime, fmt.Errorf("CRI-O's handler %q has no state for the container in %v", name, roots)
}

// crioRuntimes asks CRI-O for its configuration. Newer versions return it in a verbose Status (cri-o#9122). For
// others it uses HTTP on the same socket, as "crio status config" does.
func (r *resolver) crioRuntimes(ctx context.Context) (crioRuntimes, error) {
	response, err := r.upstream.runtime.Status(ctx, &runtimeapi.StatusRequest{Verbose: true})
	if err != nil {
		return crioRuntimes{}, err
	}
	runtimes, err := parseCrioStatusConfig(response.GetInfo()["config"])
	if err == nil && len(runtimes.handlers) > 0 {
		return runtimes, nil
	}
	text, httpErr := r.crioHTTPConfig(ctx)
	if httpErr != nil {
		return crioRuntimes{}, errors.Join(err, httpErr)
	}
	return parseCrioTOMLConfig(text)
}

// parseCrioStatusConfig parses info["config"] of a verbose Status. Before cri-o#9122 it only held the name of the
// pause image; the table is then empty.
func parseCrioStatusConfig(text string) (crioRuntimes, error) {
	var config struct {
		Crio struct {
			DefaultRuntime string
			Runtimes       map[string]crioHandler
		} `json:"crio"`
	}
	if text == "" {
		return crioRuntimes{}, nil
	}
	if err := json.Unmarshal([]byte(text), &config); err != nil {
		return crioRuntimes{}, fmt.Errorf("config in the verbose status: %w", err)
	}
	return crioRuntimes{defaultHandler: config.Crio.DefaultRuntime, handlers: config.Crio.Runtimes}, nil
}

// parseCrioTOMLConfig parses configuration in the format of crio.conf(5).
func parseCrioTOMLConfig(text []byte) (crioRuntimes, error) {
	var config struct {
		Crio struct {
			Runtime struct {
				DefaultRuntime string                 `toml:"default_runtime"`
				Runtimes       map[string]crioHandler `toml:"runtimes"`
			} `toml:"runtime"`
		} `toml:"crio"`
	}
	if err := toml.Unmarshal(text, &config); err != nil {
		return crioRuntimes{}, fmt.Errorf("crio.conf: %w", err)
	}
	return crioRuntimes{defaultHandler: config.Crio.Runtime.DefaultRuntime, handlers: config.Crio.Runtime.Runtimes}, nil
}

func (r *resolver) crioHTTPConfig(ctx context.Context) ([]byte, error) {
	client := http.Client{Transport: &http.Transport{
		DisableKeepAlives: true,
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			var dialer net.Dialer
			return dialer.DialContext(ctx, "unix", r.upstream.path)
		},
	}}
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://localhost/config", nil)
	if err != nil {
		return nil, err
	}
	response, err := client.Do(request)
	if err != nil {
		return nil, err
	}
	defer response.Body.Close()
	if response.StatusCode != http.StatusOK {
		return nil, fmt.Errorf("GET /config: %s", response.Status)
	}
	text, err := io.ReadAll(io.LimitReader(response.Body, crioConfigLimit))
	if err != nil {
		return nil, fmt.Errorf("GET /config: %w", err)
	}
	return text, nil
}
