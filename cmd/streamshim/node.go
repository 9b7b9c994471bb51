package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"net/http/httputil"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/streamshim/streamshim/deploy"
	"github.com/streamshim/streamshim/pkg/config"
	"github.com/streamshim/streamshim/pkg/nodeinstall"
)

func newNodeCommand() *cobra.Command {
	command := &cobra.Command{
		Use:   "node",
		Short: "Install or uninstall streamshim on this node, and configure the kubelet",
		Long: `node installs streamshim on a node without a package: the program, its systemd unit and its configuration. It
points the kubelet at streamshim, and reverts everything if the node does not become Ready in time.`,
		Args: cobra.NoArgs,
	}
	command.AddCommand(newNodeInstallCommand(), newNodeUninstallCommand(), newNodeAgentCommand())
	return command
}

// nodeFlags say what to install where. The agent passes its own to the command that it runs on the node.
type nodeFlags struct {
	prefix, unitDir, configFile, stateFile, listen, upstream string
	kind, kubeletConfig, kubeletService, systemctl           string
	kubeconfig, nodeName, serviceAccount, apiServer          string
	configuration                                            string
	readyTimeout                                             time.Duration
}

func addNodeFlags(flags *pflag.FlagSet) *nodeFlags {
	f := &nodeFlags{}
	flags.StringVar(&f.prefix, "prefix", "/opt/streamshim", "`folder` on the node for the program")
	flags.StringVar(&f.unitDir, "unit-dir", "/etc/systemd/system", "`folder` on the node for the systemd unit")
	flags.StringVar(&f.configFile, "config", config.DefaultFile, "configuration `file` of streamshim on the node")
	flags.StringVar(&f.stateFile, "state", "/var/lib/streamshim/install.json", "`file` on the node that records what was done")
	flags.StringVar(&f.listen, "listen", config.Default().Listen, "`socket` that the kubelet is pointed at")
	flags.StringVar(&f.upstream, "upstream", "", "`socket` of the runtime (default: the one that the kubelet used)")
	flags.StringVar(&f.kind, "kubelet", "", "`kind` of kubelet: plain, k3s or rke2 (default: the one that runs)")
	flags.StringVar(&f.kubeletConfig, "kubelet-config", "", "the kubelet's configuration `file` (default: the one in its command line)")
	flags.StringVar(&f.kubeletService, "kubelet-service", "", "the kubelet's systemd `unit` (default kubelet.service, or that of k3s or rke2)")
	flags.StringVar(&f.systemctl, "systemctl", "systemctl", "`program` that accepts systemctl's commands")
	flags.StringVar(&f.kubeconfig, "kubeconfig", "", "`file` for asking whether the node is Ready (default: the kubelet's own)")
	flags.StringVar(&f.nodeName, "node-name", os.Getenv("NODE_NAME"), "`name` of this node in the cluster (default: $NODE_NAME, or the kubelet's, or the host's)")
	flags.StringVar(&f.serviceAccount, "service-account", "", "`folder` with a token and ca.crt, instead of --kubeconfig")
	flags.StringVar(&f.apiServer, "api-server", "", "`URL` of the API server for --service-account (default: $KUBERNETES_SERVICE_HOST)")
	flags.StringVar(&f.configuration, "configuration", "", "`file` whose text becomes the node's configuration (default: it is not changed)")
	flags.DurationVar(&f.readyTimeout, "ready-timeout", 3*time.Minute, "`time` for the node to be Ready again before the change is reverted")
	return f
}

