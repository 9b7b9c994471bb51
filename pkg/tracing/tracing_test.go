package tracing

import (
	"context"
	"log/slog"
	"net"
	"testing"
	"time"

	"github.com/streamshim/streamshim/pkg/session"
)

func tracer(t testing.TB, endpoint string) *Tracer {
	t.Helper()
	tracer, err := New(context.Background(), Config{
		Endpoint: endpoint, Insecure: true, SampleRatio: 1, Version: "test", Log: slog.New(slog.DiscardHandler),
	})
	if err != nil {
		t.Fatal(err)
	}
	return tracer
}

type still struct{}

func (still) LastActivity() time.Time             { return time.Time{} }
func (still) Transferred() (received, sent int64) { return 0, 0 }

func serve(t testing.TB, r *session.Registry) {
	s, err := r.Begin(context.Background(), session.Info{Kind: session.Exec})
	if err != nil {
		t.Fatal(err)
	}
	s.Connect(still{})
	s.SetPhase(session.Running)
	s.SetPhase(session.Lingering)
	s.End(session.Outcome{Reason: "exited"})
}

// A receiver that accepts connections and never answers costs no session any time, however many
// there are: what does not fit the queue is dropped. And the tracer ends when it is told to.
func TestReceiverThatHangs(t *testing.T) {
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer listener.Close()
	tracer := tracer(t, listener.Addr().String())
	r := session.NewRegistry(slog.New(slog.DiscardHandler))
	r.Observe(tracer)
	began := time.Now()
	for range 2 * queue {
		serve(t, r)
	}
	if took := time.Since(began); took > 30*time.Second {
		t.Errorf("%d sessions took %v", 2*queue, took)
	}
	tracer.mu.Lock()
	left := len(tracer.sessions)
	tracer.mu.Unlock()
	if left != 0 {
		t.Errorf("%d sessions are still kept", left)
	}
	ctx, cancel := context.WithTimeout(context.Background(), 200*time.Millisecond)
	defer cancel()
	closed := make(chan error, 1)
	go func() { closed <- tracer.Close(ctx) }()
	select {
	case err := <-closed:
		if err == nil {
			t.Error("Close does not say that spans were lost")
		}
	case <-time.After(30 * time.Second):
		t.Fatal("Close does not end")
	}
}

// What a session costs without and with traces, besides its work.
func BenchmarkSession(b *testing.B) {
	b.Run("off", func(b *testing.B) {
		r := session.NewRegistry(slog.New(slog.DiscardHandler))
		for b.Loop() {
			serve(b, r)
		}
	})
	b.Run("on", func(b *testing.B) {
		tracer := tracer(b, "127.0.0.1:1")
		r := session.NewRegistry(slog.New(slog.DiscardHandler))
		r.Observe(tracer)
		for b.Loop() {
			serve(b, r)
		}
		ctx, cancel := context.WithCancel(context.Background())
		cancel()
		tracer.Close(ctx)
	})
}
