package main

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"github.com/pelletier/go-toml/v2"
	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/streamshim/streamshim/pkg/check"
	"github.com/streamshim/streamshim/pkg/config"
	"github.com/streamshim/streamshim/pkg/session"
	"github.com/streamshim/streamshim/pkg/support"
)

// logLines is how many lines of the log the bundle has.
const logLines = "5000"

const bundleReadme = `Made by "streamshim support-bundle" for a bug report. Please look through it before you send it.

version.json   of streamshim
config.toml    the configuration in force, with its defaults. Namespaces, labels and messages of rules are hidden.
check.txt      streamshim check
metrics.txt    /metrics and /readyz of the running streamshim, if metrics_address is set
system.txt     kernel, distribution, limits
log.txt        the last lines of streamshim's log. It names namespaces, pods and addresses, never commands or their output.
errors.txt     what could not be gathered, if anything

It contains nothing of the audit log or the recordings.
`

func newSupportCommand() *cobra.Command {
	command := &cobra.Command{
		Use:   "support-bundle",
		Short: "Gather what a bug report needs into one archive",
		Long: `support-bundle writes one .tar.gz with the version, the configuration without the names in its rules, the checks, the
metrics, the system's versions and the last lines of the log. It changes nothing and sends nothing. The log names
namespaces and pods, never commands or their output. The README in the bundle describes each file.`,
		Args: cobra.NoArgs,
	}
	settings := addSettings(command.Flags())
	kubeletConfig := command.Flags().String("kubelet-config", check.DefaultKubeletConfig, "the kubelet's configuration `file`")
	output := command.Flags().StringP("output", "o", "", "`file` to write, - for stdout (default streamshim-support-HOST-TIME.tar.gz)")
	logFile := command.Flags().String("log", "", "`file` that has the log (default: the journal of streamshim.service)")
	command.RunE = func(cmd *cobra.Command, _ []string) error {
		now := time.Now().UTC()
		host, err := os.Hostname()
		if err != nil {
			return err
		}
		name := "streamshim-support-" + host + "-" + now.Format("20060102-150405")
		parts := bundleParts(settings, cmd, *kubeletConfig, *logFile)
		if *output == "-" {
			return support.Write(cmd.Context(), cmd.OutOrStdout(), name, now, parts)
		}
		if *output == "" {
			*output = name + ".tar.gz"
		}
		file, err := os.OpenFile(*output, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
		if err != nil {
			return err
		}
		err = support.Write(cmd.Context(), file, name, now, parts)
		if closeErr := file.Close(); err == nil {
			err = closeErr
		}
		if err != nil {
			os.Remove(*output) //nolint:errcheck // of no use
			return err
		}
		fmt.Fprintf(cmd.OutOrStdout(), "%s was written; please look through it before you send it\n", *output)
		return nil
	}
	return command
}

// bundleParts returns the files of the bundle. If the configuration has a mistake, the other files are gathered with the
// defaults.
func bundleParts(s *settings, cmd *cobra.Command, kubeletConfig, logFile string) []support.Part {
	c, configErr := s.load(cmd.Flags())
	if configErr != nil {
		c = config.Default()
	}
	if c.Upstream == "" {
		c.Upstream, _ = findUpstream() // if there is none, a check reports it
	}
	return []support.Part{
		{Name: "README", Gather: func(_ context.Context, to io.Writer) error {
			_, err := io.WriteString(to, bundleReadme)
			return err
		}},
		{Name: "version.json", Gather: func(_ context.Context, to io.Writer) error { return session.WriteJSON(to, currentVersion()) }},
		{Name: "config.toml", Gather: func(_ context.Context, to io.Writer) error {
			if configErr != nil {
				return configErr
			}
			return toml.NewEncoder(to).Encode(withoutNames(c))
		}},
		{Name: "check.txt", Gather: func(ctx context.Context, to io.Writer) error {
			_, err := printChecks(to, check.Run(ctx, c, kubeletConfig))
			return err
		}},
		{Name: "metrics.txt", Gather: func(ctx context.Context, to io.Writer) error { return gatherMetrics(ctx, to, c.MetricsAddress) }},
		{Name: "system.txt", Gather: gatherSystem},
		{Name: "log.txt", Gather: func(ctx context.Context, to io.Writer) error { return gatherLog(ctx, to, logFile) }},
	}
}

// hidden replaces what the bundle must not contain.
const hidden = "(hidden)"

// withoutNames returns the configuration without the names, labels and messages in its rules, which may name tenants. A
// configuration has no passwords or keys.
func withoutNames(c config.Config) config.Config {
	names := func(list []string) []string {
		hiddenList := make([]string, len(list))
		for i := range list {
			hiddenList[i] = hidden
		}
		return hiddenList
	}
	labels := func(set map[string]string) map[string]string {
		if len(set) == 0 {
			return nil
		}
		return map[string]string{hidden: fmt.Sprintf("%d labels", len(set))}
	}
	rules := make([]config.Rule, 0, len(c.Recording.Rule))
	for _, r := range c.Recording.Rule {
		rules = append(rules, config.Rule{Namespaces: names(r.Namespaces), PodLabels: labels(r.PodLabels)})
	}
	c.Recording.Rule = rules
	denials := make([]config.Deny, 0, len(c.Deny))
	for _, d := range c.Deny {
		d.Namespaces, d.PodLabels = names(d.Namespaces), labels(d.PodLabels)
		if d.Message != "" {
			d.Message = hidden
		}
		denials = append(denials, d)
	}
	c.Deny = denials
	return c
}

func gatherMetrics(ctx context.Context, to io.Writer, address string) error {
	if address == "" {
		fmt.Fprintln(to, "metrics_address is not set")
		return nil
	}
	host, port, err := net.SplitHostPort(address)
	if err != nil {
		return err
	}
	if ip := net.ParseIP(host); host == "" || ip != nil && ip.IsUnspecified() {
		host = "localhost"
	}
	for _, path := range []string{"/readyz", "/metrics"} {
		request, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+net.JoinHostPort(host, port)+path, http.NoBody)
		if err != nil {
			return err
		}
		response, err := http.DefaultClient.Do(request)
		if err != nil {
			return err
		}
		fmt.Fprintf(to, "# %s: %s\n", path, response.Status)
		_, err = io.Copy(to, response.Body)
		response.Body.Close() //nolint:errcheck // read as far as it went
		if err != nil {
			return err
		}
		fmt.Fprintln(to)
	}
	return nil
}

