package config

import (
	"slices"
	"testing"
	"time"
)

func TestOperationKeys(t *testing.T) {
	c := Default()
	err := c.parse([]byte(`
admin = ""
[audit]
destination = "journald"
[recording]
on_failure = "deny"
[[recording.rule]]
namespaces = ["a*"]
pod_labels = { app = "x", "k8s.io/tier" = "*" }
[limits]
sessions = 0
bandwidth = 65536
[[deny]]
kinds = ["exec"]
tty = false
[[deny]]
message = "no"
`))
	if err != nil {
		t.Fatal(err)
	}
	if len(c.Deny) != 2 || c.Deny[0].TTY == nil || *c.Deny[0].TTY || c.Deny[1].TTY != nil || c.Deny[1].Message != "no" {
		t.Errorf("deny %+v", c.Deny)
	}
	if len(c.Recording.Rule) != 1 || c.Recording.Rule[0].PodLabels["k8s.io/tier"] != "*" || c.Recording.OnFailure != "deny" {
		t.Errorf("recording %+v", c.Recording)
	}
	if c.Limits.Sessions != 0 || c.Limits.ConcurrentStarts != Default().Limits.ConcurrentStarts || c.Admin != "" {
		t.Errorf("limits %+v", c.Limits)
	}
}

func TestReload(t *testing.T) {
	c, next := Default(), Default()
	next.LogLevel = "debug"
	next.Audit.Destination = "file"
	next.Recording.Rule = []Rule{{Namespaces: []string{"a"}}}
	next.Limits.Sessions = 7
	next.Deny = []Deny{{Kinds: []string{"exec"}}}
	next.Exec.IdleTimeout, next.Exec.MaxLifetime = Duration(time.Minute), Duration(time.Hour)
	next.NotifyWatch = true
	taken, needRestart := c.Reload(next)
	if len(needRestart) != 0 {
		t.Errorf("a restart is needed for %v", needRestart)
	}
	if want := []string{"audit.destination", "deny", "exec.idle_timeout", "exec.max_lifetime", "limits.sessions", "log_level", "notify_watch", "recording.rule"}; !slices.Equal(taken, want) {
		t.Errorf("taken over are %v, want %v", taken, want)
	}
	if differing := changed(c, next); len(differing) != 0 {
		t.Errorf("not taken over: %v", differing)
	}
	next.Listen, next.Exec.DrainIdle, next.Admin = "unix:///other", 0, ""
	next.Limits.Sessions = 8
	taken, needRestart = c.Reload(next)
	if !slices.Equal(taken, []string{"limits.sessions"}) {
		t.Errorf("taken over are %v", taken)
	}
	if want := []string{"admin", "exec.drain_idle", "listen"}; !slices.Equal(needRestart, want) {
		t.Errorf("a restart is needed for %v, want %v", needRestart, want)
	}
	if c.Limits.Sessions != 8 || c.Listen != Default().Listen {
		t.Error("the rest was not taken over as it should")
	}
}

// Every key is either taken over by Reload or reported by it: none is forgotten.
func TestReloadableKeysAreKnown(t *testing.T) {
	var keys []string
	collectKeys("", Default(), &keys)
	for _, r := range reloadable {
		if !slices.ContainsFunc(keys, func(key string) bool { return CanReload(key) && (key == r || len(key) > len(r) && key[:len(r)] == r) }) {
			t.Errorf("%q is no key", r)
		}
	}
}
