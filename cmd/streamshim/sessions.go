package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"
	"golang.org/x/term"

	"github.com/streamshim/streamshim/pkg/admin"
	"github.com/streamshim/streamshim/pkg/asciicast"
	"github.com/streamshim/streamshim/pkg/config"
	"github.com/streamshim/streamshim/pkg/endpoint"
	"github.com/streamshim/streamshim/pkg/session"
	"github.com/streamshim/streamshim/pkg/session/recording"
)

func newSessionsCommand() *cobra.Command {
	command := &cobra.Command{
		Use:   "sessions",
		Short: "List, watch and end live sessions; play recordings",
		Long: `sessions talks to a running "streamshim serve" through its admin socket, which only root may open.
An ID may be shortened as long as it is unique.`,
		Args: cobra.NoArgs,
	}
	address := command.PersistentFlags().String("admin", "", "admin `socket` of the running streamshim (default: what its configuration says)")
	file := command.PersistentFlags().String("config", "", "TOML configuration `file` of the running streamshim (default "+config.DefaultFile+" when it exists)")
	withClient := func(run func(cmd *cobra.Command, c *admin.Client, args []string) error) func(*cobra.Command, []string) error {
		return func(cmd *cobra.Command, args []string) error {
			path, err := adminSocket(*address, *file)
			if err != nil {
				return err
			}
			c := admin.NewClient(path)
			defer c.Close()
			return run(cmd, c, args)
		}
	}
	command.AddCommand(newListCommand(withClient), newShowCommand(withClient), newKillCommand(withClient),
		newWatchCommand(withClient), newRecordingsCommand(withClient), newReplayCommand(withClient))
	return command
}

// adminSocket returns the path of the admin socket: that of the address, or if that is empty the configured one.
func adminSocket(address, file string) (string, error) {
	if address == "" {
		c, err := (&settings{file: file}).read(nil)
		if err != nil {
			return "", fmt.Errorf("%w; --admin names the socket without it", err)
		}
		if c.Admin == "" {
			return "", errors.New("streamshim's configuration disables the admin socket (admin = \"\")")
		}
		address = c.Admin
	}
	path, err := endpoint.Path(address)
	if err != nil {
		return "", fmt.Errorf("--admin: %w", err)
	}
	return path, nil
}

type clientCommand = func(func(cmd *cobra.Command, c *admin.Client, args []string) error) func(*cobra.Command, []string) error

// listInterval is how often "list --watch" asks for the sessions.
const listInterval = time.Second

func newListCommand(withClient clientCommand) *cobra.Command {
	command := &cobra.Command{
		Use:     "list",
		Aliases: []string{"ls"},
		Short:   "List the live sessions, oldest first",
		Args:    cobra.NoArgs,
	}
	output := command.Flags().StringP("output", "o", "", "json or wide")
	watch := command.Flags().BoolP("watch", "w", false, "repeat until interrupted: on a terminal every second, otherwise whenever a session begins or ends")
	command.RunE = withClient(func(cmd *cobra.Command, c *admin.Client, _ []string) error {
		if !slices.Contains([]string{"", "json", "wide"}, *output) {
			return fmt.Errorf("--output %q is neither json nor wide", *output)
		}
		return list(cmd, c, *output, *watch)
	})
	return command
}

func list(cmd *cobra.Command, c *admin.Client, output string, watch bool) error {
	out := cmd.OutOrStdout()
	screen := watch && output != "json" && isTerminal(out)
	ctx := cmd.Context()
	if watch {
		var stop context.CancelFunc
		ctx, stop = untilSignal(ctx)
		defer stop()
	}
	ticker := time.NewTicker(listInterval)
	defer ticker.Stop()
	last, answered := "none yet", time.Time{}
	for {
		sessions, err := c.List(ctx)
		switch {
		case watch && ctx.Err() != nil:
			return nil
		case err != nil && time.Since(answered) < watchAgain: // another program takes over, or streamshim is started again
			select {
			case <-ticker.C:
			case <-ctx.Done():
			}
			continue
		case err != nil:
			return err
		}
		answered = time.Now()
		var ids strings.Builder
		for _, s := range sessions {
			ids.WriteString(s.ID)
		}
		if screen || ids.String() != last {
			if screen {
				io.WriteString(out, "\x1b[H\x1b[2J") //nolint:errcheck // seen below
			}
			if err := printSessions(out, sessions, output); err != nil {
				return err
			}
		}
		last = ids.String()
		if !watch {
			return nil
		}
		select {
		case <-ticker.C:
		case <-ctx.Done():
			return nil
		}
	}
}

