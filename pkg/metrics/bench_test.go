package metrics

import (
	"fmt"
	"log/slog"
	"testing"

	"github.com/streamshim/streamshim/pkg/session"
)

// BenchmarkScrape is one scrape while N sessions live.
func BenchmarkScrape(b *testing.B) {
	for _, n := range []int{10, 100, 1000, 4000} {
		b.Run(fmt.Sprint(n), func(b *testing.B) {
			m := newForTest()
			registry := session.NewRegistry(slog.New(slog.DiscardHandler))
			registry.Observe(m)
			for range n {
				s, err := registry.Begin(b.Context(), session.Info{Kind: session.Exec})
				if err != nil {
					b.Fatal(err)
				}
				s.Connect(moved{1, 2})
			}
			for b.Loop() {
				if _, err := m.registry.Gather(); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
