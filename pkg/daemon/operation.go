package daemon

import (
	"context"
	"log/slog"
	"path/filepath"
	"runtime"
	"time"

	"github.com/streamshim/streamshim/pkg/admin"
	"github.com/streamshim/streamshim/pkg/config"
	"github.com/streamshim/streamshim/pkg/execproc"
	"github.com/streamshim/streamshim/pkg/metrics"
	"github.com/streamshim/streamshim/pkg/session"
	"github.com/streamshim/streamshim/pkg/session/audit"
	"github.com/streamshim/streamshim/pkg/session/limits"
	"github.com/streamshim/streamshim/pkg/session/recording"
	"github.com/streamshim/streamshim/pkg/streaming"
	"github.com/streamshim/streamshim/pkg/streaming/buffers"
)

// operation holds what operators use to observe and control sessions: limits, audit, recording, budgets. It translates
// between the configuration and the packages that do the work.
type operation struct {
	log      *slog.Logger
	level    *slog.LevelVar
	limits   *limits.Limiter
	audit    *audit.Log
	recorder *recording.Recorder
	sessions *session.Registry
	buffers  *buffers.Pool

	syncOutput, recordings *limits.Room
}

// newOperation opens the audit log. handedOver means that sessions which are open in the log have been handed over to
// this program. The caller closes the operation when all sessions have ended.
func newOperation(c config.Config, log *slog.Logger, level *slog.LevelVar, handedOver bool) (*operation, error) {
	auditing := auditConfig(c)
	auditing.HandedOver = handedOver
	auditLog, err := audit.New(auditing, log)
	if err != nil {
		return nil, err
	}
	budgets := budgetsOf(c, availableMemory())
	o := &operation{
		log: log, level: level, audit: auditLog,
		limits:     limits.New(limitsConfig(c)),
		buffers:    buffers.New(budgets.buffers),
		syncOutput: limits.NewRoom(budgets.syncOutput),
		recordings: limits.NewRoom(budgets.recordings),
	}
	o.recorder = recording.New(recordingConfig(c), o.recordings, log)
	execproc.SetConcurrentEnds(concurrentEnds(c))
	o.sessions = session.NewRegistry(log, o.limits, o.audit, o.recorder)
	return o, nil
}

func (o *operation) close() {
	o.recorder.Close()
	o.audit.Close()
}

// apply applies the settings that can be reloaded. After an error nothing has changed.
func (o *operation) apply(c config.Config, streams *streaming.Server) error {
	if err := o.audit.Update(auditConfig(c)); err != nil {
		return err
	}
	o.level.Set(c.Level())
	o.limits.Update(limitsConfig(c))
	o.recorder.Update(recordingConfig(c))
	budgets := budgetsOf(c, availableMemory())
	o.buffers.Update(budgets.buffers)
	o.syncOutput.Update(budgets.syncOutput)
	o.recordings.Update(budgets.recordings)
	execproc.SetConcurrentEnds(concurrentEnds(c))
	streams.Update(streamingSettings(c))
	return nil
}

// beginSync implements cri.Config.BeginSync.
func (o *operation) beginSync(ctx context.Context, info session.Info) (func(session.Outcome, int64), error) {
	if err := o.limits.Check(info); err != nil {
		o.audit.Refused(info, err)
		return nil, err
	}
	return o.audit.BeginSync(ctx, info)
}

// commands is metrics.Config.Commands.
func (o *operation) commands() metrics.Commands {
	var c metrics.Commands
	c.Starting, c.StartsWaiting = o.limits.Starts(session.Exec)
	c.ProbesStarting, c.ProbesWaiting = o.limits.Starts(session.ExecSync)
	c.Ending, c.EndsWaiting = execproc.Ends()
	return c
}

func adminSettings(c config.Config) admin.Settings {
	return admin.Settings{Command: session.CommandLevel(c.Audit.Command), NotifyWatch: c.NotifyWatch, Recordings: c.Recording.Directory}
}

func auditConfig(c config.Config) audit.Config {
	return audit.Config{
		Destination: audit.Destination(c.Audit.Destination),
		File:        c.Audit.File,
		MaxSize:     c.Audit.MaxSize,
		MaxFiles:    c.Audit.MaxFiles,
		Command:     session.CommandLevel(c.Audit.Command),
		ExecSync:    c.Audit.ExecSync,
		Fsync:       audit.Fsync(c.Audit.Fsync),
		Deny:        c.Audit.OnFailure == "deny",
		OpenDir:     filepath.Join(c.StateDir, "audit"),
	}
}

func recordingConfig(c config.Config) recording.Config {
	r := recording.Config{
		Directory: c.Recording.Directory,
		Input:     c.Recording.Input,
		NonTTY:    c.Recording.NonTTY,
		MaxSize:   c.Recording.MaxSize,
		MaxFiles:  c.Recording.MaxFiles,
		MaxTotal:  c.Recording.MaxTotal,
		MinAge:    time.Duration(c.Recording.MinAge),
		Buffer:    config.RecordingBuffer,
		Command:   session.CommandLevel(c.Audit.Command),
		Deny:      c.Recording.OnFailure == "deny",
	}
	for _, rule := range c.Recording.Rule {
		r.Rules = append(r.Rules, session.Selector{Namespaces: rule.Namespaces, PodLabels: rule.PodLabels})
	}
	return r
}

func limitsConfig(c config.Config) limits.Config {
	l := limits.Config{
		Sessions:             c.Limits.Sessions,
		SessionsPerPod:       c.Limits.SessionsPerPod,
		SessionsPerContainer: c.Limits.SessionsPerContainer,
		ConcurrentStarts:     c.Limits.ConcurrentStarts,
		ConcurrentProbes:     concurrentProbes(c),
		WaitingStarts:        config.WaitingStarts,
		SpareDescriptors:     c.Limits.SpareDescriptors,
	}
	for _, rule := range c.Deny {
		selector := session.Selector{Namespaces: rule.Namespaces, PodLabels: rule.PodLabels, TTY: rule.TTY}
		for _, kind := range rule.Kinds {
			selector.Kinds = append(selector.Kinds, session.Kind(kind))
		}
		l.Deny = append(l.Deny, limits.Rule{Selector: selector, Message: rule.Message})
	}
	return l
}

// Defaults for the number of concurrent commands, by CPU.
const (
	probesOfCPU = 32
	leastProbes = 64
	endsOfCPU   = 100
)

func concurrentProbes(c config.Config) int {
	if c.Limits.ConcurrentProbes >= 0 {
		return c.Limits.ConcurrentProbes
	}
	return max(probesOfCPU*runtime.NumCPU(), leastProbes)
}

func concurrentEnds(c config.Config) int {
	if c.Limits.ConcurrentEnds >= 0 {
		return c.Limits.ConcurrentEnds
	}
	return endsOfCPU * runtime.NumCPU()
}

func streamingSettings(c config.Config) streaming.Settings {
	return streaming.Settings{
		IdleTimeout: map[session.Kind]time.Duration{
			session.Exec:        time.Duration(c.Exec.IdleTimeout),
			session.Attach:      time.Duration(c.Attach.IdleTimeout),
			session.PortForward: time.Duration(c.PortForward.IdleTimeout),
		},
		MaxLifetime: map[session.Kind]time.Duration{
			session.Exec:        time.Duration(c.Exec.MaxLifetime),
			session.Attach:      time.Duration(c.Attach.MaxLifetime),
			session.PortForward: time.Duration(c.PortForward.MaxLifetime),
		},
		Bandwidth: c.Limits.Bandwidth,
	}
}