func printSessions(out io.Writer, sessions []admin.Session, output string) error {
	if output == "json" {
		return session.WriteJSON(out, admin.SessionList{Sessions: sessions})
	}
	table := tabwriter.NewWriter(out, 0, 0, 2, ' ', 0)
	columns := []string{"ID", "KIND", "POD", "CONTAINER", "COMMAND", "TTY", "PROTOCOL", "CLIENT", "AGE", "IDLE", "IN", "OUT"}
	if output == "wide" {
		columns = append(columns, "PHASE", "PID", "USER", "CONTAINER ID", "AUDIT ID (UNVERIFIED)")
	}
	fmt.Fprintln(table, strings.Join(columns, "\t"))
	for _, s := range sessions {
		row := []string{
			s.ID, string(s.Kind), orDash(strings.Trim(s.PodNamespace+"/"+s.PodName, "/")), orDash(s.Container),
			orDash(shorten(strings.Join(s.Command, " "), maxCommandColumn)), strconv.FormatBool(s.TTY),
			strings.TrimSuffix(s.Protocol, ".channel.k8s.io"), s.Peer,
			age(s.Age), age(s.Idle), bytesText(s.BytesIn), bytesText(s.BytesOut),
		}
		if output == "wide" {
			user := "-"
			if s.User != nil {
				user = fmt.Sprintf("%d:%d", s.User.UID, s.User.GID)
			}
			row = append(row, string(s.Phase), orDash(strings.TrimPrefix(strconv.Itoa(s.PID), "0")), user,
				orDash(shorten(s.ContainerID, 13)), orDash(s.AuditID))
		}
		for i := range row {
			row[i] = session.Printable(row[i])
		}
		fmt.Fprintln(table, strings.Join(row, "\t"))
	}
	return table.Flush()
}

const maxCommandColumn = 40

// oneSession requires one ID. Its error says where to find it.
func oneSession(_ *cobra.Command, args []string) error {
	if len(args) != 1 {
		return errors.New("name one session by its ID, as \"streamshim sessions list\" shows it; it may be shortened")
	}
	return nil
}

