package daemon

import (
	"context"
	"os"
	"os/signal"
	"syscall"
)

// termination is the end by SIGTERM or SIGINT. Until begin, these signals end the process at once; afterwards the first one
// ends the context, and the second one the process.
type termination struct {
	ctx     context.Context //nolint:containedctx // ended by signals
	cancel  context.CancelFunc
	signals chan os.Signal
	asked   chan chan struct{}
	began   bool
	ended   chan struct{} // the goroutine has
}

func newTermination(ctx context.Context) *termination {
	t := &termination{signals: make(chan os.Signal, 1), asked: make(chan chan struct{}), ended: make(chan struct{})}
	t.ctx, t.cancel = context.WithCancel(ctx)
	return t
}

// begin asks for the signals. It may be called twice.
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

// suspend leaves the signals to their default again, which ends the process at once, and tells whether one came before.
func (t *termination) suspend() (came bool) {
	signal.Stop(t.signals) // none comes any more
	seen := make(chan struct{})
	select {
	case t.asked <- seen:
		<-seen
	case <-t.ended:
	}
	return t.ctx.Err() != nil
}

// resume asks for the signals again after suspend.
func (t *termination) resume() {
	if t.ctx.Err() == nil {
		signal.Notify(t.signals, syscall.SIGTERM, syscall.SIGINT)
	}
}

// stop ends the context and leaves the signals to their default.
func (t *termination) stop() {
	t.cancel()
	if t.began {
		<-t.ended
	}
}
