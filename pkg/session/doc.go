// Package session keeps track of all live exec, attach and port-forward sessions: what each belongs to, who asked
// for it, and why it ended.
package session
