package daemon

import (
	"context"
	"os"
	"os/signal"
	"syscall"
)

// termination handles SIGTERM and SIGINT. Before begin, they end the process at once. Afterwards the first one ends the
// context, and the second one the process.
type termination struct {
	ctx     context.Context //nolint:containedctx // ended by signals
	cancel  context.CancelFunc
	signals chan os.Signal
	asked   chan chan struct{}
	began   bool
	ended   chan struct{} // closed when the goroutine has ended
}

func newTermination(ctx context.Context) *termination {
	t := &termination{signals: make(chan os.Signal, 1), asked: make(chan chan struct{}), ended: make(chan struct{})}
	t.ctx, t.cancel = context.WithCancel(ctx)
	return t
}

// begin starts to handle the signals. It may be called twice.
func (t *termination) begin() {
	if t.began {
		return
	}
	t.began = true
	signal.Notify(t.signals, syscall.SIGTERM, syscall.SIGINT)
	go func() {
		defer close(t.ended)
		for {
			select {
			case <-t.signals:
				t.end()
			case seen := <-t.asked:
				select {
				case <-t.signals:
					t.end()
				default:
				}
				close(seen)
			case <-t.ctx.Done():
				signal.Stop(t.signals)
				return
			}
		}
	}()
}

func (t *termination) end() {
	signal.Stop(t.signals)
	t.cancel()
}

// suspend restores the default action of the signals, which ends the process at once. It reports whether one has arrived
// before.
func (t *termination) suspend() (came bool) {
	signal.Stop(t.signals) // no signal is delivered after this
	seen := make(chan struct{})
	select {
	case t.asked <- seen:
		<-seen
	case <-t.ended:
	}
	return t.ctx.Err() != nil
}

// resume handles the signals again after suspend.
func (t *termination) resume() {
	if t.ctx.Err() == nil {
		signal.Notify(t.signals, syscall.SIGTERM, syscall.SIGINT)
	}
}

// stop ends the context and restores the default action of the signals.
func (t *termination) stop() {
	t.cancel()
	if t.began {
		<-t.ended
	}
}