// sessionIDs completes IDs from the live sessions, with a description of each.
func sessionIDs(cmd *cobra.Command, args []string, _ string) ([]string, cobra.ShellCompDirective) {
	address, addressErr := cmd.Flags().GetString("admin")
	file, fileErr := cmd.Flags().GetString("config")
	path, err := adminSocket(address, file)
	if len(args) > 0 || errors.Join(addressErr, fileErr, err) != nil {
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	ctx, cancel := context.WithTimeout(context.Background(), completionTimeout)
	defer cancel()
	c := admin.NewClient(path)
	defer c.Close()
	sessions, err := c.List(ctx)
	if err != nil {
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	var ids []string
	for _, s := range sessions {
		ids = append(ids, s.ID+"\t"+session.Printable(string(s.Kind)+" "+s.PodNamespace+"/"+s.PodName+" "+s.Container))
	}
	return ids, cobra.ShellCompDirectiveNoFileComp
}

// completionTimeout bounds how long a shell waits for completions.
const completionTimeout = 2 * time.Second

func newShowCommand(withClient clientCommand) *cobra.Command {
	return &cobra.Command{
		Use:               "show ID",
		Short:             "Print everything about one session, as JSON",
		Args:              oneSession,
		ValidArgsFunction: sessionIDs,
		RunE: withClient(func(cmd *cobra.Command, c *admin.Client, args []string) error {
			s, err := c.Show(cmd.Context(), args[0])
			if err != nil {
				return err
			}
			return session.WriteJSON(cmd.OutOrStdout(), s)
		}),
	}
}

func newKillCommand(withClient clientCommand) *cobra.Command {
	command := &cobra.Command{
		Use:   "kill ID",
		Short: "End a session, or signal its process",
		Long: `kill ends a session. Its client is told that an operator ended it, and its process is treated as if the client had gone
(exec.on_disconnect). With --signal, the session stays, and its process gets the signal.`,
		Args:              oneSession,
		ValidArgsFunction: sessionIDs,
	}
	name := command.Flags().StringP("signal", "s", "", "`name` or number of a signal for the process, such as INT or 15")
	command.RunE = withClient(func(cmd *cobra.Command, c *admin.Client, args []string) error {
		var request admin.KillRequest
		if *name != "" {
			number, err := parseSignal(*name)
			if err != nil {
				return err
			}
			request.Signal = int(number)
		}
		return c.Kill(cmd.Context(), args[0], request)
	})
	return command
}

func parseSignal(name string) (syscall.Signal, error) {
	if number, err := strconv.Atoi(name); err == nil && number > 0 && number <= 64 {
		return syscall.Signal(number), nil
	}
	name = strings.ToUpper(name)
	if number := unix.SignalNum("SIG" + strings.TrimPrefix(name, "SIG")); number != 0 {
		return number, nil
	}
	return 0, fmt.Errorf("%q is no signal", name)
}

func newRecordingsCommand(withClient clientCommand) *cobra.Command {
	command := &cobra.Command{
		Use:   "recordings",
		Short: "List the recordings on this node, newest first",
		Args:  cobra.NoArgs,
	}
	output := command.Flags().StringP("output", "o", "", "json")
	command.RunE = withClient(func(cmd *cobra.Command, c *admin.Client, _ []string) error {
		if *output != "" && *output != "json" {
			return fmt.Errorf("--output %q is not json", *output)
		}
		recordings, err := c.Recordings(cmd.Context())
		if err != nil {
			return err
		}
		if *output == "json" {
			return session.WriteJSON(cmd.OutOrStdout(), admin.RecordingList{Recordings: recordings})
		}
		table := tabwriter.NewWriter(cmd.OutOrStdout(), 0, 0, 2, ' ', 0)
		fmt.Fprintln(table, "STARTED\tPOD\tCONTAINER\tSIZE\tNAME")
		for _, r := range recordings {
			fmt.Fprintf(table, "%s\t%s\t%s\t%s\t%s\n", r.Started.Format(time.RFC3339),
				session.Printable(r.PodNamespace+"/"+r.PodName), session.Printable(r.Container), bytesText(r.Size), session.Printable(r.Name))
		}
		return table.Flush()
	})
	return command
}

func newReplayCommand(withClient clientCommand) *cobra.Command {
	command := &cobra.Command{
		Use:   "replay FILE|NAME",
		Short: "Play a recording in this terminal",
		Long: `replay plays a recording in this terminal, with its pauses. It is a file, or the name of one in "sessions recordings".
The output controls this terminal. For a container that is not trusted, --escapes=show prints escape sequences instead
of obeying them.`,
		Args: func(_ *cobra.Command, args []string) error {
			if len(args) != 1 {
				return errors.New("name one recording, a file that ends with " + recording.Suffix)
			}
			return nil
		},
	}
	speed := command.Flags().Float64("speed", 1, "`times` as fast")
	idle := command.Flags().Duration("idle", 0, "longest pause; 0 keeps the recording's")
	visible := addVisible(command)
	command.RunE = func(cmd *cobra.Command, args []string) error {
		if *speed <= 0 {
			return errors.New("--speed must be more than 0")
		}
		var file io.ReadCloser
		file, err := os.Open(args[0])
		if errors.Is(err, os.ErrNotExist) && !strings.Contains(args[0], "/") {
			err = withClient(func(cmd *cobra.Command, c *admin.Client, args []string) error {
				file, err = c.Recording(cmd.Context(), args[0])
				return err
			})(cmd, args)
		}
		if err != nil {
			return err
		}
		defer file.Close() //nolint:errcheck // only read
		ctx, stop := untilSignal(cmd.Context())
		defer stop()
		defer context.AfterFunc(ctx, func() { file.Close() })() // unblocks a read of a FIFO
		defer borrowTerminal(os.Stdin, cmd.OutOrStdout())()
		err = play(ctx, visible(cmd.OutOrStdout()), file, &pace{speed: *speed, idle: *idle})
		if ctx.Err() != nil {
			return nil
		}
		return err
	}
	return command
}

// pace is how fast a recording is played.
type pace struct {
	speed float64
	idle  time.Duration // 0 is no limit
	last  time.Duration
}

func (p *pace) wait(ctx context.Context, at time.Duration) error {
	pause := at - p.last
	p.last = at
	if p.idle > 0 {
		pause = min(pause, p.idle)
	}
	pause = time.Duration(float64(pause) / p.speed)
	if pause <= 0 {
		return ctx.Err()
	}
	timer := time.NewTimer(pause)
	defer timer.Stop()
	select {
	case <-timer.C:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// play writes the output in an asciicast, with its pauses, or without a pace as it arrives. It writes markers, such as gaps
// and the end, in brackets to stderr.
func play(ctx context.Context, out io.Writer, from io.Reader, p *pace) error {
	cast, err := asciicast.NewReader(from)
	if err != nil {
		return err
	}
	for {
		event, err := cast.Next()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
		if p != nil {
			if err := p.wait(ctx, event.Time); err != nil {
				return err
			}
		}
		switch event.Code {
		case asciicast.Output:
			if _, err := io.WriteString(out, event.Data); err != nil {
				return err
			}
		case asciicast.Marker:
			printRemark(event.Data)
		}
	}
}

func isTerminal(w io.Writer) bool {
	file, ok := w.(*os.File)
	return ok && term.IsTerminal(int(file.Fd()))
}

func orDash(s string) string {
	if s == "" {
		return "-"
	}
	return s
}

func shorten(s string, most int) string {
	if runes := []rune(s); len(runes) > most {
		return string(runes[:most-1]) + "…"
	}
	return s
}

// age returns a duration in a short form, such as 90s or 3h05m.
func age(seconds float64) string {
	switch d := time.Duration(seconds * float64(time.Second)); {
	case d < 2*time.Minute:
		return fmt.Sprintf("%ds", int(d.Seconds()))
	case d < 2*time.Hour:
		return fmt.Sprintf("%dm", int(d.Minutes()))
	case d < 48*time.Hour:
		return fmt.Sprintf("%dh%02dm", int(d.Hours()), int(d.Minutes())%60)
	default:
		return fmt.Sprintf("%dd", int(d.Hours())/24)
	}
}

func bytesText(n int64) string {
	const unit = 1024
	if n < unit {
		return strconv.FormatInt(n, 10)
	}
	value, prefix := float64(n)/unit, 0
	for value >= unit && prefix < 4 {
		value /= unit
		prefix++
	}
	return fmt.Sprintf("%.1f%ci", value, "KMGTP"[prefix])
}
