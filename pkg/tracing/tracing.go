// Package tracing sends OpenTelemetry spans over OTLP/gRPC. Each CRI call that streamshim answers has a span, and its
// session has one below it, with the phases start, run and linger as children. They continue the trace that the kubelet
// has begun.
//
// Spans name the pod and the container, never the command.
package tracing

import (
	"context"
	"fmt"
	"log/slog"
	"strings"
	"sync"
	"time"

	"go.opentelemetry.io/otel"
	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/codes"
	"go.opentelemetry.io/otel/exporters/otlp/otlptrace"
	"go.opentelemetry.io/otel/exporters/otlp/otlptrace/otlptracegrpc"
	"go.opentelemetry.io/otel/propagation"
	"go.opentelemetry.io/otel/sdk/resource"
	sdktrace "go.opentelemetry.io/otel/sdk/trace"
	"go.opentelemetry.io/otel/trace"
	"google.golang.org/grpc/status"

	"github.com/streamshim/streamshim/pkg/session"
)

// Config configures a Tracer.
type Config struct {
	Endpoint string // HOST:PORT of an OTLP/gRPC receiver
	Insecure bool   // without TLS
	// SampleRatio is the share of calls that are traced, from 0 to 1, among those whose client sends no trace
	// context. Other calls are traced if their client traces them.
	SampleRatio float64
	Version     string // of streamshim
	Log         *slog.Logger
}

// queue bounds the spans that wait to be sent. When it is full, new spans are dropped. No session ever waits for the
// receiver.
const queue = 2048

// Tracer is a session.Observer that creates spans. Its methods may be called from many goroutines.
type Tracer struct {
	provider *sdktrace.TracerProvider
	exporter *otlptrace.Exporter
	tracer   trace.Tracer
	context  propagation.TraceContext

	mu       sync.Mutex
	sessions map[*session.Session]*spans
}

// spans are the open spans of one live session.
type spans struct {
	ctx   context.Context // of whole
	whole trace.Span
	phase trace.Span
}

// New returns a tracer that connects when it has something to send. The caller closes it. Failures to send are logged as
// warnings. The library has one global handler for them, which New sets.
func New(ctx context.Context, c Config) (*Tracer, error) {
	options := []otlptracegrpc.Option{otlptracegrpc.WithEndpoint(c.Endpoint)}
	if c.Insecure {
		options = append(options, otlptracegrpc.WithInsecure())
	}
	exporter, err := otlptracegrpc.New(ctx, options...)
	if err != nil {
		return nil, fmt.Errorf("traces to %s: %w", c.Endpoint, err)
	}
	otel.SetErrorHandler(otel.ErrorHandlerFunc(func(err error) {
		c.Log.Warn("spans could not be sent", "endpoint", c.Endpoint, "error", err)
	}))
	provider := sdktrace.NewTracerProvider(
		sdktrace.WithBatcher(exporter, sdktrace.WithMaxQueueSize(queue)),
		sdktrace.WithSampler(sdktrace.ParentBased(sdktrace.TraceIDRatioBased(c.SampleRatio))),
		sdktrace.WithResource(resource.NewSchemaless(
			attribute.String("service.name", "streamshim"), attribute.String("service.version", c.Version))),
	)
	return &Tracer{
		provider: provider,
		exporter: exporter,
		tracer:   provider.Tracer("github.com/streamshim/streamshim"),
		sessions: make(map[*session.Session]*spans),
	}, nil
}

// Close sends the waiting spans, until ctx is done.
func (t *Tracer) Close(ctx context.Context) error {
	if err := t.provider.Shutdown(ctx); err != nil {
		// Otherwise a call in progress would continue for half a minute.
		t.exporter.Shutdown(ctx) //nolint:errcheck // the first error says more
		return fmt.Errorf("send the last spans: %w", err)
	}
	return nil
}

