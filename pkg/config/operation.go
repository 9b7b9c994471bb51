package config

import (
	"fmt"
	"path"
	"strings"

	"github.com/pelletier/go-toml/v2"
)

const (
	minAuditSize     = 4 << 10
	minRecordingSize = 64 << 10
	minBandwidth     = 4 << 10
)

// validateOperation checks audit, recording, limits and rules.
func (c *Config) validateOperation(choice func(key, value string, choices ...string) *ValueError) []*ValueError {
	checks := []*ValueError{
		choice("audit.destination", c.Audit.Destination, "off", "file", "stdout", "journald"),
		choice("audit.command", c.Audit.Command, "none", "argv0", "full"),
		choice("audit.fsync", c.Audit.Fsync, "never", "interval", "always"),
		choice("audit.on_failure", c.Audit.OnFailure, "allow", "deny"),
		choice("recording.on_failure", c.Recording.OnFailure, "allow", "deny"),
		absolute("audit.file", c.Audit.File),
		absolute("recording.directory", c.Recording.Directory),
		atLeast("audit.max_size", c.Audit.MaxSize, minAuditSize, true),
		atLeast("audit.max_files", int64(c.Audit.MaxFiles), 0, false),
		atLeast("recording.max_size", c.Recording.MaxSize, minRecordingSize, false),
		atLeast("recording.max_files", int64(c.Recording.MaxFiles), 0, false),
		atLeast("recording.max_total", c.Recording.MaxTotal, 0, false),
		atLeast("limits.sessions", int64(c.Limits.Sessions), 0, false),
		atLeast("limits.sessions_per_pod", int64(c.Limits.SessionsPerPod), 0, false),
		atLeast("limits.sessions_per_container", int64(c.Limits.SessionsPerContainer), 0, false),
		atLeast("limits.concurrent_starts", int64(c.Limits.ConcurrentStarts), 0, false),
		atLeast("limits.concurrent_probes", int64(c.Limits.ConcurrentProbes), -1, false),
		atLeast("limits.bandwidth", c.Limits.Bandwidth, minBandwidth, true),
		atLeast("limits.buffers", c.Limits.Buffers, -1, false),
		atLeast("limits.sync_output", c.Limits.SyncOutput, -1, false),
		atLeast("limits.recording_buffers", c.Limits.RecordingBuffers, -1, false),
		atLeast("limits.concurrent_ends", int64(c.Limits.ConcurrentEnds), -1, false),
		atLeast("limits.spare_descriptors", int64(c.Limits.SpareDescriptors), -1, false),
	}
	for i, rule := range c.Recording.Rule {
		checks = append(checks, validateSelection(fmt.Sprintf("recording.rule[%d]", i), rule.Namespaces, rule.PodLabels))
	}
	for i, rule := range c.Deny {
		key := fmt.Sprintf("deny[%d]", i)
		checks = append(checks, validateSelection(key, rule.Namespaces, rule.PodLabels))
		for _, kind := range rule.Kinds {
			checks = append(checks, choice(key+".kinds", kind, "exec", "attach", "portforward", "execsync"))
		}
	}
	return checks
}

func absolute(key, value string) *ValueError {
	if strings.HasPrefix(value, "/") {
		return nil
	}
	return &ValueError{key, fmt.Sprintf("%q must be an absolute path", value)}
}

func atLeast(key string, value, least int64, zero bool) *ValueError {
	switch {
	case value >= least, zero && value == 0:
		return nil
	case zero:
		return &ValueError{key, fmt.Sprintf("%d must be at least %d, or 0 for none", value, least)}
	}
	return &ValueError{key, fmt.Sprintf("%d must be at least %d", value, least)}
}

func validateSelection(key string, namespaces []string, labels map[string]string) *ValueError {
	for _, pattern := range namespaces {
		if _, err := path.Match(pattern, ""); err != nil || pattern == "" {
			return &ValueError{key + ".namespaces", fmt.Sprintf("%q is no pattern for a name; it may have * and ?", pattern)}
		}
	}
	for name, pattern := range labels {
		if _, err := path.Match(pattern, ""); err != nil {
			return &ValueError{key + ".pod_labels", fmt.Sprintf("%q of label %q is no pattern for a value; it may have * and ?", pattern, name)}
		}
	}
	return nil
}

// reloadable lists the keys that a running streamshim can change. One that ends with a dot stands for all keys
// of its table.
var reloadable = []string{
	"log_level", "notify_watch", "audit.", "recording.", "limits.", "deny",
	"exec.idle_timeout", "exec.max_lifetime", "attach.idle_timeout", "attach.max_lifetime",
	"portforward.idle_timeout", "portforward.max_lifetime",
}

// Reload copies to c the settings of next that can change without a restart. It returns the keys that it has
// changed, and those that differ but need a restart, both sorted.
func (c *Config) Reload(next Config) (taken, needRestart []string) {
	for _, key := range changed(*c, next) {
		if CanReload(key) {
			taken = append(taken, key)
		} else {
			needRestart = append(needRestart, key)
		}
	}
	c.LogLevel, c.NotifyWatch = next.LogLevel, next.NotifyWatch
	c.removed = next.removed
	c.Audit, c.Recording, c.Limits, c.Deny = next.Audit, next.Recording, next.Limits, next.Deny
	c.Exec.IdleTimeout, c.Exec.MaxLifetime = next.Exec.IdleTimeout, next.Exec.MaxLifetime
	c.Attach.IdleTimeout, c.Attach.MaxLifetime = next.Attach.IdleTimeout, next.Attach.MaxLifetime
	c.PortForward.IdleTimeout, c.PortForward.MaxLifetime = next.PortForward.IdleTimeout, next.PortForward.MaxLifetime
	return taken, needRestart
}

// CanReload reports whether a reload applies a change of the key.
func CanReload(key string) bool {
	for _, r := range reloadable {
		if key == r || (strings.HasSuffix(r, ".") && strings.HasPrefix(key, r)) {
			return true
		}
	}
	return false
}

// changed returns the keys in which two configurations differ, sorted.
func changed(a, b Config) []string {
	var keys, differing []string
	collectKeys("", Default(), &keys)
	left, right := tree(a), tree(b)
	for _, key := range keys {
		if fmt.Sprint(lookUp(left, key)) != fmt.Sprint(lookUp(right, key)) {
			differing = append(differing, key)
		}
	}
	return differing
}

func tree(value any) map[string]any {
	var tree map[string]any
	text, err := toml.Marshal(value)
	if err == nil {
		err = toml.Unmarshal(text, &tree)
	}
	if err != nil {
		return nil // cannot happen: the struct has plain types only
	}
	return tree
}

func lookUp(tree map[string]any, key string) any {
	table, rest, nested := strings.Cut(key, ".")
	if !nested {
		return tree[key]
	}
	sub, ok := tree[table].(map[string]any)
	if !ok {
		return nil
	}
	return lookUp(sub, rest)
}
