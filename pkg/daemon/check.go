package daemon

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"runtime/debug"

	"github.com/streamshim/streamshim/pkg/config"
	"github.com/streamshim/streamshim/pkg/cri"
	"github.com/streamshim/streamshim/pkg/endpoint"
	"github.com/streamshim/streamshim/pkg/execproc"
	"github.com/streamshim/streamshim/pkg/handover"
	"github.com/streamshim/streamshim/pkg/session/audit"
	"github.com/streamshim/streamshim/pkg/streaming"
)

// Check runs in a new program that the running one has started as a child, and reports whether it could take over. After
// execve there is no way back, and any failure is a crash. So Check tries everything that may fail and can be undone.
func Check(o Options) error {
	fault("start")
	debug.SetGCPercent(400) // all sessions stand still while the state is read; it is a small part of this program's memory
	var c config.Config
	return handover.AnswerCheck(o.Version, func() (err error) {
		fault("check")
		if c, err = o.Load(); err != nil {
			return err
		}
		fault("parts")
		return errors.Join(audit.Try(auditConfig(c)), tryParts(o.Version, c))
	}, func(state *handover.State) handover.Verdict {
		fault("read")
		again, err := o.Load() // the wait for a moment without calls may have been long
		if err != nil {
			return handover.Verdict{Error: err.Error()}
		}
		c = again
		verdict, err := judge(state, c)
		if err != nil {
			return handover.Verdict{Error: err.Error()}
		}
		return verdict
	})
}

// tryParts makes the parts that may refuse a configuration and have no effects outside this process.
func tryParts(version string, c config.Config) error {
	var errs []error
	if c.Upstream != "" {
		upstream, err := cri.NewUpstream(c.Upstream, 0)
		if errs = append(errs, err); err == nil {
			upstream.Close() //nolint:errcheck // was only a trial
		}
	}
	if c.Traces.Endpoint != "" {
		tracer, err := newTracer(context.Background(), version, c, slog.New(slog.DiscardHandler))
		if errs = append(errs, err); err == nil {
			tracer.Close(context.Background()) //nolint:errcheck // there are no spans
		}
	}
	return errors.Join(errs...)
}

// judge reads a whole state and returns what this program would do with it.
func judge(state *handover.State, c config.Config) (handover.Verdict, error) {
	var own processState
	if err := state.Get(processPart, &own); err != nil {
		return handover.Verdict{}, err
	}
	if err := errors.Join(own.mayUse(c.StateDir), own.tryToListen(c)); err != nil {
		return handover.Verdict{}, err
	}
	if exec := state.Parts[execPart]; exec != nil {
		if err := execproc.CheckState(exec); err != nil {
			return handover.Verdict{}, err
		}
	}
	streams := state.Parts[streamsPart]
	if streams == nil {
		return handover.Verdict{}, nil
	}
	carried, refused, err := streaming.CheckState(streams)
	verdict := handover.Verdict{Carried: carried, Ended: lines(refused), Refused: map[string]string{}}
	for _, r := range refused {
		verdict.Refused[r.ID] = r.Err.Error()
	}
	return verdict, err
}

// lines has a line for each session, with the reason why it is not carried.
func lines(refused []streaming.Refusal) (all []string) {
	for _, r := range refused {
		all = append(all, r.String())
	}
	return all
}

// tryToListen opens and closes a listener on each address that differs from the running program's.
func (s processState) tryToListen(c config.Config) error {
	for _, socket := range []struct {
		key, address string
		inherited    socketState
	}{{"listen", c.Listen, s.CRI}, {"admin", c.Admin, s.Admin}} {
		if socket.address == "" {
			continue
		}
		path, err := endpoint.Path(socket.address)
		if err == nil && path == socket.inherited.Place.Path {
			continue
		}
		var listener net.Listener
		if err == nil {
			listener, err = endpoint.Listen(path)
		}
		if err != nil {
			return fmt.Errorf("%s: %w", socket.key, err)
		}
		listener.Close() //nolint:errcheck // was only a trial
	}
	for _, tcp := range []struct {
		key, address string
		inherited    addressState
	}{{"stream_address", c.StreamAddress, s.Streams}, {"metrics_address", c.MetricsAddress, s.Metrics}} {
		if tcp.address == "" || tcp.address == tcp.inherited.Address {
			continue
		}
		listener, err := net.Listen("tcp", tcp.address)
		if err != nil {
			return fmt.Errorf("%s: %w", tcp.key, err)
		}
		listener.Close() //nolint:errcheck // was only a trial
	}
	return nil
}
