package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"time"

	"github.com/spf13/cobra"

	"github.com/streamshim/streamshim/pkg/admin"
	"github.com/streamshim/streamshim/pkg/config"
)

const (
	// upgradePoll is how often "upgrade" asks for the progress.
	upgradePoll = 50 * time.Millisecond
	// upgradeTimeout is more than all limits of a hand-over together.
	upgradeTimeout = 2 * time.Minute
	// requestTimeout bounds one request, which may wait in the socket's queue until the new program serves.
	requestTimeout = 20 * time.Second
)

// Exit codes of "upgrade", for packages.
const (
	exitUnknown     = 3 // the running streamshim is too old for hand-overs
	exitUnreachable = 4 // the running streamshim cannot be reached
)

// exitError is an error with an exit code.
type exitError struct {
	error
	code int
}

func (e *exitError) Unwrap() error { return e.error }

func newUpgradeCommand() *cobra.Command {
	command := &cobra.Command{
		Use:   "upgrade",
		Short: "Replace the running version by the installed one, with all sessions",
		Long: `upgrade makes the installed program take over from the running "streamshim serve", in the same process and with all its
sessions, commands, forwarded connections and sockets. Clients notice only a pause. If the installed program is the same
version, it takes over too, which applies settings that need a restart.

With --dry-run no session is touched; the pause and the size of the state are estimates, from the time that the
installed program has just taken to start and from the number of sessions. The last hand-over is told of as well.

The installed program first runs beside the running one, to check that it accepts the configuration and the state. If
anything fails before it takes over, the running one continues as before, and upgrade says why.

The exit code is 0 when the installed program has taken over, or with --dry-run would take over; 3 when the running one
is too old to be replaced without a restart; 4 when it cannot be reached; and 1 otherwise.`,
		Args: cobra.NoArgs,
	}
	flags := command.Flags()
	dry := flags.Bool("dry-run", false, "only say what would happen")
	address := flags.String("admin", "", "admin `socket` of the running streamshim (default: what its configuration says)")
	file := flags.String("config", "", "TOML configuration `file` of the running streamshim (default "+config.DefaultFile+" when it exists)")
	command.RunE = func(cmd *cobra.Command, _ []string) error {
		path, err := adminSocket(*address, *file)
		if err != nil {
			return &exitError{err, exitUnreachable}
		}
		c := admin.NewClient(path)
		defer c.Close()
		ctx, cancel := context.WithTimeout(cmd.Context(), upgradeTimeout)
		defer cancel()
		last, err := upgrade(ctx, c, *dry)
		if err != nil {
			return err
		}
		return printHandover(cmd.OutOrStdout(), last)
	}
	return command
}

// upgrade asks for a hand-over and waits for its end.
func upgrade(ctx context.Context, c *admin.Client, dry bool) (admin.Handover, error) {
	begun, err := c.HandOver(ctx, admin.HandoverRequest{DryRun: dry})
	var known *admin.Error
	switch {
	case errors.As(err, &known) && (known.Code == http.StatusNotFound || known.Code == http.StatusMethodNotAllowed):
		return begun, &exitError{errors.New("the running version of streamshim cannot be replaced without a restart"), exitUnknown}
	case err != nil && known == nil:
		return begun, &exitError{err, exitUnreachable}
	case err != nil:
		return begun, err
	}
	ticker := time.NewTicker(upgradePoll)
	defer ticker.Stop()
	for {
		select {
		case <-ticker.C:
		case <-ctx.Done():
			return begun, fmt.Errorf("the hand-over has not ended: %w", context.Cause(ctx))
		}
		last, err := askHandover(ctx, c)
		switch {
		case errors.As(err, &known), err == nil && last.ID != begun.ID:
			return begun, errors.New("the new program ended after it had taken over, and streamshim was started again: its log says why")
		case err != nil: // the connection has ended with the old program
		case last.Phase != admin.HandoverRunning:
			return last, nil
		}
	}
}

func askHandover(ctx context.Context, c *admin.Client) (admin.Handover, error) {
	ctx, cancel := context.WithTimeout(ctx, requestTimeout)
	defer cancel()
	return c.LastHandover(ctx)
}

func printHandover(to io.Writer, h admin.Handover) error {
	if h.Phase == admin.HandoverFailed {
		return fmt.Errorf("streamshim %s goes on as it was: %s", h.From, h.Error)
	}
	if h.DryRun {
		fmt.Fprintf(to, "streamshim %s would take over from %s: %d sessions would go on, %d would end\n", h.To, h.From, h.Carried, len(h.EndedSessions))
	} else {
		fmt.Fprintf(to, "streamshim %s has taken over from %s: %d sessions go on, %d have ended; all stood still for %v (%s)\n",
			h.To, h.From, h.Carried, len(h.EndedSessions), pauseText(h), sizeText(h))
	}
	for _, line := range h.EndedSessions {
		fmt.Fprintf(to, "  %s\n", line)
	}
	if h.DryRun {
		printEstimate(to, h)
	}
	return nil
}

// printEstimate says what a hand-over would cost, and what the last one did. A streamshim of an older version does not say.
func printEstimate(to io.Writer, h admin.Handover) {
	if h.Descriptors > 0 {
		fmt.Fprintf(to, "all would stand still for about %v (state of about %s; %d descriptors are open, of %d)\n",
			pauseText(h), bytesText(int64(h.State)), h.Descriptors, h.DescriptorLimit)
	}
	if h.DescriptorLimit > 0 && 2*uint64(h.Descriptors) > h.DescriptorLimit {
		fmt.Fprintln(to, "the limit of descriptors may not suffice: in a hand-over most are open twice for a moment (LimitNOFILE of the service)")
	}
	if last := h.Last; last != nil {
		fmt.Fprintf(to, "the last hand-over, from %s to %s at %s, took %v with %d sessions (%s)\n",
			last.From, last.To, last.Began.Local().Format(time.DateTime), pauseText(*last), last.Carried, sizeText(*last))
	}
}

func pauseText(h admin.Handover) time.Duration {
	return time.Duration(h.Pause * float64(time.Second)).Round(time.Millisecond)
}

// sizeText is how much has gone over.
func sizeText(h admin.Handover) string {
	if h.Descriptors == 0 { // from a version that does not say
		return "state of " + bytesText(int64(h.State))
	}
	return fmt.Sprintf("state of %s, %d descriptors", bytesText(int64(h.State)), h.Descriptors)
}
