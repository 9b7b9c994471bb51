package admin

import (
	"context"
	"fmt"
	"log/slog"
	"net"
	"path/filepath"
	"testing"

	"github.com/streamshim/streamshim/pkg/session"
)

// BenchmarkList is one "streamshim sessions list" while N sessions live.
func BenchmarkList(b *testing.B) {
	for _, n := range []int{10, 100, 1000, 4000} {
		b.Run(fmt.Sprint(n), func(b *testing.B) {
			log := slog.New(slog.DiscardHandler)
			registry := session.NewRegistry(log)
			for range n {
				if _, err := registry.Begin(b.Context(), session.Info{Kind: session.Exec, Command: []string{"sh"}}); err != nil {
					b.Fatal(err)
				}
			}
			path := filepath.Join(b.TempDir(), "admin.sock")
			listener, err := net.Listen("unix", path)
			if err != nil {
				b.Fatal(err)
			}
			server := NewServer(Config{Sessions: registry, Log: log, Settings: func() Settings { return Settings{} }})
			served := make(chan error, 1)
			go func() { served <- server.Serve(listener) }()
			client := NewClient(path)
			for b.Loop() {
				list, err := client.List(b.Context())
				if err != nil || len(list) != n {
					b.Fatal(len(list), err)
				}
			}
			client.Close()
			if err := server.Shutdown(context.Background()); err != nil {
				b.Error(err)
			}
			<-served
		})
	}
}
