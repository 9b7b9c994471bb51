// Package daemon is "streamshim serve". It builds the parts, connects and runs them, and ends them in order or hands them
// over to another program in the same process.
package daemon

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
	"syscall"
	"time"

	"github.com/coreos/go-systemd/v22/daemon"
	"google.golang.org/grpc/codes"

	"github.com/streamshim/streamshim/pkg/config"
	"github.com/streamshim/streamshim/pkg/endpoint"
	"github.com/streamshim/streamshim/pkg/execproc"
	"github.com/streamshim/streamshim/pkg/helper"
	"github.com/streamshim/streamshim/pkg/session"
	"github.com/streamshim/streamshim/pkg/streaming"
	forwarding "github.com/streamshim/streamshim/pkg/streaming/portforward"
	"github.com/streamshim/streamshim/pkg/streaming/remotecommand"
	"github.com/streamshim/streamshim/pkg/workload"
)

// Options is what the command line passes to Serve and Check.
type Options struct {
	Version string
	// Load reads the configuration, at the start and for each reload. Its upstream may be empty.
	Load func() (config.Config, error)
	// FindUpstream finds the runtime's socket if the configuration does not name one.
	FindUpstream func() (string, error)
}

// endTimeout bounds how long the parts may take to end after the sessions have been told to.
const endTimeout = 15 * time.Second

// Serve serves until the context ends or SIGTERM arrives, and resumes what another program has handed over. It must be
// called by the main goroutine, on the main thread: see handover.Check.Exec.
func Serve(ctx context.Context, o Options) error {
	hangups := make(chan os.Signal, 1)
	signal.Notify(hangups, syscall.SIGHUP)
	defer signal.Stop(hangups)
	before, err := received()
	if err != nil {
		return err
	}
	defer before.close()
	fault("received")
	end := newTermination(ctx)
	defer end.stop()
	if before != nil {
		end.begin() // the sessions that were handed over need an orderly end
	}
	c, err := o.Load()
	if err != nil {
		c, err = before.configuration(err)
	}
	if err != nil {
		return err
	}
	found := ""
	if c.Upstream == "" {
		if found, err = before.foundUpstream(o.FindUpstream); err != nil {
			return err
		}
		c.Upstream = found
	}
	return serve(ctx, o.Version, c, func() (config.Config, error) { return o.loadAgain(found) }, before, end, hangups)
}

// loadAgain is Load with the upstream that was found at the start, or "" if the configuration named one. It does not look
// for the upstream again, because the runtime may be restarting.
func (o Options) loadAgain(found string) (config.Config, error) {
	c, err := o.Load()
	if c.Upstream == "" {
		c.Upstream = found
	}
	return c, err
}

// newLogger returns a logger and its level, which can be changed.
func newLogger(c config.Config) (*slog.Logger, *slog.LevelVar) {
	level := &slog.LevelVar{}
	level.Set(c.Level())
	options := logOptions(level)
	if c.LogFormat == "json" {
		return slog.New(slog.NewJSONHandler(os.Stderr, options)), level
	}
	return slog.New(slog.NewTextHandler(os.Stderr, options)), level
}

// logOptions formats durations as "10s" in JSON, too, where slog would write nanoseconds.
func logOptions(level slog.Leveler) *slog.HandlerOptions {
	return &slog.HandlerOptions{Level: level, ReplaceAttr: func(_ []string, a slog.Attr) slog.Attr {
		if a.Value.Kind() == slog.KindDuration {
			a.Value = slog.StringValue(a.Value.Duration().String())
		}
		return a
	}}
}

// sayReady prints the one line on stdout, in the form of the log.
func sayReady(c config.Config, streams net.Addr) {
	if c.LogFormat == "json" {
		slog.New(slog.NewJSONHandler(os.Stdout, logOptions(nil))).Info("streamshim ready", "listen", c.Listen, "upstream", c.Upstream, "streams", streams.String())
		return
	}
	fmt.Printf("streamshim ready: CRI on %s, upstream %s, streams on %s\n", c.Listen, c.Upstream, streams)
}

// warnOfMissing logs what the configuration names and does not exist. That does not prevent serving: the runtime may start
// later, and until then calls fail with an error that says so.
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

// syncDrainMax bounds how long an ExecSync, whose caller has a timeout of its own, waits for the output of background
// children.
const syncDrainMax = 10 * time.Second

func runnerConfig(c config.Config, log *slog.Logger, o *operation, observe hooks, successor bool) execproc.Config {
	return execproc.Config{
		Successor:    successor,
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

// standIn returns the lookup for commands that streamshim can run itself in containers, nil if no helper is enabled.
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

// notify sends a notification to systemd, if systemd has started this process (sd_notify(3)).
func notify(log *slog.Logger, state string) {
	if _, err := daemon.SdNotify(false, state); err != nil {
		log.Warn("systemd could not be told", "state", state, "error", err)
	}
}
