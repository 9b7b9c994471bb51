// Package failure writes errors down for a hand-over, so that who reads them again finds what he looks for in them.
package failure

import (
	"errors"
	"io"
	"net"
	"slices"
	"syscall"
)

// Failure is an error of a state.
type Failure struct {
	Kind   string   // the name of an error, or of a type of errors; empty for others
	Code   uint32   // of an error of a type that has one
	Remote bool     // the peer's, of a type that tells
	Text   string   // what the error says, where its name does not
	Causes []string // the names of what an error wraps that has no name itself
}

// Name is an error that others compare with.
type Name struct {
	Name  string
	Error error
}

// common are those of the system.
var common = []Name{
	{"end", io.EOF},
	{"cut", io.ErrUnexpectedEOF},
	{"not-open", net.ErrClosed},
	{"EPIPE", syscall.EPIPE},
	{"ECONNRESET", syscall.ECONNRESET},
}

// Names are the errors of one package.
type Names []Name

// NewNames returns these names and those of the system's errors.
func NewNames(own ...Name) Names { return append(own, common...) }

// Failure writes an error down; nil for nil.
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

// Err is the error again; nil for nil. Errors with a name are the same as ever.
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

// carriedError is an error that has no name.
type carriedError struct {
	text   string
	names  []string
	causes []error
}

func (e *carriedError) Error() string   { return e.text }
func (e *carriedError) Unwrap() []error { return e.causes }