// installer returns an installer for this node, and a function that releases it.
func (f *nodeFlags) installer(ctx context.Context) (*nodeinstall.Installer, func() error, error) {
	if os.Geteuid() != 0 {
		return nil, nil, errors.New("run it as root")
	}
	services := nodeinstall.Systemctl{Program: f.systemctl}
	kubelet, err := nodeinstall.FindKubelet(ctx, services, nodeinstall.Kubelet{
		Kind: nodeinstall.Kind(f.kind), File: f.kubeletConfig, Service: f.kubeletService, Kubeconfig: f.kubeconfig,
	}, "/", "/proc")
	if err != nil {
		return nil, nil, err
	}
	name := f.nodeName
	if name == "" {
		name = kubelet.Hostname
	}
	if name == "" {
		host, err := os.Hostname()
		if err != nil {
			return nil, nil, err
		}
		name = strings.ToLower(host) // as the kubelet does
	}
	var api *nodeinstall.API
	if f.serviceAccount != "" {
		server := f.apiServer
		if server == "" {
			server = "https://" + net.JoinHostPort(os.Getenv("KUBERNETES_SERVICE_HOST"), os.Getenv("KUBERNETES_SERVICE_PORT"))
		}
		api, err = nodeinstall.ServiceAccount(f.serviceAccount, server, name)
	} else {
		api, err = nodeinstall.Kubeconfig(kubelet.Kubeconfig, name)
	}
	if err != nil {
		return nil, nil, err
	}
	configuration := ""
	if f.configuration != "" {
		text, err := os.ReadFile(f.configuration)
		if err != nil {
			return nil, nil, err
		}
		configuration = string(text)
	}
	program, err := os.Open("/proc/self/exe") // this program, even if its path is another file by now
	if err != nil {
		return nil, nil, err
	}
	return nodeinstall.New(nodeinstall.Config{
		Program: program, Unit: deploy.Unit, Configuration: configuration,
		Prefix: f.prefix, UnitDir: f.unitDir, ConfigFile: f.configFile, StateFile: f.stateFile,
		Packaged: "/usr/bin/streamshim", Listen: f.listen, Upstream: f.upstream,
		Kubelet: kubelet, Services: services, Readiness: api, ReadyTimeout: f.readyTimeout,
		Log: slog.New(slog.NewTextHandler(os.Stderr, nil)),
	}), program.Close, nil
}

func newNodeInstallCommand() *cobra.Command {
	command := &cobra.Command{
		Use:   "install",
		Short: "Install or upgrade streamshim on this node and point the kubelet at it",
		Long: `install copies this program, its systemd unit and its configuration to the node, starts it, runs "streamshim check",
points the kubelet at it, restarts the kubelet, and waits for the node to be Ready. If a step fails, everything is
reverted, and the same version and configuration are not tried again.

It finds the kubelets of kubeadm, K3s and RKE2. For another one, name its configuration and its unit.`,
		Args: cobra.NoArgs,
	}
	flags := addNodeFlags(command.Flags())
	command.RunE = func(cmd *cobra.Command, _ []string) error {
		installer, done, err := flags.installer(cmd.Context())
		if err != nil {
			return err
		}
		defer done() //nolint:errcheck // only read
		changed, err := installer.Install(cmd.Context())
		if err == nil && changed {
			fmt.Fprintln(cmd.OutOrStdout(), "the kubelet talks to streamshim and the node is Ready")
		}
		return err
	}
	return command
}

func newNodeUninstallCommand() *cobra.Command {
	command := &cobra.Command{
		Use:   "uninstall",
		Short: "Point the kubelet back at its runtime and remove what install has installed",
		Long: `uninstall points the kubelet back at its runtime, restarts it, waits for the node to be Ready, and removes what
"streamshim node install" has installed. Audit log and recordings stay. If the node is not Ready in time, the kubelet is
pointed at streamshim again, and nothing is removed.`,
		Args: cobra.NoArgs,
	}
	flags := addNodeFlags(command.Flags())
	command.RunE = func(cmd *cobra.Command, _ []string) error {
		installer, done, err := flags.installer(cmd.Context())
		if err != nil {
			return err
		}
		defer done() //nolint:errcheck // only read
		return installer.Uninstall(cmd.Context())
	}
	return command
}

// Timeouts of the agent's HTTP server.
const (
	agentHeaderTimeout   = 10 * time.Second
	agentShutdownTimeout = 5 * time.Second
)

// agent is what runs in the pods of the DaemonSet.
type agent struct {
	flags     *nodeFlags
	flagSet   *pflag.FlagSet
	uninstall bool
	interval  time.Duration
	host      int // process whose namespaces are the node's
	log       *slog.Logger
	settled   atomic.Bool // the last install or uninstall has succeeded
}

