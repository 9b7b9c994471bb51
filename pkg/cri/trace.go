package cri

import (
	"context"

	"google.golang.org/grpc/metadata"
)

// traceHeaders carry a call's trace context (W3C Trace Context). The kubelet sends them if its tracing is on.
var traceHeaders = []string{"traceparent", "tracestate"}

// TraceFunc begins the span of a call that is answered here. parent is the client's trace context, empty if it
// sent none. own is that of the new span. end is called once.
type TraceFunc func(method string, parent map[string]string) (own map[string]string, end func(error))

type traceKey struct{}

// traced adds the trace context to the call's context.
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

// traceOf returns a call's trace context, or nil.
func traceOf(ctx context.Context) map[string]string {
	trace, _ := ctx.Value(traceKey{}).(map[string]string)
	return trace
}

// withTrace passes a trace context on to the upstream.
func withTrace(ctx context.Context, trace map[string]string) context.Context {
	for name, value := range trace {
		ctx = metadata.AppendToOutgoingContext(ctx, name, value)
	}
	return ctx
}
