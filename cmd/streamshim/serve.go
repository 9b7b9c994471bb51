package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/coreos/go-systemd/v22/daemon"
	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
	"google.golang.org/grpc/codes"

	"github.com/streamshim/streamshim/pkg/admin"
	"github.com/streamshim/streamshim/pkg/config"
	"github.com/streamshim/streamshim/pkg/cri"
	"github.com/streamshim/streamshim/pkg/endpoint"
	"github.com/streamshim/streamshim/pkg/execproc"
	"github.com/streamshim/streamshim/pkg/helper"
	"github.com/streamshim/streamshim/pkg/portforward"
	"github.com/streamshim/streamshim/pkg/session"
	"github.com/streamshim/streamshim/pkg/streaming"
	forwarding "github.com/streamshim/streamshim/pkg/streaming/portforward"
	"github.com/streamshim/streamshim/pkg/streaming/remotecommand"
	"github.com/streamshim/streamshim/pkg/workload"
)

// endTimeout is how long the parts may take to end once sessions have been told to.
const endTimeout = 15 * time.Second

func newServeCommand() *cobra.Command {
	command := &cobra.Command{
		Use:   "serve",
		Short: "Serve CRI on a Unix socket until SIGTERM",
		Long: `serve listens for CRI calls on --listen and passes them on to --upstream, except Exec, ExecSync, Attach
and PortForward, which it serves itself. It prints one line when it is ready and tells systemd.

SIGTERM ends it, at the latest after shutdown.drain: as long as sessions run, which may go on until then, new ones
are taken too. Sessions that are left end with a status that says so. A second SIGTERM ends it at once.

SIGHUP reads the configuration again and takes over limits, rules, timeouts, log level, audit and
recording, without touching live sessions. A file with a mistake is refused, and the old configuration
stays. Settings that need a restart are named in the log.

Flags win over the configuration file, the file over the defaults.`,
		Args: cobra.NoArgs,
	}
	settings := addSettings(command.Flags())
	command.RunE = func(cmd *cobra.Command, _ []string) error {
		c, err := settings.load(cmd.Flags())
		if err != nil {
			return err
		}
		found := ""
		if c.Upstream == "" {
			if found, err = findUpstream(); err != nil {
				return err
			}
			c.Upstream = found
		}
		return serve(cmd.Context(), c, func() (config.Config, error) { return settings.loadAgain(cmd.Flags(), found) })
	}
	return command
}

// defaultFile is a variable for tests.
var defaultFile = config.DefaultFile

// settings are the flags that serve and check share.
type settings struct {
	file  string
	flags config.Config
}

func addSettings(flags *pflag.FlagSet) *settings {
	s := &settings{flags: config.Default()}
	flags.StringVar(&s.file, "config", "", "TOML configuration `file` (default "+config.DefaultFile+" when it exists)")
	flags.StringVar(&s.flags.Listen, "listen", s.flags.Listen, "Unix `socket` on which CRI is served")
	flags.StringVar(&s.flags.Upstream, "upstream", "", "CRI `socket` of the container runtime (default: the first of "+strings.Join(upstreamPlaces, ", ")+" that exists)")
	flags.StringVar(&s.flags.StreamAddress, "stream-address", s.flags.StreamAddress, "loopback `address` of the streaming server")
	flags.StringVar(&s.flags.StateDir, "state-dir", s.flags.StateDir, "`directory` for files kept while processes run, on a tmpfs")
	flags.StringVar(&s.flags.Admin, "admin", s.flags.Admin, "Unix `socket` of \"streamshim sessions\", empty for none")
	flags.StringVar(&s.flags.MetricsAddress, "metrics-address", "", "`HOST:PORT` of /metrics, /healthz and /readyz (default off)")
	flags.StringVar(&s.flags.LogLevel, "log-level", s.flags.LogLevel, "debug, info, warn or error")
	flags.StringVar(&s.flags.LogFormat, "log-format", s.flags.LogFormat, "text or json")
	return s
}

// read is the configuration from defaults, file and override, which may be nil. A file that was there once is
// missed from then on: a reload while it is moved away must not drop rules and audit.
func (s *settings) read(override func(*config.Config)) (config.Config, error) {
	c := config.Default()
	if s.file == "" {
		if _, err := os.Stat(defaultFile); err == nil {
			s.file = defaultFile
		}
	}
	if s.file != "" {
		err := c.Read(s.file, override)
		return c, err
	}
	if override != nil {
		override(&c)
	}
	return c, c.Validate()
}

