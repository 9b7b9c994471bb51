package status

import (
	"encoding/json"
	"errors"
	"net/http"

	"github.com/streamshim/streamshim/pkg/session"
)

// WriteError answers a request that cannot be served.
func WriteError(w http.ResponseWriter, code int, message string) {
	Write(w, &Status{Status: statusFailure, Reason: statusReasons[code], Code: code, Message: message})
}

// Write answers with a metav1.Status. Clients show its message. Plain text would not work: client-go tries to read it
// as YAML first (transport/websocket), and a sentence with a colon is a YAML mapping, which becomes a Status without a
// message.
func Write(w http.ResponseWriter, s *Status) {
	body, err := json.Marshal(struct {
		Kind       string `json:"kind"`
		APIVersion string `json:"apiVersion"`
		*Status
	}{"Status", "v1", s})
	if err != nil {
		body = []byte(s.Message) // cannot happen: the struct holds strings and an int
	}
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(s.Code)
	w.Write(append(body, '\n')) //nolint:errcheck // the client has gone
}

// statusReasons maps HTTP status codes to the values of metav1.StatusReason.
var statusReasons = map[int]string{
	http.StatusBadRequest:          "BadRequest",
	http.StatusForbidden:           "Forbidden",
	http.StatusNotFound:            "NotFound",
	http.StatusTooManyRequests:     "TooManyRequests",
	http.StatusInternalServerError: "InternalError",
	http.StatusServiceUnavailable:  "ServiceUnavailable",
}

func refusedCode(err error) int {
	var refused *session.RefusedError
	if errors.As(err, &refused) {
		switch refused.Refusal {
		case session.Denied:
			return http.StatusForbidden
		case session.TooMany:
			return http.StatusTooManyRequests
		}
	}
	return http.StatusServiceUnavailable
}

// Refused returns the status of a session that was refused.
func Refused(err error) *Status {
	code := refusedCode(err)
	return &Status{Status: statusFailure, Reason: statusReasons[code], Code: code, Message: err.Error()}
}
