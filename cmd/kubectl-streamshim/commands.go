package main

import (
	"errors"
	"fmt"
	"io"
	"slices"
	"strconv"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	"github.com/streamshim/streamshim/pkg/admin"
	"github.com/streamshim/streamshim/pkg/session"
)

func newListCommand(c *cluster) *cobra.Command {
	command := &cobra.Command{Use: "list", Aliases: []string{"ls", "sessions"}, Short: "List the live sessions, oldest first", Args: cobra.NoArgs}
	namespace := command.Flags().StringP("namespace", "n", "", "only those in pods of this `namespace`")
	pod := command.Flags().String("pod", "", "only those in this `pod`")
	output := command.Flags().StringP("output", "o", "", "json")
	watch := command.Flags().BoolP("watch", "w", false, "repeat until interrupted")
	interval := command.Flags().Duration("interval", 3*time.Second, "`time` after which --watch repeats")
	command.RunE = func(cmd *cobra.Command, _ []string) error {
		for {
			sessions, err := c.sessions(cmd.Context())
			if err != nil && sessions == nil {
				return err
			}
			sessions = slices.DeleteFunc(sessions, func(s on[admin.Session]) bool {
				return *namespace != "" && s.item.PodNamespace != *namespace || *pod != "" && s.item.PodName != *pod
			})
			slices.SortStableFunc(sessions, func(a, b on[admin.Session]) int { return a.item.Started.Compare(b.item.Started) })
			if printErr := printSessions(cmd.OutOrStdout(), sessions, *output); printErr != nil {
				return printErr
			}
			if !*watch {
				return err // the errors of nodes that have not answered
			}
			if err != nil {
				fmt.Fprintln(cmd.ErrOrStderr(), printableLines(err.Error()))
			}
			select {
			case <-time.After(*interval):
			case <-cmd.Context().Done():
				return nil
			}
		}
	}
	return command
}

// nodeSession is a session with its node, for JSON.
type nodeSession struct {
	Node string `json:"node"`
	admin.Session
}

func printSessions(out io.Writer, sessions []on[admin.Session], output string) error {
	switch output {
	case "json":
		list := struct {
			Sessions []nodeSession `json:"sessions"`
		}{[]nodeSession{}}
		for _, s := range sessions {
			list.Sessions = append(list.Sessions, nodeSession{s.agent.node, s.item})
		}
		return session.WriteJSON(out, list)
	case "":
	default:
		return fmt.Errorf("--output %q is not json", output)
	}
	table := tabwriter.NewWriter(out, 0, 0, 2, ' ', 0)
	fmt.Fprintln(table, "NAMESPACE\tPOD\tCONTAINER\tKIND\tTTY\tCOMMAND\tAGE\tNODE\tID")
	for _, s := range sessions {
		i := s.item
		fmt.Fprintf(table, "%s\t%s\t%s\t%s\t%v\t%s\t%s\t%s\t%s\n", session.Printable(i.PodNamespace), session.Printable(i.PodName), session.Printable(i.Container),
			i.Kind, i.TTY, session.Printable(strings.Join(i.Command, " ")), time.Duration(i.Age*float64(time.Second)).Round(time.Second), s.agent.node, i.ID[:min(len(i.ID), 8)])
	}
	return table.Flush()
}

func newShowCommand(c *cluster) *cobra.Command {
	return &cobra.Command{Use: "show ID", Short: "Print everything about one session, as JSON", Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			s, err := c.session(cmd.Context(), args[0])
			if err != nil {
				return err
			}
			return session.WriteJSON(cmd.OutOrStdout(), nodeSession{s.agent.node, s.item})
		}}
}

func newWatchCommand(c *cluster) *cobra.Command {
	command := &cobra.Command{Use: "watch ID", Short: "Show what a session's terminal shows from now on", Args: cobra.ExactArgs(1)}
	escapes := addEscapes(command)
	command.RunE = func(cmd *cobra.Command, args []string) error {
		s, err := c.session(cmd.Context(), args[0])
		if err != nil {
			return err
		}
		return c.attach(cmd.Context(), s.agent, cmd.OutOrStdout(), append([]string{"watch", s.item.ID}, escapes()...)...)
	}
	return command
}