// load is the configuration from defaults, file and flags, in this order. Its upstream may be empty;
// see findUpstream.
func (s *settings) load(flags *pflag.FlagSet) (config.Config, error) {
	return s.read(func(c *config.Config) { s.override(c, flags) })
}

// override copies the flags that were given.
func (s *settings) override(c *config.Config, flags *pflag.FlagSet) {
	for name, copyFlag := range map[string]func(){
		"listen":          func() { c.Listen = s.flags.Listen },
		"upstream":        func() { c.Upstream = s.flags.Upstream },
		"stream-address":  func() { c.StreamAddress = s.flags.StreamAddress },
		"state-dir":       func() { c.StateDir = s.flags.StateDir },
		"admin":           func() { c.Admin = s.flags.Admin },
		"metrics-address": func() { c.MetricsAddress = s.flags.MetricsAddress },
		"log-level":       func() { c.LogLevel = s.flags.LogLevel },
		"log-format":      func() { c.LogFormat = s.flags.LogFormat },
	} {
		if flags.Changed(name) {
			copyFlag()
		}
	}
}

// loadAgain is load with the upstream that was found at the start, "" if it was named: it is not looked
// for again, because the runtime may be restarting.
func (s *settings) loadAgain(flags *pflag.FlagSet, found string) (config.Config, error) {
	c, err := s.load(flags)
	if c.Upstream == "" {
		c.Upstream = found
	}
	return c, err
}

// upstreamPlaces are where runtimes have their CRI socket.
var upstreamPlaces = []string{
	"/run/containerd/containerd.sock",
	"/run/k3s/containerd/containerd.sock",
	"/run/crio/crio.sock",
}

// findUpstream is for a configuration that does not name the upstream.
func findUpstream() (string, error) {
	for _, path := range upstreamPlaces {
		if info, err := os.Stat(path); err == nil && info.Mode().Type() == os.ModeSocket {
			return "unix://" + path, nil
		}
	}
	return "", fmt.Errorf("no container runtime found: none of %s is there; start the runtime or name its socket with --upstream",
		strings.Join(upstreamPlaces, ", "))
}

// newLogger returns a logger and its level, which may be changed.
func newLogger(c config.Config) (*slog.Logger, *slog.LevelVar) {
	level := &slog.LevelVar{}
	level.Set(c.Level())
	options := logOptions(level)
	if c.LogFormat == "json" {
		return slog.New(slog.NewJSONHandler(os.Stderr, options)), level
	}
	return slog.New(slog.NewTextHandler(os.Stderr, options)), level
}

// logOptions has durations written as "10s" in JSON too, which would have nanoseconds.
func logOptions(level slog.Leveler) *slog.HandlerOptions {
	return &slog.HandlerOptions{Level: level, ReplaceAttr: func(_ []string, a slog.Attr) slog.Attr {
		if a.Value.Kind() == slog.KindDuration {
			a.Value = slog.StringValue(a.Value.Duration().String())
		}
		return a
	}}
}

