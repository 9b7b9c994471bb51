package cri

import (
	"fmt"

	"google.golang.org/grpc/encoding"
	_ "google.golang.org/grpc/encoding/gzip" // a client may compress its requests
	"google.golang.org/grpc/encoding/proto"
	"google.golang.org/grpc/mem"
)

// frame is one gRPC message as it came off the wire. It holds a reference to its buffers from
// Unmarshal until free.
type frame struct {
	data mem.BufferSlice
}

func (f *frame) free() {
	f.data.Free()
	f.data = nil
}

// rawCodec passes frames through without looking at them and leaves everything else to the proto
// codec. The server and the upstream connection use it, so that a forwarded message is neither
// decoded nor copied.
type rawCodec struct {
	proto encoding.CodecV2
}

var codec = rawCodec{proto: encoding.GetCodecV2(proto.Name)}

// Marshal hands out the frame's buffers with a reference of their own, which gRPC frees.
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

// Unmarshal takes a reference of its own, because gRPC frees data when it returns.
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

// Name is the content-subtype of calls to the upstream: none, as every stock client has it. CRI-O shares its
// socket between gRPC and HTTP and takes a connection for gRPC only when the content type of its first
// request is exactly "application/grpc".
func (rawCodec) Name() string { return "" }
