package cri

import (
	"context"
	"errors"
	"io"
	"strings"
	"sync/atomic"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"github.com/streamshim/streamshim/pkg/rescue"
)

// forwardDesc describes a forwarded call of unknown kind as a bidirectional stream, of which all other kinds are
// special cases on the wire.
var forwardDesc = &grpc.StreamDesc{ClientStreams: true, ServerStreams: true}

// forward relays one call of any kind to the upstream and back without decoding it. Deadline and cancellation
// travel with the context, a client's half-close with CloseSend. The upstream's status is returned unchanged. If
// the upstream goes away in the middle there is no status, and the error names the upstream.
func (s *Server) forward(_ any, client grpc.ServerStream) error {
	method, ok := grpc.MethodFromServerStream(client)
	if !ok {
		return status.Error(codes.Internal, "forward: the stream has no method")
	}
	if unaryMethods[method] {
		return s.forwardUnary(client, method)
	}
	ctx, cancel := context.WithCancel(outgoing(client.Context()))
	defer cancel()
	desc := forwardDesc
	if known := streamDescs[method]; known != nil {
		desc = known // the half-close of a call with one request goes with that request
	}
	upstream, err := s.upstream.conn.NewStream(ctx, desc, method, forwardOptions(ctx)...)
	if err != nil {
		return err
	}

	// The upstream may answer, or end the call, before the client has finished sending. Do not wait for this
	// goroutine: when forward returns, gRPC ends the client's stream and thus RecvMsg, and cancel ends SendMsg.
	var fault atomic.Pointer[rescue.Panic]
	rescue.Go(func(p *rescue.Panic) {
		fault.Store(p)
		cancel()
	}, func() {
		if err := copyRequests(upstream, client); err != nil {
			cancel()
		}
	})
	err = s.upstream.nameEndpoint(copyResponses(client, upstream))
	if p := fault.Load(); p != nil {
		panic(p) // of this call
	}
	return err
}

// forwardUnary relays a call that is known to be unary, as nearly all are. Each side sends its part in one write,
// and no goroutine is needed.
func (s *Server) forwardUnary(client grpc.ServerStream, method string) error {
	var request, response frame
	if err := client.RecvMsg(&request); err != nil {
		if errors.Is(err, io.EOF) {
			return status.Errorf(codes.Internal, "%s: the call ended without a request", method)
		}
		return err
	}
	err := s.invokeUpstream(client.Context(), method, &request, &response)
	request.free()
	defer response.free()
	if err != nil {
		return err
	}
	return client.SendMsg(&response)
}

// invokeUpstream makes a unary call as the client made it and prepares the metadata of our own response. The
// context is that of the client's call. Both frames remain the caller's.
func (s *Server) invokeUpstream(ctx context.Context, method string, request, response *frame) error {
	var header, trailer metadata.MD
	err := s.upstream.conn.Invoke(outgoing(ctx), method, request, response,
		append(forwardOptions(ctx), grpc.Header(&header), grpc.Trailer(&trailer))...)
	if headerErr := grpc.SetHeader(ctx, withoutReserved(header)); err == nil {
		err = headerErr
	}
	if trailerErr := grpc.SetTrailer(ctx, withoutReserved(trailer)); err == nil {
		err = trailerErr
	}
	return err
}

// copyRequests returns nil after the client's half-close, or when the upstream has ended the call: copyResponses
// then gets the reason.
func copyRequests(upstream grpc.ClientStream, client grpc.ServerStream) error {
	for {
		var message frame
		err := client.RecvMsg(&message)
		if errors.Is(err, io.EOF) {
			return upstream.CloseSend()
		}
		if err != nil {
			return err
		}
		err = upstream.SendMsg(&message)
		message.free()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
	}
}

func copyResponses(client grpc.ServerStream, upstream grpc.ClientStream) error {
	// Send headers at once rather than with the first message: a watch may have its first message hours later. nil
	// means that the response has only trailers, and so must ours.
	header, err := upstream.Header()
	if err != nil {
		return err
	}
	if header != nil {
		if err := client.SendHeader(withoutReserved(header)); err != nil {
			return err
		}
	}
	for {
		var message frame
		err := upstream.RecvMsg(&message)
		if err != nil {
			client.SetTrailer(withoutReserved(upstream.Trailer()))
			if errors.Is(err, io.EOF) {
				return nil
			}
			return err
		}
		err = client.SendMsg(&message)
		message.free()
		if err != nil {
			return err
		}
	}
}

// outgoing turns the metadata that a client sent into metadata for the upstream.
func outgoing(ctx context.Context) context.Context {
	received, ok := metadata.FromIncomingContext(ctx)
	if !ok {
		return ctx
	}
	return metadata.NewOutgoingContext(ctx, withoutReserved(received))
}

// forwardOptions makes a call to the upstream look like the client's own. The context is the client's. gRPC offers
// no way to pass on two things: the user agent, which is that of a Go client, and that a client accepts no
// compressed responses: gzip is offered, as kubelet and crictl do.
func forwardOptions(ctx context.Context) []grpc.CallOption {
	options := []grpc.CallOption{grpc.ForceCodecV2(codec)}
	// gRPC keeps grpc-encoding out of the metadata; its own streams know it.
	stream, ok := grpc.ServerTransportStreamFromContext(ctx).(interface{ RecvCompress() string })
	if ok && stream.RecvCompress() != "" {
		options = append(options, grpc.UseCompressor(stream.RecvCompress()))
	}
	return options
}

// withoutReserved drops metadata that belongs to one connection rather than to the call: HTTP/2 pseudo headers and
// what gRPC itself writes (gRPC over HTTP2, "Requests": names with the prefix grpc- are reserved). The binary
// ones, such as grpc-trace-bin, belong to the call.
func withoutReserved(md metadata.MD) metadata.MD {
	out := make(metadata.MD, len(md))
	for key, values := range md {
		switch {
		case strings.HasPrefix(key, ":"), key == "content-type", key == "user-agent", key == "te":
		case strings.HasPrefix(key, "grpc-") && !strings.HasSuffix(key, "-bin"):
		default:
			out[key] = values
		}
	}
	return out
}
