package criosocket

import (
	"context"
	"fmt"
	"net"
	"path/filepath"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/health"
	healthapi "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/status"

	"github.com/streamshim/streamshim/internal/testutil/leak"
)

// It refuses what CRI-O's socket refuses, a subtype of the content type above all: without that, tests of
// forwarding would pass with any.
func TestSocketIsStrict(t *testing.T) {
	leak.Check(t)
	path := filepath.Join(t.TempDir(), "crio.sock")
	socket, err := Listen(path)
	if err != nil {
		t.Fatal(err)
	}
	server := grpc.NewServer()
	healthapi.RegisterHealthServer(server, health.NewServer())
	served := make(chan error, 1)
	go func() { served <- server.Serve(socket.GRPC()) }()
	t.Cleanup(func() {
		server.Stop()
		<-served
		socket.Close()
	})
	for subtype, want := range map[string]codes.Code{"": codes.OK, "proto": codes.Unavailable} {
		conn, err := grpc.NewClient("unix://"+path, grpc.WithTransportCredentials(insecure.NewCredentials()))
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		var options []grpc.CallOption
		if subtype != "" {
			options = append(options, grpc.CallContentSubtype(subtype))
		}
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		_, err = healthapi.NewHealthClient(conn).Check(ctx, &healthapi.HealthCheckRequest{}, options...)
		if status.Code(err) != want {
			t.Errorf("content subtype %q: %v, want %v", subtype, err, want)
		}
	}
	conn, err := net.Dial("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	fmt.Fprintf(conn, "SSH-2.0-something else than HTTP\r\n\r\n")
	if n, err := conn.Read(make([]byte, 1)); err == nil {
		t.Errorf("%d bytes of an answer", n)
	}
}
