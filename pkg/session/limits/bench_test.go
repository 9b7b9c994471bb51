package limits

import (
	"fmt"
	"log/slog"
	"testing"

	"github.com/streamshim/streamshim/pkg/session"
)

// BenchmarkOneMore is one session that begins and ends among N that live, in the registry and under all limits.
func BenchmarkOneMore(b *testing.B) {
	for _, n := range []int{10, 100, 1000, 4000} {
		b.Run(fmt.Sprint(n), func(b *testing.B) {
			l := New(Config{Sessions: n + 1, SessionsPerPod: n + 1, SessionsPerContainer: n + 1, SpareDescriptors: -1})
			registry := session.NewRegistry(slog.New(slog.DiscardHandler), l)
			for range n {
				l.descriptors.since = 0 // nothing is opened here
				if _, err := registry.Begin(b.Context(), exec("pod", "container")); err != nil {
					b.Fatal(err)
				}
			}
			for b.Loop() {
				l.descriptors.since = 0
				s, err := registry.Begin(b.Context(), exec("pod", "container"))
				if err != nil {
					b.Fatal(err)
				}
				s.End(session.Outcome{})
			}
		})
	}
}
