package daemon

import (
	"context"
	"fmt"
	"log/slog"
	"sync"
	"time"

	"google.golang.org/grpc/codes"

	"github.com/streamshim/streamshim/pkg/config"
	"github.com/streamshim/streamshim/pkg/cri"
	"github.com/streamshim/streamshim/pkg/handover"
	"github.com/streamshim/streamshim/pkg/metrics"
	"github.com/streamshim/streamshim/pkg/session"
	"github.com/streamshim/streamshim/pkg/streaming"
	"github.com/streamshim/streamshim/pkg/streaming/event"
	"github.com/streamshim/streamshim/pkg/tracing"
)

// telemetry holds metrics and traces. What is not configured is nil.
type telemetry struct {
	log      *slog.Logger
	listener *handover.Listener
	metrics  *metrics.Metrics
	server   *metrics.Server
	self     *cri.Upstream // a client of our own CRI socket
	tracer   *tracing.Tracer

	streams *streaming.Server // set by serve
	serving sync.WaitGroup
}

// newTelemetry listens on the metrics address. The caller closes the telemetry when all sessions have ended.
func newTelemetry(ctx context.Context, version string, c config.Config, o *operation, h *handovers, before *predecessor, log *slog.Logger) (_ *telemetry, err error) {
	t := &telemetry{log: log}
	defer func() {
		if err != nil {
			t.close()
		}
	}()
	if c.Traces.Endpoint != "" {
		if t.tracer, err = newTracer(ctx, version, c, log); err != nil {
			return nil, err
		}
	}
	listener, err := before.address(c.MetricsAddress, func(s processState) addressState { return s.Metrics })
	if err != nil {
		return nil, fmt.Errorf("listen for metrics: %w", err)
	}
	if listener == nil {
		return t, nil
	}
	if t.listener, err = handover.NewListener(listener); err != nil {
		return nil, err
	}
	if t.self, err = cri.NewUpstream(c.Listen, 0); err != nil {
		return nil, err
	}
	t.metrics = metrics.New(metrics.Config{
		Version: version, Methods: cri.Methods(), WaitingTokens: func() int { return t.streams.WaitingTokens() },
		LostAudit: o.audit.Lost, IncompleteRecordings: o.recorder.Incomplete,
		Buffered: o.buffers.Used, BuffersRefused: o.buffers.Refused,
		SyncOutput: o.syncOutput.Used, SyncOutputRefused: o.syncOutput.Refused,
		RecordingBuffered: o.recordings.Used, RecordingBuffersRefused: o.recordings.Refused,
		Commands: o.commands, Handovers: h.numbers,
	})
	t.server = metrics.NewServer(metrics.ServerConfig{
		Metrics: t.metrics, Profiling: c.Profiling, Log: log,
		Ready: func(ctx context.Context) error {
			_, err := t.self.Version(ctx) // through this process to the upstream
			return err
		},
	})
	return t, nil
}

func newTracer(ctx context.Context, version string, c config.Config, log *slog.Logger) (*tracing.Tracer, error) {
	return tracing.New(ctx, tracing.Config{
		Endpoint: c.Traces.Endpoint, Insecure: c.Traces.Insecure, SampleRatio: c.Traces.SampleRatio, Version: version, Log: log,
	})
}

// hooks are functions by which the parts report events. They are nil where telemetry is off.
type hooks struct {
	started   func()
	killed    func()
	event     func(event.Event)
	call      func(method string, code codes.Code, d time.Duration)
	trace     cri.TraceFunc
	countSync func(cri.BeginSyncFunc) cri.BeginSyncFunc // never nil
}

func (t *telemetry) hooks() hooks {
	h := hooks{countSync: func(begin cri.BeginSyncFunc) cri.BeginSyncFunc { return begin }}
	if t.metrics != nil {
		h.started, h.killed, h.countSync = t.metrics.Started, t.metrics.Killed, t.countSync
		h.event = func(e event.Event) { t.metrics.Event(string(e)) }
		h.call = func(method string, code codes.Code, d time.Duration) { t.metrics.Call(method, code.String(), d) }
	}
	if t.tracer != nil {
		h.trace = t.tracer.Call
	}
	return h
}

// observe registers metrics and traces as observers of sessions.
func (t *telemetry) observe(sessions *session.Registry) {
	if t.metrics != nil {
		sessions.Observe(t.metrics)
	}
	if t.tracer != nil {
		sessions.Observe(t.tracer)
	}
}

// countSync counts each ExecSync and its outcome.
func (t *telemetry) countSync(begin cri.BeginSyncFunc) cri.BeginSyncFunc {
	return func(ctx context.Context, info session.Info) (func(session.Outcome, int64), error) {
		start := time.Now()
		end, err := begin(ctx, info)
		if err != nil {
			t.metrics.Refused(info, err)
			return nil, err
		}
		return func(o session.Outcome, output int64) {
			end(o, output)
			t.metrics.ExecSync(o, output, time.Since(start))
		}, nil
	}
}

// serve serves the metrics until close, if they are configured.
func (t *telemetry) serve(streams *streaming.Server) {
	t.streams = streams
	if t.server == nil {
		return
	}
	t.serving.Go(func() {
		if err := t.server.Serve(t.listener); err != nil {
			t.log.Error("metrics are not served any more", "error", err)
		}
	})
	t.log.Info("metrics", "address", t.listener.Addr())
}

// quiesce stops accepting connections until resume, and waits for scrapes under way until the context is done.
func (t *telemetry) quiesce(ctx context.Context) {
	if t.server != nil {
		t.server.Quiesce(ctx)
	}
}

func (t *telemetry) resume() {
	if t.server != nil {
		t.server.Resume()
	}
}

// close stops the servers and sends the last spans, within endTimeout.
func (t *telemetry) close() {
	if t.server != nil {
		t.server.Close() //nolint:errcheck // nothing depends on it any more
	}
	if t.listener != nil {
		t.listener.Close() //nolint:errcheck // the server has closed it, if it began
	}
	t.serving.Wait()
	if t.self != nil {
		t.self.Close() //nolint:errcheck // as above
	}
	if t.tracer != nil {
		ctx, cancel := context.WithTimeout(context.Background(), endTimeout)
		defer cancel()
		if err := t.tracer.Close(ctx); err != nil {
			t.log.Warn("some traces are lost", "error", err)
		}
	}
}
