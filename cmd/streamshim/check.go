package main

import (
	"errors"
	"fmt"
	"io"
	"text/tabwriter"

	"github.com/spf13/cobra"

	"github.com/streamshim/streamshim/pkg/check"
)

func newCheckCommand() *cobra.Command {
	command := &cobra.Command{
		Use:   "check",
		Short: "Check whether this node is ready for streamshim, and say how to fix what is not",
		Long: `check examines the runtime behind streamshim, its OCI runtime, the kernel, the sockets and the kubelet's
configuration. For each problem it says what to do. It changes nothing. It fails if streamshim could not work.`,
		Args: cobra.NoArgs,
	}
	settings := addSettings(command.Flags())
	kubeletConfig := command.Flags().String("kubelet-config", check.DefaultKubeletConfig, "the kubelet's configuration `file`")
	command.RunE = func(cmd *cobra.Command, _ []string) error {
		c, err := settings.load(cmd.Flags())
		if err != nil {
			return err
		}
		if c.Upstream == "" {
			c.Upstream, _ = findUpstream() // if there is none, a check reports it
		}
		bad, err := printChecks(cmd.OutOrStdout(), check.Run(cmd.Context(), c, *kubeletConfig))
		if err != nil {
			return err
		}
		if bad > 0 {
			return errors.New("this node is not ready, see the checks that failed")
		}
		return nil
	}
	return command
}

// printChecks prints results as a table and counts those that failed.
func printChecks(to io.Writer, results []check.Result) (bad int, err error) {
	table := tabwriter.NewWriter(to, 0, 0, 2, ' ', 0)
	for _, r := range results {
		fmt.Fprintf(table, "%s\t%s\t%s\n", r.Level, r.Name, r.Detail)
		if r.Level != check.OK && r.Fix != "" {
			fmt.Fprintf(table, "\t\t-> %s\n", r.Fix)
		}
		if r.Level == check.Failed {
			bad++
		}
	}
	return bad, table.Flush()
}
