package streaming

import (
	"encoding/json"
	"io"
	"strconv"
)

// status is the outcome of a remote command as the error stream carries it from protocol v4 on: a
// metav1.Status, of which only these fields are used (k8s.io/apimachinery, remotecommand v4).
type status struct {
	Status  string         `json:"status"`
	Message string         `json:"message,omitempty"`
	Reason  string         `json:"reason,omitempty"`
	Details *statusDetails `json:"details,omitempty"`
	Code    int            `json:"code,omitempty"`
}

type statusDetails struct {
	Causes []statusCause `json:"causes,omitempty"`
}

type statusCause struct {
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

func successStatus() *status { return &status{Status: statusSuccess} }

// exitStatus is the outcome of a command that ran. The client takes the exit code from the cause;
// clients that show the message show the reason of the end too.
func exitStatus(code int, message string) *status {
	if code == 0 {
		return successStatus()
	}
	if message == "" {
		message = "command terminated with non-zero exit code: " + strconv.Itoa(code)
	}
	return &status{
		Status: statusFailure, Message: message, Reason: reasonNonZeroExitCode,
		Details: &statusDetails{Causes: []statusCause{{Reason: causeExitCode, Message: strconv.Itoa(code)}}},
	}
}

func internalErrorStatus(message string) *status {
	return &status{
		Status: statusFailure, Reason: reasonInternalError, Code: 500,
		Message: "Internal error occurred: " + message,
	}
}

// endedStatus is the outcome of a session that was told to end before its command did.
func endedStatus(message string) *status {
	return &status{Status: statusFailure, Reason: reasonTimeout, Code: 504, Message: message}
}

// encode is the error stream's content in the given protocol: JSON from v4 on, before that the
// message of a failure and nothing for a success.
func (s *status) encode(p remoteCommandProtocol) []byte {
	if p.jsonStatus {
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

// promiseStatus begins the error stream with a space, which JSON allows before the status. Clients of spdystream (kubectl,
// crictl, kubelet, API server) see a connection that breaks, by FIN or reset alike, as the end of all its streams, and an error
// stream that ends empty as success. So should this process be killed, they find something that is no status, and say so.
// Before v4 every byte is a failure, and nothing can be promised.
func (p remoteCommandProtocol) promiseStatus(failure io.Writer) {
	if p.jsonStatus {
		io.WriteString(failure, " ") //nolint:errcheck // a client that has gone is noticed elsewhere
	}
}

// exitCode is the exit code that a status carries: 0 for success, -1 for a failure without one.
func (s *status) exitCode() int {
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

// parseStatus reads what an upstream wrote on its error stream. Nothing at all is a success, text
// that is not a status is the message of a failure, as clients read it.
func parseStatus(b []byte, p remoteCommandProtocol) *status {
	if len(b) == 0 {
		return successStatus()
	}
	var s status
	if p.jsonStatus && json.Unmarshal(b, &s) == nil && (s.Status == statusSuccess || s.Status == statusFailure) {
		return &s
	}
	return internalErrorStatus(string(b))
}
