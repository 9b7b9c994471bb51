package cri

import (
	"context"
	"errors"
	"io"
	"strings"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
)

// forwardDesc makes a forwarded call of a kind that is not known a bidirectional stream, of which all others
// are special cases on the wire.
var forwardDesc = &grpc.StreamDesc{ClientStreams: true, ServerStreams: true}

// forward carries one call of any kind to the upstream and back without decoding it. Deadline and
// cancellation travel with the context, a client's half-close with CloseSend, and the upstream's
// status is returned as it is. An upstream that goes away in the middle has none, and is named.
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

	// The upstream may answer, or end the call, before the client has said everything. This
	// goroutine is not waited for: when forward returns, gRPC ends the client's stream and with it
	// RecvMsg, and cancel ends SendMsg.
	go func() {
		if err := copyRequests(upstream, client); err != nil {
			cancel()
		}
	}()
	return s.upstream.nameEndpoint(copyResponses(client, upstream))
}

// forwardUnary carries a call that is known to be unary, as nearly all are: on either side what
// belongs together leaves with one write, and no goroutine is needed.
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

// invokeUpstream makes a unary call as the client has made it and prepares the metadata of our own
// answer. The context is that of the client's call; both frames stay the caller's.
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

// copyRequests returns nil after the client's half-close, or when the upstream has ended the call
// and copyResponses is about to learn why.
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
	// Sent at once and not with the first message: a watch may have its first message hours later.
	// nil means that the answer has trailers only, and so shall ours.
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

// outgoing turns the metadata a client sent into metadata for the upstream.
func outgoing(ctx context.Context) context.Context {
	received, ok := metadata.FromIncomingContext(ctx)
	if !ok {
		return ctx
	}
	return metadata.NewOutgoingContext(ctx, withoutReserved(received))
}

// forwardOptions are those of a call to the upstream that shall look as the client's own call does. The context
// is the client's. What gRPC gives no way to pass on is the user agent, which is that of a Go client, and that a client
// takes no compressed answers: gzip is offered, as kubelet and crictl offer it.
func forwardOptions(ctx context.Context) []grpc.CallOption {
	options := []grpc.CallOption{grpc.ForceCodecV2(codec)}
	// gRPC keeps grpc-encoding out of the metadata; its own streams know it.
	stream, ok := grpc.ServerTransportStreamFromContext(ctx).(interface{ RecvCompress() string })
	if ok && stream.RecvCompress() != "" {
		options = append(options, grpc.UseCompressor(stream.RecvCompress()))
	}
	return options
}

// withoutReserved drops what belongs to one connection and not to the call: HTTP/2 pseudo headers
// and what gRPC itself writes (gRPC over HTTP2, "Requests": names with the prefix grpc- are
// reserved). The binary ones, such as grpc-trace-bin, belong to the call.
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
