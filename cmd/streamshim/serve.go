package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/coreos/go-systemd/v22/daemon"
	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
	"google.golang.org/grpc/codes"

	"github.com/streamshim/streamshim/pkg/config"
	"github.com/streamshim/streamshim/pkg/cri"
	"github.com/streamshim/streamshim/pkg/endpoint"
	"github.com/streamshim/streamshim/pkg/execproc"
	"github.com/streamshim/streamshim/pkg/portforward"
	"github.com/streamshim/streamshim/pkg/session"
	"github.com/streamshim/streamshim/pkg/streaming"
)

// endTimeout is how long the parts may take to end once sessions have been told to.
const endTimeout = 15 * time.Second

func newServeCommand() *cobra.Command {
	command := &cobra.Command{
		Use:   "serve",
		Short: "Serve CRI on a Unix socket until SIGTERM",
		Long: `serve listens for CRI calls on --listen and passes them on to --upstream, except Exec, ExecSync, Attach
and PortForward, which it serves itself. It prints one line when it is ready and tells systemd.

SIGTERM ends it: no new calls and sessions are taken, running sessions may go on for shutdown.drain,
and those that are left end with a status that says so.

Flags win over the configuration file, the file over the defaults.`,
		Args: cobra.NoArgs,
	}
	settings := addSettings(command.Flags())
	command.RunE = func(cmd *cobra.Command, _ []string) error {
		c, err := settings.load(cmd.Flags())
		if err != nil {
			return err
		}
		return serve(cmd.Context(), c)
	}
	return command
}

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
	flags.StringVar(&s.flags.LogLevel, "log-level", s.flags.LogLevel, "debug, info, warn or error")
	flags.StringVar(&s.flags.LogFormat, "log-format", s.flags.LogFormat, "text or json")
	return s
}

// load is the configuration from defaults, file and flags, in this order.
func (s *settings) load(flags *pflag.FlagSet) (config.Config, error) {
	c := config.Default()
	file := s.file
	if file == "" {
		if _, err := os.Stat(config.DefaultFile); err == nil {
			file = config.DefaultFile
		}
	}
	if file != "" {
		if err := c.Read(file); err != nil {
			return c, err
		}
	}
	for name, copyFlag := range map[string]func(){
		"listen":         func() { c.Listen = s.flags.Listen },
		"upstream":       func() { c.Upstream = s.flags.Upstream },
		"stream-address": func() { c.StreamAddress = s.flags.StreamAddress },
		"state-dir":      func() { c.StateDir = s.flags.StateDir },
		"log-level":      func() { c.LogLevel = s.flags.LogLevel },
		"log-format":     func() { c.LogFormat = s.flags.LogFormat },
	} {
		if flags.Changed(name) {
			copyFlag()
		}
	}
	if err := c.Validate(); err != nil {
		return c, err
	}
	if c.Upstream == "" {
		upstream, err := findUpstream()
		if err != nil {
			return c, err
		}
		c.Upstream = upstream
	}
	return c, nil
}

// upstreamPlaces are where runtimes have their CRI socket.
var upstreamPlaces = []string{
	"/run/containerd/containerd.sock",
	"/run/k3s/containerd/containerd.sock",
	"/run/crio/crio.sock",
}

func findUpstream() (string, error) {
	for _, path := range upstreamPlaces {
		if info, err := os.Stat(path); err == nil && info.Mode().Type() == os.ModeSocket {
			return "unix://" + path, nil
		}
	}
	return "", fmt.Errorf("no container runtime found: none of %s is there; start the runtime or name its socket with --upstream",
		strings.Join(upstreamPlaces, ", "))
}

func newLogger(c config.Config) *slog.Logger {
	options := &slog.HandlerOptions{Level: c.Level()}
	if c.LogFormat == "json" {
		return slog.New(slog.NewJSONHandler(os.Stderr, options))
	}
	return slog.New(slog.NewTextHandler(os.Stderr, options))
}

