package cri

import (
	"fmt"

	"google.golang.org/grpc/encoding"
	_ "google.golang.org/grpc/encoding/gzip" // a client may compress its requests
	"google.golang.org/grpc/encoding/proto"
	"google.golang.org/grpc/mem"
)

// frame is one gRPC message as it was on the wire. It holds a reference to its buffers from Unmarshal until free.
type frame struct {
	data mem.BufferSlice
}

func (f *frame) free() {
	f.data.Free()
	f.data = nil
}

// rawCodec passes frames through unseen and leaves everything else to the proto codec. The server and the upstream
// connection use it, so a forwarded message is neither decoded nor copied.
type rawCodec struct {
	proto encoding.CodecV2
}

var codec = rawCodec{proto: encoding.GetCodecV2(proto.Name)}

// Marshal returns the frame's buffers with a reference of their own, which gRPC frees.
func (c rawCodec) Marshal(v any) (mem.BufferSlice, error) {
	if f, ok := v.(*frame); ok {
		f.data.Ref()
		return f.data, nil
	}
	data, err := c.proto.Marshal(v)
	if err != nil {
		return nil, fmt.Errorf("encode %T: %w", v, err)
	}
	return data, nil
}

// Unmarshal takes a reference of its own, because gRPC frees data when Unmarshal returns.
func (c rawCodec) Unmarshal(data mem.BufferSlice, v any) error {
	if f, ok := v.(*frame); ok {
		data.Ref()
		f.data = data
		return nil
	}
	if err := c.proto.Unmarshal(data, v); err != nil {
		return fmt.Errorf("decode %T: %w", v, err)
	}
	return nil
}

// Name returns the content-subtype of calls to the upstream: none, as with every stock client. CRI-O serves gRPC
// and HTTP on one socket and takes a connection for gRPC only if the content type of its first request is exactly
// "application/grpc".
func (rawCodec) Name() string { return "" }
