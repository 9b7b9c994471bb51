package status

import (
	"encoding/json"
	"strings"
	"testing"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// TestStatusIsAMetaV1Status checks that our status means the same to a client as that of the stock server.
func TestStatusIsAMetaV1Status(t *testing.T) {
	const v4 = true
	tests := []struct {
		status *Status
		want   metav1.Status
		text   string // what v1 to v3 send
		code   int
	}{
		{Success(), metav1.Status{Status: "Success"}, "", 0},
		{Exit(0, "ignored"), metav1.Status{Status: "Success"}, "", 0},
		{Exit(3, ""), metav1.Status{
			Status: "Failure", Reason: "NonZeroExitCode", Message: "command terminated with non-zero exit code: 3",
			Details: &metav1.StatusDetails{Causes: []metav1.StatusCause{{Type: "ExitCode", Message: "3"}}},
		}, "command terminated with non-zero exit code: 3", 3},
		{Exit(137, "container was stopped"), metav1.Status{
			Status: "Failure", Reason: "NonZeroExitCode", Message: "container was stopped",
			Details: &metav1.StatusDetails{Causes: []metav1.StatusCause{{Type: "ExitCode", Message: "137"}}},
		}, "container was stopped", 137},
		{InternalError("boom"), metav1.Status{
			Status: "Failure", Reason: "InternalError", Message: "Internal error occurred: boom", Code: 500,
		}, "Internal error occurred: boom", -1},
		{Ended("too late"), metav1.Status{Status: "Failure", Reason: "Timeout", Message: "too late", Code: 504}, "too late", -1},
	}
	for _, tt := range tests {
		b := tt.status.Encode(v4)
		var got metav1.Status
		if err := json.Unmarshal(b, &got); err != nil {
			t.Fatalf("%s: %v", b, err)
		}
		if got.String() != tt.want.String() {
			t.Errorf("%s\n got %v\nwant %v", b, got.String(), tt.want.String())
		}
		if text := tt.status.Encode(!v4); string(text) != tt.text {
			t.Errorf("before v4: %q, want %q", text, tt.text)
		}
		if code := Parse(b, v4).ExitCode(); code != tt.code {
			t.Errorf("%s: exit code %d, want %d", b, code, tt.code)
		}
	}
}

func TestParseStatus(t *testing.T) {
	const v4, v2 = true, false
	if s := Parse(nil, v4); s.Status != statusSuccess {
		t.Errorf("an empty error stream: %+v, want success", s)
	}
	if s := Parse([]byte("no such thing"), v2); s.Status != statusFailure || !strings.Contains(s.Message, "no such thing") {
		t.Errorf("text: %+v", s)
	}
	if s := Parse([]byte(`{"a":1}`), v4); s.Status != statusFailure {
		t.Errorf("JSON that is no status: %+v", s)
	}
	if s := Parse([]byte(`{"metadata":{},"status":"Success"}`), v4); s.Status != statusSuccess {
		t.Errorf("status of an older server: %+v", s)
	}
}

func FuzzParseStatus(f *testing.F) {
	f.Add([]byte(`{"status":"Failure","details":{"causes":[{"reason":"ExitCode","message":"3"}]}}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		if code := Parse(b, true).ExitCode(); code < -1 || code > 255 {
			t.Errorf("exit code %d", code)
		}
	})
}