// serve builds the parts, runs them until the context ends, and takes them down in reverse order.
// load reads the configuration again.
func serve(ctx context.Context, c config.Config, load func() (config.Config, error)) (err error) {
	hangups := make(chan os.Signal, 1)
	signal.Notify(hangups, syscall.SIGHUP)
	defer signal.Stop(hangups)
	log, level := newLogger(c)
	socket, err := endpoint.Path(c.Listen)
	if err != nil {
		return err
	}
	criListener, err := endpoint.Listen(socket)
	if err != nil {
		return err
	}
	defer criListener.Close() //nolint:errcheck // closed before in the good case
	lock, err := lockStateDir(c.StateDir)
	if err != nil {
		return err
	}
	defer lock.Close() //nolint:errcheck // which gives it up, after all that uses it

	limitMemory(c, log)
	operation, err := newOperation(c, log, level)
	if err != nil {
		return err
	}
	defer operation.close()

	telemetry, err := newTelemetry(ctx, c, operation, log)
	if err != nil {
		return err
	}
	defer telemetry.close()
	warnRemoved(c, log)
	telemetry.observe(operation.sessions)
	observe := telemetry.hooks()

	runner, err := execproc.NewRunner(runnerConfig(c, log, operation, observe))
	if err != nil {
		return err
	}
	defer runner.Close() //nolint:errcheck // Shutdown below is the orderly end

	watcher, err := portforward.NewWatcher(log)
	if err != nil {
		return err
	}
	defer watcher.Close() //nolint:errcheck // nothing depends on it any more

	upstream, err := cri.NewUpstream(c.Upstream, 0)
	if err != nil {
		return err
	}
	defer upstream.Close() //nolint:errcheck // as above

	adminListener, err := listenAdmin(c)
	if err != nil {
		return err
	}
	if adminListener != nil {
		defer adminListener.Close() //nolint:errcheck // closed before in the good case
	}

	streamListener, err := net.Listen("tcp", c.StreamAddress)
	if err != nil {
		return fmt.Errorf("listen for streams: %w", err)
	}
	engine := engine{upstream, runner, watcher}
	streams := streaming.NewServer(streamingConfig(c, log, operation, observe, engine), streamListener.Addr())
	criServer, err := cri.NewServer(cri.Config{
		Upstream: upstream, Streams: streams, Runner: engine,
		StreamErrorCode: streamErrorCode, BeginSync: observe.countSync(operation.beginSync), Logger: log,
		Observe: observe.call, Trace: observe.trace,
	})
	if err != nil {
		streamListener.Close() //nolint:errcheck // nothing was served
		return err
	}

	reloader := &reloader{log: log, load: load, apply: func(c config.Config) error { return operation.apply(c, streams) }}
	reloader.current.Store(&c)
	adminServer := admin.NewServer(admin.Config{
		Sessions: operation.sessions, Log: log,
		Settings: func() admin.Settings { return adminSettings(*reloader.current.Load()) },
	})

	warnOfMissing(log, c)
	// Until here a signal has ended the process at once: nothing is served yet that could end in order.
	ctx, stop := untilSignal(ctx)
	defer stop()
	ended := make(chan error, 3) // of the servers
	running := 2
	go func() { ended <- streams.Serve(streamListener) }()
	go func() { ended <- criServer.Serve(criListener) }()
	if adminListener != nil {
		running++
		go func() { ended <- adminServer.Serve(adminListener) }()
	}
	telemetry.serve(streams)
	sayReady(c, streamListener.Addr())
	notify(log, daemon.SdNotifyReady)

	reloading := make(chan struct{})
	reloadContext, stopReloading := context.WithCancel(ctx)
	go func() {
		defer close(reloading)
		reloader.run(reloadContext, hangups)
	}()
	select {
	case <-ctx.Done():
		log.Info("ending", "drain", time.Duration(c.Shutdown.Drain))
	case err = <-ended:
		running--
	}
	stopReloading()
	<-reloading
	notify(log, daemon.SdNotifyStopping)
	drain, cancelDrain := context.WithTimeout(context.WithoutCancel(ctx), time.Duration(c.Shutdown.Drain))
	defer cancelDrain()
	// Sessions first, as long as calls and probes are still answered.
	err = errors.Join(err, streams.Shutdown(drain))
	end, cancelEnd := context.WithTimeout(context.WithoutCancel(ctx), endTimeout)
	defer cancelEnd()
	err = errors.Join(err, runner.Shutdown(end))
	criServer.Shutdown(drain)
	err = errors.Join(err, adminServer.Shutdown(end))
	for ; running > 0; running-- {
		err = errors.Join(err, <-ended)
	}
	return err
}

// sayReady prints the one line on stdout, in the form of the log.
func sayReady(c config.Config, streams net.Addr) {
	if c.LogFormat == "json" {
		slog.New(slog.NewJSONHandler(os.Stdout, logOptions(nil))).Info("streamshim ready", "listen", c.Listen, "upstream", c.Upstream, "streams", streams.String())
		return
	}
	fmt.Printf("streamshim ready: CRI on %s, upstream %s, streams on %s\n", c.Listen, c.Upstream, streams)
}

// warnOfMissing says what is not there although the configuration names it. None of it is a reason not to serve: the
// runtime may start later, and until then calls say that it is away.
func warnOfMissing(log *slog.Logger, c config.Config) {
	if path, err := endpoint.Path(c.Upstream); err == nil {
		if _, err := os.Stat(path); err != nil {
			log.Warn("the runtime's socket is not there; calls fail until it is", "upstream", c.Upstream, "error", err)
		}
	}
	if c.Runtime.Binary != "" {
		if _, err := exec.LookPath(c.Runtime.Binary); err != nil {
			log.Warn("the OCI runtime that runtime.binary names cannot be run; commands fail to start", "error", err)
		}
	}
	if os.Geteuid() != 0 {
		log.Warn("streamshim does not run as root; it cannot start commands in containers, nor open ports in pods", "uid", os.Geteuid())
	}
}

