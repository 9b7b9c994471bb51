package main

import (
	"fmt"
	"io"
	"runtime"
	"runtime/debug"

	"github.com/spf13/cobra"

	"github.com/streamshim/streamshim/pkg/session"
)

// version is set by the linker (see the Makefile).
var version = "devel"

func newVersionCommand() *cobra.Command {
	command := &cobra.Command{
		Use:   "version",
		Short: "Print the version",
		Args:  cobra.NoArgs,
	}
	output := command.Flags().StringP("output", "o", "", "json, or one line for people")
	command.RunE = func(cmd *cobra.Command, _ []string) error {
		switch *output {
		case "":
			_, err := io.WriteString(cmd.OutOrStdout(), versionLine())
			return err
		case "json":
			return session.WriteJSON(cmd.OutOrStdout(), currentVersion())
		}
		return fmt.Errorf("--output %q is not json", *output)
	}
	return command
}

// buildVersion is what "version --output json" prints. Fields are added, never renamed.
type buildVersion struct {
	Version  string `json:"version"`
	Revision string `json:"revision,omitempty"` // the commit, if the Go tool has recorded it
	Go       string `json:"go"`
	OS       string `json:"os"`
	Arch     string `json:"arch"`
}

func currentVersion() buildVersion {
	return buildVersion{Version: version, Revision: revision(), Go: runtime.Version(), OS: runtime.GOOS, Arch: runtime.GOARCH}
}

func versionLine() string {
	v := currentVersion()
	if v.Revision != "" {
		v.Version += " " + v.Revision[:min(12, len(v.Revision))]
	}
	return fmt.Sprintf("streamshim %s (%s %s/%s)\n", v.Version, v.Go, v.OS, v.Arch)
}

// revision returns the commit that the binary was built from, if the Go tool has recorded it.
func revision() string {
	info, ok := debug.ReadBuildInfo()
	if !ok {
		return ""
	}
	for _, s := range info.Settings {
		if s.Key == "vcs.revision" {
			return s.Value
		}
	}
	return ""
}
