package cri

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"net"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/encoding/gzip"
	"google.golang.org/grpc/metadata"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// recorder keeps what clients send on the connections that a listener accepts.
type recorder struct {
	net.Listener
	mu   sync.Mutex
	sent []*bytes.Buffer
}

func (r *recorder) Accept() (net.Conn, error) {
	conn, err := r.Listener.Accept()
	if err != nil {
		return nil, err
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	sent := &bytes.Buffer{}
	r.sent = append(r.sent, sent)
	return recordedConn{conn, r, sent}, nil
}

type recordedConn struct {
	net.Conn
	recorder *recorder
	sent     *bytes.Buffer
}

func (c recordedConn) Read(p []byte) (int, error) {
	n, err := c.Conn.Read(p)
	c.recorder.mu.Lock()
	defer c.recorder.mu.Unlock()
	c.sent.Write(p[:n])
	return n, err
}

// frames are the only connection's frames in words. What depends on timing is left out: acknowledgements,
// pings and windows, and what is left of a deadline.
func (r *recorder) frames(t *testing.T) []string {
	t.Helper()
	r.mu.Lock()
	defer r.mu.Unlock()
	if len(r.sent) != 1 {
		t.Fatalf("%d connections, want 1", len(r.sent))
	}
	text, found := bytes.CutPrefix(r.sent[0].Bytes(), []byte(http2.ClientPreface))
	if !found {
		t.Fatalf("no HTTP/2: %q", text)
	}
	framer := http2.NewFramer(io.Discard, bytes.NewReader(text))
	framer.ReadMetaHeaders = hpack.NewDecoder(4096, nil)
	var frames []string
	for {
		frame, err := framer.ReadFrame()
		if err == io.EOF || err == io.ErrUnexpectedEOF {
			return frames
		}
		if err != nil {
			t.Fatal(err)
		}
		switch f := frame.(type) {
		case *http2.SettingsFrame:
			if f.IsAck() {
				continue
			}
			line := "settings"
			f.ForeachSetting(func(s http2.Setting) error { line += " " + s.String(); return nil })
			frames = append(frames, line)
		case *http2.MetaHeadersFrame:
			// Metadata comes in any order, as it lies in a map.
			fields := slices.Clone(f.RegularFields())
			slices.SortStableFunc(fields, func(a, b hpack.HeaderField) int { return strings.Compare(a.Name, b.Name) })
			for _, field := range append(slices.Clone(f.PseudoFields()), fields...) {
				value := field.Value
				if field.Name == "grpc-timeout" {
					value = "unit " + value[len(value)-1:]
				}
				frames = append(frames, fmt.Sprintf("header %s: %q", field.Name, value))
			}
			frames = append(frames, fmt.Sprintf("end of headers, of the stream: %v", f.StreamEnded()))
		case *http2.DataFrame:
			frames = append(frames, fmt.Sprintf("data %q, end of the stream: %v", f.Data(), f.StreamEnded()))
		}
	}
}

// onTheWire is what an upstream receives of one call by way of connect.
func onTheWire(t *testing.T, connect func(t *testing.T, path string) *grpc.ClientConn, call func(*testing.T, *grpc.ClientConn)) []string {
	t.Helper()
	var r *recorder
	upstream := &fakeUpstream{
		path: filepath.Join(socketDir(t), "up.sock"),
		register: func(s *grpc.Server) {
			runtimeapi.RegisterRuntimeServiceServer(s, &fakeRuntime{})
		},
		options: []grpc.ServerOption{grpc.UnknownServiceHandler(func(_ any, stream grpc.ServerStream) error {
			for { // to the half-close, so that all is read before the answer
				if err := stream.RecvMsg(text("")); err == io.EOF {
					return stream.SendMsg(text("done"))
				} else if err != nil {
					return err
				}
			}
		})},
		listen: func(l net.Listener) net.Listener {
			r = &recorder{Listener: l}
			return r
		},
	}
	upstream.start(t)
	t.Cleanup(upstream.kill)
	call(t, connect(t, upstream.path))
	upstream.kill() // now all that was sent has been read
	return r.frames(t)
}

// dialStock connects as kubelet and crictl do, which register gzip (by their OpenTelemetry exporter).
func dialStock(t *testing.T, path string) *grpc.ClientConn {
	t.Helper()
	conn, err := grpc.NewClient("unix://"+path,
		grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithAuthority("localhost"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	return conn
}

// A forwarded call cannot be told from the client's own: not by settings, headers or how it is cut into frames.
func TestForwardedCallsLookLikeTheClientsOwn(t *testing.T) {
	version := func(options ...grpc.CallOption) func(*testing.T, context.Context, *grpc.ClientConn) {
		return func(t *testing.T, ctx context.Context, conn *grpc.ClientConn) {
			if _, err := runtimeapi.NewRuntimeServiceClient(conn).Version(ctx, &runtimeapi.VersionRequest{Version: "v1"}, options...); err != nil {
				t.Error(err)
			}
		}
	}
	for _, test := range []struct {
		name string
		call func(*testing.T, context.Context, *grpc.ClientConn)
		want string // must be among the frames, or nothing was compared
	}{
		{"unary", version(), `header content-type: "application/grpc"`},
		{"deadline", func(t *testing.T, ctx context.Context, conn *grpc.ClientConn) {
			ctx, cancel := context.WithTimeout(ctx, 25*time.Second)
			defer cancel()
			version()(t, ctx, conn)
		}, "header grpc-timeout: \"unit u\""},
		{"metadata", func(t *testing.T, ctx context.Context, conn *grpc.ClientConn) {
			version()(t, metadata.AppendToOutgoingContext(ctx, "traceparent", "00-1-2-01", "blob-bin", "\x00\xff"), conn)
		}, `header blob-bin: "AP8"`},
		{"answer may be compressed", version(), `header grpc-accept-encoding: "gzip"`},
		{"compressed request", version(grpc.UseCompressor(gzip.Name)), `header grpc-encoding: "gzip"`},
		{"server stream", func(t *testing.T, ctx context.Context, conn *grpc.ClientConn) {
			stream, err := runtimeapi.NewRuntimeServiceClient(conn).GetContainerEvents(ctx, &runtimeapi.GetEventsRequest{})
			if err != nil {
				t.Fatal(err)
			}
			_, err = stream.Recv()
			wantCode(t, err, codes.Unimplemented, "GetContainerEvents")
		}, `header :path: "/runtime.v1.RuntimeService/GetContainerEvents"`},
		{"of a kind that is not known", func(t *testing.T, ctx context.Context, conn *grpc.ClientConn) {
			stream, err := conn.NewStream(ctx, allKinds, strangeMethod+"All")
			if err != nil {
				t.Fatal(err)
			}
			if err := stream.SendMsg(text("x")); err != nil {
				t.Fatal(err)
			}
			if err := stream.CloseSend(); err != nil {
				t.Fatal(err)
			}
			receive(t, stream)
			if err := stream.RecvMsg(text("")); err != io.EOF {
				t.Error(err)
			}
		}, `header te: "trailers"`},
	} {
		t.Run(test.name, func(t *testing.T) {
			call := func(t *testing.T, conn *grpc.ClientConn) { test.call(t, context.Background(), conn) }
			own := onTheWire(t, dialStock, call)
			forwarded := onTheWire(t, func(t *testing.T, path string) *grpc.ClientConn {
				front := filepath.Join(socketDir(t), "front.sock")
				serveAt(t, front, path, nil)
				return dialStock(t, front)
			}, call)
			if !slices.Contains(own, test.want) {
				t.Errorf("the client itself did not send %s:\n%s", test.want, strings.Join(own, "\n"))
			}
			if !slices.Equal(own, forwarded) {
				t.Errorf("forwarded:\n%s\nthe client's own:\n%s", strings.Join(forwarded, "\n"), strings.Join(own, "\n"))
			}
		})
	}
}
