// Package status is the outcome of a request as its client is told: a metav1.Status.
package status

import (
	"encoding/json"
	"strconv"
)

// Status is the outcome of a remote command as the error stream carries it from protocol v4 on: a
// metav1.Status, of which only these fields are used (k8s.io/apimachinery, remotecommand v4).
type Status struct {
	Status  string   `json:"status"`
	Message string   `json:"message,omitempty"`
	Reason  string   `json:"reason,omitempty"`
	Details *Details `json:"details,omitempty"`
	Code    int      `json:"code,omitempty"`
}

// Details say more of a failure.
type Details struct {
	Causes []Cause `json:"causes,omitempty"`
}

// Cause is one of its details, such as the exit code.
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

// Success is the outcome of a command that ended with exit code 0.
func Success() *Status { return &Status{Status: statusSuccess} }

// Exit is the outcome of a command that ran. The client takes the exit code from the cause;
// clients that show the message show the reason of the end too.
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

// InternalError is the outcome of a command that could not be served.
func InternalError(message string) *Status {
	return &Status{
		Status: statusFailure, Reason: reasonInternalError, Code: 500,
		Message: "Internal error occurred: " + message,
	}
}

// Ended is the outcome of a session that was told to end before its command did.
func Ended(message string) *Status {
	return &Status{Status: statusFailure, Reason: reasonTimeout, Code: 504, Message: message}
}

// Encode is the error stream's content: JSON from protocol v4 on, before that the
// message of a failure and nothing for a success.
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

// ExitCode is the exit code that a status carries: 0 for success, -1 for a failure without one.
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

// Parse reads what an upstream wrote on its error stream. Nothing at all is a success, text
// that is not a status is the message of a failure, as clients read it.
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