// listenAdmin opens the admin socket, which is nil when there is to be none.
func listenAdmin(c config.Config) (net.Listener, error) {
	if c.Admin == "" {
		return nil, nil
	}
	socket, err := endpoint.Path(c.Admin)
	if err != nil {
		return nil, err
	}
	return endpoint.Listen(socket)
}

// syncDrainMax is how long an ExecSync, whose caller has a timeout of its own, waits for the output of
// background children at most.
const syncDrainMax = 10 * time.Second

func runnerConfig(c config.Config, log *slog.Logger, o *operation, observe hooks) execproc.Config {
	return execproc.Config{
		StateDir:     filepath.Join(c.StateDir, "exec"),
		Runtime:      c.Runtime.Binary,
		Root:         c.Runtime.Root,
		StartTimeout: time.Duration(c.Exec.StartTimeout),
		OnDisconnect: execproc.Policy(c.Exec.OnDisconnect),
		TermAfter:    time.Duration(c.Exec.TermAfter),
		KillAfter:    time.Duration(c.Exec.KillAfter),
		DrainIdle:    time.Duration(c.Exec.DrainIdle),
		DrainMax:     min(time.Duration(c.Exec.DrainMax), syncDrainMax),
		OutputLimit:  config.SyncOutput,
		OutputRoom:   o.syncOutput,
		SyncTurn: func(ctx context.Context, c workload.Container) (func(), error) {
			return o.limits.Acquire(ctx, session.Info{Kind: session.ExecSync, Target: c.Target})
		},
		Logger:  log,
		StandIn: standIn(c.Exec.Helpers),
		OnStart: observe.started,
		OnKill:  observe.killed,
	}
}

// standIn says what streamshim itself can do in containers, nil when it is to do nothing there.
func standIn(helpers []string) func([]string) (string, []string, bool) {
	if !slices.Contains(helpers, helper.Tar) {
		return nil
	}
	return func(args []string) (string, []string, bool) {
		return helper.Tar, slices.Concat([]string{helper.Command}, args), helper.Serves(args)
	}
}

func streamingConfig(c config.Config, log *slog.Logger, o *operation, observe hooks, e engine) streaming.Config {
	return streaming.Config{
		Log:      log,
		Sessions: o.sessions,
		Commands: remotecommand.Config{
			Runtime:       e,
			Starts:        o.limits,
			DrainIdle:     time.Duration(c.Exec.DrainIdle),
			DrainMax:      time.Duration(c.Exec.DrainMax),
			StatusWait:    time.Duration(c.Exec.StatusWait),
			InputGrace:    time.Duration(c.Exec.InputGrace),
			KeepProcesses: execproc.Policy(c.Exec.OnDisconnect) == execproc.PolicyKeep,
			AttachBuffer:  config.AttachBuffer,
			AttachStays:   c.Attach.InputEnd == "stay",
		},
		PortForwards: forwarding.Config{
			Pods:          e,
			Stall:         time.Duration(c.PortForward.Stall),
			ReportRefused: c.PortForward.Refused == "report",
			MayConnect:    o.limits.MayConnect,
		},
		LingerIdle: time.Duration(c.Exec.Linger),
		Settings:   streamingSettings(c),
		Buffers:    o.buffers,
		Observe:    observe.event,
	}
}

func streamErrorCode(err error) codes.Code {
	var refused *session.RefusedError
	switch {
	case errors.As(err, &refused):
		return map[session.Refusal]codes.Code{
			session.Denied: codes.PermissionDenied, session.TooMany: codes.ResourceExhausted, session.Unavailable: codes.Unavailable,
		}[refused.Refusal]
	case errors.Is(err, streaming.ErrTooManyRequests):
		return codes.ResourceExhausted
	case errors.Is(err, streaming.ErrShuttingDown), errors.Is(err, streaming.ErrNotListening):
		return codes.Unavailable
	}
	return codes.Internal
}

// notify tells systemd, where it started us (sd_notify(3)).
func notify(log *slog.Logger, state string) {
	if _, err := daemon.SdNotify(false, state); err != nil {
		log.Warn("systemd could not be told", "state", state, "error", err)
	}
}