// serve builds the parts, runs them until the context ends, and takes them down in reverse order.
func serve(ctx context.Context, c config.Config) (err error) {
	log := newLogger(c)
	socket, err := endpoint.Path(c.Listen)
	if err != nil {
		return err
	}
	criListener, err := cri.Listen(socket)
	if err != nil {
		return err
	}
	defer criListener.Close() //nolint:errcheck // closed before in the good case

	runner, err := execproc.NewRunner(execproc.Config{
		StateDir:     filepath.Join(c.StateDir, "exec"),
		StartTimeout: time.Duration(c.Exec.StartTimeout),
		OnDisconnect: execproc.Policy(c.Exec.OnDisconnect),
		TermAfter:    time.Duration(c.Exec.TermAfter),
		KillAfter:    time.Duration(c.Exec.KillAfter),
		OutputLimit:  c.Exec.SyncOutput,
		DrainIdle:    time.Duration(c.Exec.DrainIdle),
		Logger:       log,
	})
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

	streamListener, err := net.Listen("tcp", c.StreamAddress)
	if err != nil {
		return fmt.Errorf("listen for streams: %w", err)
	}
	streams := streaming.NewServer(streamingConfig(c, log), streamListener.Addr())
	criServer, err := cri.NewServer(cri.Config{
		Upstream: upstream, Streams: streams,
		Engine:              &engine{runner: runner, watcher: watcher, runtime: c.Runtime},
		StreamErrorCode:     streamErrorCode,
		ExecSyncOutputLimit: c.Exec.SyncOutput,
		Logger:              log,
	})
	if err != nil {
		streamListener.Close() //nolint:errcheck // nothing was served
		return err
	}

	ended := make(chan error, 2) // of the two servers
	go func() { ended <- streams.Serve(streamListener) }()
	go func() { ended <- criServer.Serve(criListener) }()
	fmt.Printf("streamshim ready: CRI on %s, upstream %s, streams on %s\n", c.Listen, c.Upstream, streamListener.Addr())
	notify(log, daemon.SdNotifyReady)

	running := 2
	select {
	case <-ctx.Done():
		log.Info("ending", "drain", time.Duration(c.Shutdown.Drain))
	case err = <-ended:
		running--
	}
	notify(log, daemon.SdNotifyStopping)
	drain, cancelDrain := context.WithTimeout(context.WithoutCancel(ctx), time.Duration(c.Shutdown.Drain))
	defer cancelDrain()
	// New exec calls must fail before sessions are drained; other calls pass until then.
	err = errors.Join(err, streams.Shutdown(drain))
	end, cancelEnd := context.WithTimeout(context.WithoutCancel(ctx), endTimeout)
	defer cancelEnd()
	err = errors.Join(err, runner.Shutdown(end))
	criServer.Shutdown(drain)
	for ; running > 0; running-- {
		err = errors.Join(err, <-ended)
	}
	return err
}

func streamingConfig(c config.Config, log *slog.Logger) streaming.Config {
	orOff := func(d config.Duration) time.Duration { // streaming's zero is its default
		if d == 0 {
			return -1
		}
		return time.Duration(d)
	}
	return streaming.Config{
		Log:        log,
		Sessions:   session.NewRegistry(log),
		DrainIdle:  orOff(c.Exec.DrainIdle),
		DrainMax:   time.Duration(c.Exec.DrainMax),
		LingerIdle: time.Duration(c.Exec.Linger),
		IdleTimeout: map[session.Kind]time.Duration{
			session.Exec:        orOff(c.Exec.IdleTimeout),
			session.Attach:      orOff(c.Attach.IdleTimeout),
			session.PortForward: orOff(c.PortForward.IdleTimeout),
		},
		MaxLifetime: map[session.Kind]time.Duration{
			session.Exec:        time.Duration(c.Exec.MaxLifetime),
			session.Attach:      time.Duration(c.Attach.MaxLifetime),
			session.PortForward: time.Duration(c.PortForward.MaxLifetime),
		},
		ReportRefused: c.PortForward.Refused == "report",
		AttachBuffer:  c.Attach.Buffer,
	}
}

func streamErrorCode(err error) codes.Code {
	switch {
	case errors.Is(err, streaming.ErrTooManyRequests):
		return codes.ResourceExhausted
	case errors.Is(err, streaming.ErrShuttingDown):
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
