package main

import (
	"fmt"
	"log/slog"
	"os"

	"github.com/spf13/cobra"

	"github.com/streamshim/streamshim/pkg/admin"
	"github.com/streamshim/streamshim/pkg/config"
	"github.com/streamshim/streamshim/pkg/ui"
)

func newUICommand() *cobra.Command {
	command := &cobra.Command{
		Use:   "ui",
		Short: "A page to see, watch and end live sessions and to play recordings, on a loopback address",
		Long: `ui serves a page with the live sessions of this node until it is interrupted, and prints its address. It talks
to a running "streamshim serve" through its admin socket, which only root may open. The address has a token in
it that works once: the browser tab that opens it first can see terminals and end sessions, until ui ends.
From another machine, forward the port with ssh -L.`,
		Args: cobra.NoArgs,
	}
	address := command.Flags().String("address", "127.0.0.1:0", "loopback `address` to serve on; port 0 takes any")
	socket := command.Flags().String("admin", "", "admin `socket` of the running streamshim (default: what its configuration says)")
	file := command.Flags().String("config", "", "TOML configuration `file` of the running streamshim (default "+config.DefaultFile+" when it exists)")
	metrics := command.Flags().String("metrics-address", "", "`address` of its metrics (default: what its configuration says)")
	command.RunE = func(cmd *cobra.Command, _ []string) error {
		path, err := adminSocket(*socket, *file)
		if err != nil {
			return err
		}
		if !cmd.Flags().Changed("metrics-address") {
			// Without it there are fewer figures: no reason not to begin.
			if c, err := (&settings{file: *file}).read(nil); err == nil {
				*metrics = c.MetricsAddress
			}
		}
		ctx, stop := untilSignal(cmd.Context())
		defer stop()
		client := admin.NewClient(path)
		defer client.Close()
		if _, err := client.List(ctx); err != nil {
			return err
		}
		server, err := ui.Listen(ui.Config{Admin: client, Metrics: *metrics, Log: slog.New(slog.NewTextHandler(os.Stderr, nil))}, *address)
		if err != nil {
			return err
		}
		fmt.Fprintln(cmd.OutOrStdout(), server.URL())
		return server.Serve(ctx)
	}
	return command
}
