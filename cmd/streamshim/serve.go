package main

import (
	"fmt"
	"os"
	"strings"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/streamshim/streamshim/pkg/config"
	"github.com/streamshim/streamshim/pkg/daemon"
)

func newServeCommand() *cobra.Command {
	command := &cobra.Command{
		Use:   "serve",
		Short: "Serve CRI on a Unix socket until SIGTERM",
		Long: `serve listens for CRI calls on --listen. It serves Exec, ExecSync, Attach and PortForward itself, and forwards all
other calls to --upstream. When it is ready, it prints one line and notifies systemd.

SIGTERM ends it, at the latest after shutdown.drain. Until then running sessions may continue, and as long as there are
any, new ones are accepted. Sessions that are left then end with a status that says so. A second SIGTERM ends it at once.

SIGHUP reads the configuration again and applies limits, rules, timeouts, log level, audit and recording, without
touching live sessions. A file with a mistake is rejected, and the old configuration stays. The log names settings that
need a restart. "streamshim upgrade" applies these too.

If another version has been installed over the running one, SIGHUP makes it take over, with all sessions: see
"streamshim upgrade --help".

Flags override the configuration file, which overrides the defaults.`,
		Args: cobra.NoArgs,
	}
	settings := addSettings(command.Flags())
	check := command.Flags().Bool("check-state", false, "say whether this program could take over from another one that asks for it")
	command.Flags().MarkHidden("check-state") //nolint:errcheck // the flag is there
	command.RunE = func(cmd *cobra.Command, _ []string) error {
		options := daemon.Options{
			Version: version, FindUpstream: findUpstream, Load: func() (config.Config, error) { return settings.load(cmd.Flags()) },
		}
		if *check {
			return daemon.Check(options)
		}
		return daemon.Serve(cmd.Context(), options)
	}
	return command
}

// defaultFile is a variable for tests.
var defaultFile = config.DefaultFile

// settings are the flags that serve and check share.
type settings struct {
	file  string
	flags config.Config
}

func addSettings(flags *pflag.FlagSet) *settings {
	s := &settings{flags: config.Default()}
	flags.StringVar(&s.file, "config", "", "TOML configuration `file` (default "+config.DefaultFile+" when it exists)")
	flags.StringVar(&s.flags.Listen, "listen", s.flags.Listen, "Unix `socket` on which CRI is served")
	flags.StringVar(&s.flags.Upstream, "upstream", "", "CRI `socket` of the container runtime (default: the first of "+strings.Join(upstreamPlaces, ", ")+" that exists)")
	flags.StringVar(&s.flags.StreamAddress, "stream-address", s.flags.StreamAddress, "loopback `address` of the streaming server")
	flags.StringVar(&s.flags.StateDir, "state-dir", s.flags.StateDir, "`directory` for files kept while processes run, on a tmpfs")
	flags.StringVar(&s.flags.Admin, "admin", s.flags.Admin, "Unix `socket` of \"streamshim sessions\", empty for none")
	flags.StringVar(&s.flags.MetricsAddress, "metrics-address", "", "`HOST:PORT` of /metrics, /healthz and /readyz (default off)")
	flags.StringVar(&s.flags.LogLevel, "log-level", s.flags.LogLevel, "debug, info, warn or error")
	flags.StringVar(&s.flags.LogFormat, "log-format", s.flags.LogFormat, "text or json")
	return s
}

// read returns the configuration from defaults, file and override, which may be nil. Once the default file was read, it
// must exist: a reload while it is moved away must not drop rules and audit.
func (s *settings) read(override func(*config.Config)) (config.Config, error) {
	c := config.Default()
	if s.file == "" {
		if _, err := os.Stat(defaultFile); err == nil {
			s.file = defaultFile
		}
	}
	if s.file != "" {
		err := c.Read(s.file, override)
		return c, err
	}
	if override != nil {
		override(&c)
	}
	return c, c.Validate()
}

// load returns the configuration from defaults, file and flags, in this order. Its upstream may be empty; see
// findUpstream.
func (s *settings) load(flags *pflag.FlagSet) (config.Config, error) {
	return s.read(func(c *config.Config) { s.override(c, flags) })
}

// override copies the flags that were given.
func (s *settings) override(c *config.Config, flags *pflag.FlagSet) {
	for name, copyFlag := range map[string]func(){
		"listen":          func() { c.Listen = s.flags.Listen },
		"upstream":        func() { c.Upstream = s.flags.Upstream },
		"stream-address":  func() { c.StreamAddress = s.flags.StreamAddress },
		"state-dir":       func() { c.StateDir = s.flags.StateDir },
		"admin":           func() { c.Admin = s.flags.Admin },
		"metrics-address": func() { c.MetricsAddress = s.flags.MetricsAddress },
		"log-level":       func() { c.LogLevel = s.flags.LogLevel },
		"log-format":      func() { c.LogFormat = s.flags.LogFormat },
	} {
		if flags.Changed(name) {
			copyFlag()
		}
	}
}

// upstreamPlaces are where runtimes have their CRI socket.
var upstreamPlaces = []string{
	"/run/containerd/containerd.sock",
	"/run/k3s/containerd/containerd.sock",
	"/run/crio/crio.sock",
}

// findUpstream returns the first of upstreamPlaces that exists, for a configuration that does not name the upstream.
func findUpstream() (string, error) {
	for _, path := range upstreamPlaces {
		if info, err := os.Stat(path); err == nil && info.Mode().Type() == os.ModeSocket {
			return "unix://" + path, nil
		}
	}
	return "", fmt.Errorf("no container runtime found: none of %s exists; start the runtime or name its socket with --upstream",
		strings.Join(upstreamPlaces, ", "))
}
