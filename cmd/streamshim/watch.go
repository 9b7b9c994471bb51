package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"time"

	"github.com/spf13/cobra"

	"github.com/streamshim/streamshim/pkg/admin"
	"github.com/streamshim/streamshim/pkg/asciicast"
	"github.com/streamshim/streamshim/pkg/session"
)

const (
	// watchAgain is how long a watch that has ended with its program is asked for again: a new program may end and be started
	// by systemd.
	watchAgain = 30 * time.Second
	// watchPause is between two attempts. The first has none: it waits in the socket's queue.
	watchPause = 200 * time.Millisecond
)

func newWatchCommand(withClient clientCommand) *cobra.Command {
	command := &cobra.Command{
		Use:   "watch ID",
		Short: "See what a session's terminal shows from now on",
		Long: `watch copies what a session's terminal shows, from now on, until the session ends or ^C. It is read-only,
and never slows the session: what is too much for the watcher is skipped. With notify_watch the
session's user is told. A program that draws the whole screen is seen in full at its next redraw.

It goes on when another version of streamshim takes over, and says what it has missed meanwhile.

What the session shows speaks to this terminal as it does to its user's; of a container that is not
trusted, --escapes=show prints escapes instead of obeying them.`,
		Args:              oneSession,
		ValidArgsFunction: sessionIDs,
	}
	raw := command.Flags().Bool("asciicast", false, "write an asciicast v2 instead, with the times")
	visible := addVisible(command)
	command.RunE = withClient(func(cmd *cobra.Command, c *admin.Client, args []string) error {
		ctx, stop := untilSignal(cmd.Context())
		defer stop()
		var to screen = &castScreen{out: cmd.OutOrStdout(), began: time.Now()}
		if !*raw {
			defer borrowTerminal(os.Stdin, cmd.OutOrStdout())()
			to = terminalScreen{visible(cmd.OutOrStdout())}
		}
		err := watch(ctx, c, args[0], to)
		if ctx.Err() != nil {
			return nil
		}
		return err
	})
	return command
}

// screen shows asciicasts that follow each other.
type screen interface {
	// show shows one to its end.
	show(ctx context.Context, cast io.Reader) error
	// remark says something between two of them.
	remark(text string) error
}

// watch shows a session to its end, also when the program that serves it becomes another one.
func watch(ctx context.Context, c *admin.Client, id string, to screen) error {
	s, err := c.Show(ctx, id)
	if err != nil {
		return err
	}
	current, err := c.Watch(ctx, s.ID)
	if err != nil {
		return err
	}
	for {
		err := to.show(ctx, current)
		current.Close() //nolint:errcheck // it was read
		switch end := current.End(); {
		case ctx.Err() != nil:
			return nil //nolint:nilerr // ^C
		case end == "": // it is the screen that has failed
			return err
		case end == admin.WatchSessionEnded:
			return err
		case end == admin.WatchShutdown:
			return errors.New("streamshim has ended; the session goes on for no longer than shutdown.drain")
		}
		text := "streamshim: the watch was interrupted by a hand-over; "
		if current.End() != admin.WatchHandover {
			text = "streamshim: the watch was interrupted; "
			pauseWatch(ctx) // not at once again: it may be lost each time
		}
		next, err := continueWatch(ctx, c, s.ID, current.Name())
		switch {
		case isGone(err):
			return to.remark("streamshim: the session has ended, and its end was not seen")
		case err != nil:
			return err
		}
		if err := to.remark(text + missed(next, current)); err != nil {
			next.Close() //nolint:errcheck // not read
			return err
		}
		current = next
	}
}

// missed says what was not seen between two watches.
func missed(next, before *admin.Watch) string {
	switch n, known := next.Missed(before); {
	case !known:
		return "what the session has shown meanwhile is missing here"
	case n == 0:
		return "nothing is missing"
	default:
		return fmt.Sprintf("about %d bytes are missing here", n)
	}
}

// continueWatch watches a session again. It waits for the program that serves it.
func continueWatch(ctx context.Context, c *admin.Client, id, before string) (*admin.Watch, error) {
	limit := time.Now().Add(watchAgain)
	for {
		next, err := c.WatchAgain(ctx, id, before)
		if err == nil || isGone(err) || ctx.Err() != nil || time.Now().After(limit) {
			return next, err
		}
		pauseWatch(ctx)
	}
}

// pauseWatch waits for watchPause, or until the context is done.
func pauseWatch(ctx context.Context) {
	select {
	case <-time.After(watchPause):
	case <-ctx.Done():
	}
}

// isGone tells whether streamshim has answered that there is no such session.
func isGone(err error) bool {
	var answer *admin.Error
	return errors.As(err, &answer) && answer.Code == http.StatusNotFound
}

// terminalScreen is a terminal.
type terminalScreen struct{ out io.Writer }

func (s terminalScreen) show(ctx context.Context, cast io.Reader) error {
	return play(ctx, s.out, cast, nil)
}

func (s terminalScreen) remark(text string) error {
	printRemark(text)
	return nil
}

// castScreen writes all asciicasts as one, whose time goes on.
type castScreen struct {
	out   io.Writer
	began time.Time
	cast  *asciicast.Writer // nil until the first
}

func (s *castScreen) show(_ context.Context, from io.Reader) error {
	cast, err := asciicast.NewReader(from)
	if err != nil {
		return err
	}
	header, begin := cast.Header, time.Since(s.began)
	if s.cast == nil {
		s.began, begin = time.Now(), 0
		s.cast, err = asciicast.NewWriter(s.out, header)
	} else {
		err = s.cast.Write(begin, asciicast.Resize, []byte(asciicast.Size(header.Width, header.Height)))
	}
	for err == nil {
		var event asciicast.Event
		if event, err = cast.Next(); err == nil {
			err = s.cast.Write(begin+event.Time, event.Code, []byte(event.Data))
		}
	}
	if errors.Is(err, io.EOF) {
		return nil
	}
	return err
}

func (s *castScreen) remark(text string) error {
	if s.cast == nil {
		return nil // nothing was shown yet
	}
	return s.cast.Write(time.Since(s.began), asciicast.Marker, []byte(text))
}

// printRemark shows a remark in brackets, on the terminal's error stream.
func printRemark(text string) {
	fmt.Fprintf(os.Stderr, "\r\n[%s]\r\n", session.Printable(text))
}
