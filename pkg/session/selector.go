package session

import (
	"path"
	"slices"
)

// Selector chooses sessions by what they belong to. A field that is empty chooses all, except that
// ExecSync must be named: a rule for users must not stop a container's probes.
type Selector struct {
	Namespaces []string          // of the pod; * and ? stand for anything, as in path.Match
	PodLabels  map[string]string // all of these; the values may have * and ?
	Kinds      []Kind
	TTY        *bool
}

// Matches tells whether the session is chosen. A selector that asks for labels and meets a pod whose
// labels are not known gives unknown: what that means is for the caller to say.
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

// matchesPattern treats a malformed pattern as one that matches nothing but itself; the
// configuration refuses such patterns.
func matchesPattern(pattern, value string) bool {
	matches, err := path.Match(pattern, value)
	return (err == nil && matches) || pattern == value
}
