// Package session keeps account of what is live now: every exec, attach and port-forward session
// with what it belongs to, who asked, and why it ended.
package session
