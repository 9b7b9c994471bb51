// Package status represents the outcome of a request as its client receives it: a metav1.Status.
package status

import (
	"encoding/json"
	"strconv"
)

// Status is the outcome of a remote command. From protocol v4 on the error stream carries it as a metav1.Status, of
// which only these fields are used (k8s.io/apimachinery, remotecommand v4).
type Status struct {
	Status  string   `json:"status"`
	Message string   `json:"message,omitempty"`
	Reason  string   `json:"reason,omitempty"`
	Details *Details `json:"details,omitempty"`
	Code    int      `json:"code,omitempty"`
}

// Details describe a failure further.
type Details struct {
	Causes []Cause `json:"causes,omitempty"`
}

// Cause is one detail of a failure, such as the exit code.
type Cause struct {
	Reason  string `json:"reason"`
	Message string `json:"message"`
}

const (
	statusSuccess = "Success"
	statusFailure = "Failure"

	reasonNonZeroExitCode = "NonZeroExitCode"
	reasonInternalError   = "InternalError"
	reasonTimeout         = "Timeout"
	causeExitCode         = "ExitCode"
)

// Success returns the outcome of a command that ended with exit code 0.
func Success() *Status { return &Status{Status: statusSuccess} }

// Exit returns the outcome of a command that ran. Clients take the exit code from the cause. Those that show the
// message show the reason of the end with it.
func Exit(code int, message string) *Status {
	if code == 0 {
		return Success()
	}
	if message == "" {
		message = "command terminated with non-zero exit code: " + strconv.Itoa(code)
	}
	return &Status{
		Status: statusFailure, Message: message, Reason: reasonNonZeroExitCode,
		Details: &Details{Causes: []Cause{{Reason: causeExitCode, Message: strconv.Itoa(code)}}},
	}
}

// InternalError returns the outcome of a command that could not be served.
func InternalError(message string) *Status {
	return &Status{
		Status: statusFailure, Reason: reasonInternalError, Code: 500,
		Message: "Internal error occurred: " + message,
	}
}

// Ended returns the outcome of a session that was ended before its command did.
func Ended(message string) *Status {
	return &Status{Status: statusFailure, Reason: reasonTimeout, Code: 504, Message: message}
}

// Encode returns the content of the error stream. From protocol v4 on that is JSON. Before, it is the message of a
// failure, and nothing for a success.
func (s *Status) Encode(asJSON bool) []byte {
	if asJSON {
		b, err := json.Marshal(s)
		if err != nil {
			return []byte(s.Message) // cannot happen: the struct holds strings and an int
		}
		return b
	}
	if s.Status == statusSuccess {
		return nil
	}
	return []byte(s.Message)
}

// ExitCode returns the exit code that a status carries: 0 for success, -1 for a failure without one.
func (s *Status) ExitCode() int {
	if s.Status == statusSuccess {
		return 0
	}
	if s.Details != nil {
		for _, c := range s.Details.Causes {
			if code, err := strconv.ParseUint(c.Message, 10, 8); c.Reason == causeExitCode && err == nil {
				return int(code)
			}
		}
	}
	return -1
}

// Parse reads what an upstream wrote on its error stream, as clients read it. No text is a success. Text that is not a
// status is the message of a failure.
func Parse(b []byte, asJSON bool) *Status {
	if len(b) == 0 {
		return Success()
	}
	var s Status
	if asJSON && json.Unmarshal(b, &s) == nil && (s.Status == statusSuccess || s.Status == statusFailure) {
		return &s
	}
	return InternalError(string(b))
}
