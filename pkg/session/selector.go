package session

import (
	"path"
	"slices"
)

// Selector matches sessions by what they belong to. An empty field matches all, except that ExecSync must be
// named: a rule for users must not stop a container's probes.
type Selector struct {
	Namespaces []string          // of the pod; may contain * and ?, as in path.Match
	PodLabels  map[string]string // all must match; values may contain * and ?
	Kinds      []Kind
	TTY        *bool
}

// Matches reports whether the selector matches a session. unknown says that it requires labels and the pod's
// labels are not known; the caller decides what that means.
func (s Selector) Matches(info Info) (matches, unknown bool) {
	if len(s.Kinds) == 0 && info.Kind == ExecSync {
		return false, false
	}
	if len(s.Kinds) > 0 && !slices.Contains(s.Kinds, info.Kind) {
		return false, false
	}
	if s.TTY != nil && *s.TTY != info.TTY {
		return false, false
	}
	if len(s.Namespaces) > 0 && !slices.ContainsFunc(s.Namespaces, func(pattern string) bool {
		return matchesPattern(pattern, info.Target.PodNamespace)
	}) {
		return false, false
	}
	if len(s.PodLabels) > 0 && info.PodLabels == nil {
		return false, true
	}
	for name, pattern := range s.PodLabels {
		value, ok := info.PodLabels[name]
		if !ok || !matchesPattern(pattern, value) {
			return false, false
		}
	}
	return true, false
}

// matchesPattern treats a malformed pattern as literal text. The configuration refuses such patterns.
func matchesPattern(pattern, value string) bool {
	matches, err := path.Match(pattern, value)
	return (err == nil && matches) || pattern == value
}