func newNodeAgentCommand() *cobra.Command {
	command := &cobra.Command{
		Use:   "agent",
		Short: "Install on the node and keep it so, as the DaemonSet's pods do",
		Long: `agent runs "streamshim node install" (or, with --uninstall, "uninstall") in the namespaces of the node's first process,
and again at each interval. Its pod needs hostPID and must be privileged. A failure ends it, so that the DaemonSet's
rollout stops at this node.

It serves /readyz, and at /metrics the metrics that streamshim serves at its loopback address on the node.`,
		Args: cobra.NoArgs,
	}
	a := &agent{flagSet: command.Flags()}
	a.flags = addNodeFlags(command.Flags())
	command.Flags().BoolVar(&a.uninstall, "uninstall", false, "uninstall streamshim")
	command.Flags().DurationVar(&a.interval, "interval", 5*time.Minute, "`time` after which to check the node again")
	command.Flags().IntVar(&a.host, "host-process", 1, "`pid` of a process in the node's namespaces")
	address := command.Flags().String("serve", ":9478", "`address` of /readyz and /metrics in the pod")
	metrics := command.Flags().String("node-metrics", "127.0.0.1:9477", "metrics_address of streamshim on the node")
	command.RunE = func(cmd *cobra.Command, _ []string) error {
		a.log = slog.New(slog.NewTextHandler(os.Stderr, nil))
		listener, err := net.Listen("tcp", *address)
		if err != nil {
			return err
		}
		server := &http.Server{Handler: a.handler(*metrics), ReadHeaderTimeout: agentHeaderTimeout}
		served := make(chan error, 1)
		go func() { served <- server.Serve(listener) }()
		err = a.run(cmd.Context())
		ctx, cancel := context.WithTimeout(context.Background(), agentShutdownTimeout)
		defer cancel()
		if err := server.Shutdown(ctx); err != nil {
			server.Close() //nolint:errcheck // the process ends
		}
		if serveErr := <-served; !errors.Is(serveErr, http.ErrServerClosed) {
			err = errors.Join(err, serveErr)
		}
		return err
	}
	return command
}

func (a *agent) handler(metrics string) http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /readyz", func(w http.ResponseWriter, _ *http.Request) {
		if !a.settled.Load() {
			http.Error(w, "the node is being changed, or could not be; see the log", http.StatusServiceUnavailable)
		}
	})
	mux.Handle("GET /metrics", &httputil.ReverseProxy{
		Rewrite: func(r *httputil.ProxyRequest) {
			r.Out.URL.Scheme, r.Out.URL.Host, r.Out.URL.Path, r.Out.URL.RawQuery = "http", metrics, "/metrics", ""
			r.Out.Host = metrics
		},
		Transport: &http.Transport{
			DisableKeepAlives: true,
			DialContext: func(ctx context.Context, _, address string) (net.Conn, error) {
				return nodeinstall.DialOnHost(ctx, a.host, address)
			},
		},
		ErrorLog: slog.NewLogLogger(a.log.Handler(), slog.LevelDebug),
	})
	return mux
}

// run calls once at each interval until the context ends.
func (a *agent) run(ctx context.Context) error {
	tick := time.NewTicker(a.interval)
	defer tick.Stop()
	for {
		if err := a.once(ctx); err != nil {
			a.settled.Store(false)
			return err
		}
		a.settled.Store(true)
		select {
		case <-tick.C:
		case <-ctx.Done():
			return nil
		}
	}
}

// once runs "node install" or "node uninstall" on the node. It passes folders of the pod as open files, because they do not
// exist in the node's mount namespace.
func (a *agent) once(ctx context.Context) error {
	verb := "install"
	if a.uninstall {
		verb = "uninstall"
	}
	args := []string{"node", verb}
	var files []*os.File
	defer func() {
		for _, file := range files {
			file.Close() //nolint:errcheck // only read
		}
	}()
	handOver := func(folder string) (string, error) {
		file, err := os.Open(folder)
		if err != nil {
			return "", err
		}
		files = append(files, file)
		return fmt.Sprintf("/proc/self/fd/%d", 2+len(files)), nil
	}
	var failed error
	a.flagSet.Visit(func(f *pflag.Flag) {
		value := f.Value.String()
		var err error
		switch f.Name {
		case "uninstall", "interval", "host-process", "serve", "node-metrics":
			return
		case "service-account":
			value, err = handOver(value)
		case "configuration":
			name := filepath.Base(value)
			value, err = handOver(filepath.Dir(value))
			value = filepath.Join(value, name)
		}
		failed = errors.Join(failed, err)
		args = append(args, "--"+f.Name+"="+value)
	})
	if failed != nil {
		return failed
	}
	// For systemctl, the PATH of the node is needed, not that of the pod.
	command := exec.CommandContext(ctx, fmt.Sprintf("/proc/%d/exe", os.Getpid()), args...)
	command.Env = append(os.Environ(), "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin")
	command.Dir = "/"
	command.Stdout, command.Stderr, command.ExtraFiles = os.Stdout, os.Stderr, files
	command.Cancel = func() error { return command.Process.Signal(syscall.SIGTERM) } // it completes or reverts its change
	if err := nodeinstall.StartOnHost(a.host, command); err != nil {
		return err
	}
	if err := command.Wait(); err != nil && ctx.Err() == nil {
		return fmt.Errorf("streamshim node %s on the node: %w", verb, err)
	}
	return nil
}
