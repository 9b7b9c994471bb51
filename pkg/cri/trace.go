package cri

import (
	"context"

	"google.golang.org/grpc/metadata"
)

// traceHeaders carry the trace context of a call (W3C Trace Context). The kubelet sends them when
// its tracing is on.
var traceHeaders = []string{"traceparent", "tracestate"}

// TraceFunc begins the span of a call that is answered here. parent is the trace context that the
// client sent, empty when it sent none; own is that of the new span. end is called once.
type TraceFunc func(method string, parent map[string]string) (own map[string]string, end func(error))

type traceKey struct{}

// traced puts the trace context into the call's context.
func (s *Server) traced(ctx context.Context, method string) (_ context.Context, end func(error)) {
	received := map[string]string{}
	for _, name := range traceHeaders {
		if values := metadata.ValueFromIncomingContext(ctx, name); len(values) > 0 {
			received[name] = values[0]
		}
	}
	end = func(error) {}
	if s.trace != nil {
		received, end = s.trace(method, received)
	}
	if len(received) == 0 {
		return ctx, end
	}
	return context.WithValue(ctx, traceKey{}, received), end
}

// traceOf is the trace context of a call, nil when it has none.
func traceOf(ctx context.Context) map[string]string {
	trace, _ := ctx.Value(traceKey{}).(map[string]string)
	return trace
}

// withTrace hands a trace context on to the upstream.
func withTrace(ctx context.Context, trace map[string]string) context.Context {
	for name, value := range trace {
		ctx = metadata.AppendToOutgoingContext(ctx, name, value)
	}
	return ctx
}