// Call begins the span of a CRI call below the client's trace context, and returns the span's trace context.
func (t *Tracer) Call(fullMethod string, parent map[string]string) (own map[string]string, end func(error)) {
	service, method, _ := strings.Cut(strings.TrimPrefix(fullMethod, "/"), "/")
	ctx := t.context.Extract(context.Background(), propagation.MapCarrier(parent))
	ctx, span := t.tracer.Start(ctx, service+"/"+method, trace.WithSpanKind(trace.SpanKindServer), trace.WithAttributes(
		attribute.String("rpc.system", "grpc"), attribute.String("rpc.service", service), attribute.String("rpc.method", method)))
	own = make(map[string]string, 2)
	t.context.Inject(ctx, propagation.MapCarrier(own))
	return own, func(err error) {
		span.SetAttributes(attribute.Int("rpc.grpc.status_code", int(status.Code(err))))
		fail(span, err)
		span.End()
	}
}

// phaseNames are the names of the spans below a session's.
var phaseNames = map[session.Phase]string{session.Starting: "start", session.Running: "run", session.Lingering: "linger"}

// Began implements session.Observer.
func (t *Tracer) Began(s *session.Session) { t.begin(s, session.Starting, s.Start) }

// Resumed implements session.Observer. The open spans of the other program are lost. So Resumed begins a new span for the
// whole session, and one for its current phase from now on.
func (t *Tracer) Resumed(s *session.Session) { t.begin(s, s.Phase(), time.Now()) }

func (t *Tracer) begin(s *session.Session, phase session.Phase, since time.Time) {
	ctx := t.context.Extract(context.Background(), propagation.MapCarrier(s.Trace))
	ctx, whole := t.tracer.Start(ctx, string(s.Kind)+" session", trace.WithTimestamp(s.Start), trace.WithAttributes(
		attribute.String("streamshim.session.id", s.ID),
		attribute.String("streamshim.protocol", s.Protocol),
		attribute.Bool("streamshim.tty", s.TTY),
		attribute.String("k8s.namespace.name", s.Target.PodNamespace),
		attribute.String("k8s.pod.name", s.Target.PodName),
		attribute.String("k8s.pod.uid", s.Target.PodUID),
		attribute.String("k8s.container.name", s.Target.ContainerName),
		attribute.String("container.id", s.Target.ContainerID)))
	_, span := t.tracer.Start(ctx, phaseNames[phase], trace.WithTimestamp(since))
	t.mu.Lock()
	defer t.mu.Unlock()
	t.sessions[s] = &spans{ctx: ctx, whole: whole, phase: span}
}

// PhaseChanged implements session.Observer.
func (t *Tracer) PhaseChanged(s *session.Session, phase session.Phase) {
	name := phaseNames[phase]
	t.mu.Lock()
	defer t.mu.Unlock()
	if of := t.sessions[s]; of != nil && name != "" {
		of.phase.End()
		_, of.phase = t.tracer.Start(of.ctx, name)
	}
}

// Ended implements session.Observer.
func (t *Tracer) Ended(s *session.Session, o session.Outcome) {
	t.mu.Lock()
	of := t.sessions[s]
	delete(t.sessions, s)
	t.mu.Unlock()
	if of == nil {
		return
	}
	of.phase.End()
	received, sent := s.Transferred()
	of.whole.SetAttributes(
		attribute.String("streamshim.reason", o.Reason),
		attribute.Int64("streamshim.received", received), attribute.Int64("streamshim.sent", sent))
	if o.ExitCode >= 0 {
		of.whole.SetAttributes(attribute.Int("process.exit.code", o.ExitCode))
	}
	fail(of.whole, o.Err)
	of.whole.End()
}

// Refused implements session.Observer. The call's span records the refusal.
func (t *Tracer) Refused(session.Info, error) {}

// fail marks a span as failed, without the error's text, which may contain the name of the command.
func fail(span trace.Span, err error) {
	if err != nil {
		span.SetStatus(codes.Error, "")
	}
}