func newEndCommand(c *cluster) *cobra.Command {
	command := &cobra.Command{Use: "end ID", Aliases: []string{"kill"}, Short: "End a session, or signal its process", Args: cobra.ExactArgs(1)}
	signal := command.Flags().StringP("signal", "s", "", "`name` or number of a signal for the process, instead of ending the session")
	command.RunE = func(cmd *cobra.Command, args []string) error {
		s, err := c.session(cmd.Context(), args[0])
		if err != nil {
			return err
		}
		kill := []string{"kill", s.item.ID}
		if *signal != "" {
			kill = append(kill, "--signal="+*signal)
		}
		_, err = c.output(cmd.Context(), c.exec(s.agent, nil, kill...)...)
		return err
	}
	return command
}

func newRecordingsCommand(c *cluster) *cobra.Command {
	command := &cobra.Command{Use: "recordings", Short: "List the recordings on the nodes, newest first", Args: cobra.NoArgs}
	namespace := command.Flags().StringP("namespace", "n", "", "only those of pods in this `namespace`")
	command.RunE = func(cmd *cobra.Command, _ []string) error {
		recordings, err := c.recordings(cmd.Context())
		if err != nil && recordings == nil {
			return err
		}
		slices.SortStableFunc(recordings, func(a, b on[admin.Recording]) int { return b.item.Started.Compare(a.item.Started) })
		table := tabwriter.NewWriter(cmd.OutOrStdout(), 0, 0, 2, ' ', 0)
		fmt.Fprintln(table, "STARTED\tNAMESPACE\tPOD\tCONTAINER\tSIZE\tNODE\tNAME")
		for _, r := range recordings {
			if i := r.item; *namespace == "" || i.PodNamespace == *namespace {
				fmt.Fprintf(table, "%s\t%s\t%s\t%s\t%d\t%s\t%s\n", i.Started.Format(time.RFC3339), session.Printable(i.PodNamespace),
					session.Printable(i.PodName), session.Printable(i.Container), i.Size, r.agent.node, session.Printable(i.Name))
			}
		}
		return errors.Join(table.Flush(), err)
	}
	return command
}

func newReplayCommand(c *cluster) *cobra.Command {
	command := &cobra.Command{Use: "replay NAME", Short: "Play one of \"recordings\" in this terminal", Args: cobra.ExactArgs(1)}
	speed := command.Flags().Float64("speed", 1, "`times` as fast")
	idle := command.Flags().Duration("idle", 0, "longest pause; 0 keeps the recording's")
	escapes := addEscapes(command)
	command.RunE = func(cmd *cobra.Command, args []string) error {
		recordings, err := c.recordings(cmd.Context())
		for _, r := range recordings {
			if r.item.Name == args[0] {
				return c.attach(cmd.Context(), r.agent, cmd.OutOrStdout(), append([]string{"replay", r.item.Name,
					"--speed=" + strconv.FormatFloat(*speed, 'g', -1, 64), "--idle=" + idle.String()}, escapes()...)...)
			}
		}
		return errors.Join(fmt.Errorf("no recording %q on the nodes", args[0]), err)
	}
	return command
}

// addEscapes adds the flag --escapes, and returns a function that returns it for streamshim.
func addEscapes(command *cobra.Command) func() []string {
	value := command.Flags().String("escapes", "", "`show` prints a container's escape sequences instead of obeying them")
	return func() []string {
		if *value == "" {
			return nil
		}
		return []string{"--escapes=" + *value}
	}
}

// printableLines applies session.Printable to each line.
func printableLines(text string) string {
	lines := strings.Split(text, "\n")
	for i := range lines {
		lines[i] = session.Printable(lines[i])
	}
	return strings.Join(lines, "\n")
}
