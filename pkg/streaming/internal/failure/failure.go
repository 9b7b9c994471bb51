// Package failure encodes errors for a hand-over, so that errors.Is still works on the decoded ones.
package failure

import (
	"errors"
	"io"
	"net"
	"slices"
	"syscall"
)

// Failure is an encoded error.
type Failure struct {
	Kind   string   // the name of an error or of an error type; empty for others
	Code   uint32   // for an error type that has a code
	Remote bool     // for an error type that tells whether the peer caused it
	Text   string   // the message, if the name does not imply it
	Causes []string // the names of the errors that an error without a name wraps
}

// Name names an error that callers compare with.
type Name struct {
	Name  string
	Error error
}

// common are the errors of the system.
var common = []Name{
	{"end", io.EOF},
	{"cut", io.ErrUnexpectedEOF},
	{"not-open", net.ErrClosed},
	{"EPIPE", syscall.EPIPE},
	{"ECONNRESET", syscall.ECONNRESET},
}

// Names are the named errors of one package.
type Names []Name

// NewNames returns these names and those of the system's errors.
func NewNames(own ...Name) Names { return append(own, common...) }

// Failure encodes an error. It returns nil for nil.
func (n Names) Failure(err error) *Failure {
	if err == nil {
		return nil
	}
	f := &Failure{Text: err.Error()}
	if carried, ok := err.(*carriedError); ok { //nolint:errorlint // one that wraps it is another
		return &Failure{Text: carried.text, Causes: carried.names}
	}
	for _, name := range n {
		if err == name.Error { //nolint:errorlint // as above
			return &Failure{Kind: name.Name}
		}
		if errors.Is(err, name.Error) {
			f.Causes = append(f.Causes, name.Name)
		}
	}
	return f
}

// Err decodes an error. It returns nil for nil, and the very same error for one with a name.
func (n Names) Err(f *Failure) error {
	if f == nil {
		return nil
	}
	carried := &carriedError{text: f.Text, names: f.Causes}
	for _, name := range n {
		if f.Kind == name.Name {
			return name.Error
		}
		if slices.Contains(f.Causes, name.Name) {
			carried.causes = append(carried.causes, name.Error)
		}
	}
	return carried
}

// carriedError is a decoded error that has no name.
type carriedError struct {
	text   string
	names  []string
	causes []error
}

func (e *carriedError) Error() string   { return e.text }
func (e *carriedError) Unwrap() []error { return e.causes }