func gatherSystem(_ context.Context, to io.Writer) error {
	var name unix.Utsname
	if err := unix.Uname(&name); err != nil {
		return err
	}
	fmt.Fprintf(to, "kernel: %s %s %s\n\n", unix.ByteSliceToString(name.Sysname[:]), unix.ByteSliceToString(name.Release[:]), unix.ByteSliceToString(name.Machine[:]))
	for _, file := range []string{"/etc/os-release", "/proc/meminfo", "/proc/loadavg", "/proc/pressure/cpu", "/proc/pressure/memory", "/proc/self/limits", "/proc/self/cgroup"} {
		text, err := os.ReadFile(file)
		if err != nil {
			text = []byte(err.Error() + "\n") // older kernels have no /proc/pressure
		}
		fmt.Fprintf(to, "== %s\n%s\n", file, text)
	}
	return nil
}

// gatherLog copies the end of the log file, or of the service's journal.
func gatherLog(ctx context.Context, to io.Writer, file string) error {
	command := exec.CommandContext(ctx, "journalctl", "--unit=streamshim.service", "--lines="+logLines, "--no-pager", "--output=short-iso-precise")
	if file != "" {
		absolute, err := filepath.Abs(file)
		if err != nil {
			return err
		}
		command = exec.CommandContext(ctx, "tail", "-n", logLines, absolute) //nolint:gosec // the operator names it
	}
	var failure bytes.Buffer
	command.Stdout, command.Stderr = to, &failure
	command.WaitDelay = time.Second
	if err := command.Run(); err != nil {
		return fmt.Errorf("%w: %s (--log names a file that has the log)", err, strings.TrimSpace(failure.String()))
	}
	return nil
}
