package streaming

import (
	"errors"
	"net/http"
	"slices"
	"strings"
	"testing"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/json"

	"github.com/streamshim/streamshim/pkg/workload"
)

func TestNegotiate(t *testing.T) {
	tests := []struct {
		name    string
		offered []string // header lines
		want    string
		err     error
	}{
		{"client-go since 1.30", []string{"v5.channel.k8s.io", "v4.channel.k8s.io", "v3.channel.k8s.io", "v2.channel.k8s.io", "channel.k8s.io"}, "v4.channel.k8s.io", nil},
		{"one line", []string{"v5.channel.k8s.io, v4.channel.k8s.io"}, "v4.channel.k8s.io", nil},
		{"the client's order counts", []string{"v2.channel.k8s.io", "v4.channel.k8s.io"}, "v2.channel.k8s.io", nil},
		{"v1", []string{"channel.k8s.io"}, "channel.k8s.io", nil},
		{"empty version", []string{""}, "", nil},
		{"none", nil, "", errNoProtocol},
		{"unknown", []string{"v9.channel.k8s.io"}, "", errUnknownProtocol},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			h := http.Header{}
			for _, line := range tt.offered {
				h.Add(headerProtocolVersion, line)
			}
			got, err := negotiate(h, remoteCommandProtocolNames())
			if !errors.Is(err, tt.err) || got != tt.want {
				t.Errorf("got %q, %v; want %q, %v", got, err, tt.want, tt.err)
			}
		})
	}
}

func TestIsSPDYUpgrade(t *testing.T) {
	tests := []struct {
		connection, upgrade string
		want                bool
	}{
		{"Upgrade", "SPDY/3.1", true},
		{"keep-alive, Upgrade", "spdy/3.1", true},
		{"Upgrade", "websocket", false},
		{"keep-alive", "SPDY/3.1", false},
		{"", "", false},
	}
	for _, tt := range tests {
		r := &http.Request{Header: http.Header{"Connection": {tt.connection}, "Upgrade": {tt.upgrade}}}
		if got := isSPDYUpgrade(r); got != tt.want {
			t.Errorf("Connection %q, Upgrade %q: %v, want %v", tt.connection, tt.upgrade, got, tt.want)
		}
	}
}

func TestTerminalSizes(t *testing.T) {
	tests := []struct {
		name   string
		chunks []string
		want   []workload.Size
		fails  bool
	}{
		{"one", []string{`{"Width":80,"Height":24}`}, []workload.Size{{Width: 80, Height: 24}}, false},
		{"with newlines", []string{"{\"Width\":80,\"Height\":24}\n{\"Width\":1,\"Height\":2}\n"}, []workload.Size{{Width: 80, Height: 24}, {Width: 1, Height: 2}}, false},
		{"split", []string{`{"Wid`, `th":80,"Hei`, `ght":24`, `}`}, []workload.Size{{Width: 80, Height: 24}}, false},
		{"lower case", []string{`{"width":80,"height":24}`}, []workload.Size{{Width: 80, Height: 24}}, false},
		{"too large a number", []string{`{"Width":70000,"Height":24}`}, nil, true},
		{"negative", []string{`{"Width":-1,"Height":24}`}, nil, true},
		{"something else", []string{`80x24`}, nil, true},
		{"endless", []string{"{" + strings.Repeat(" ", maxTerminalSizeMessage)}, nil, true},
		{"good, then bad", []string{`{"Width":80,"Height":24}x`}, []workload.Size{{Width: 80, Height: 24}}, true},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			var sizes terminalSizes
			var got []workload.Size
			var err error
			for _, chunk := range tt.chunks {
				var s []workload.Size
				s, err = sizes.feed([]byte(chunk))
				got = append(got, s...)
			}
			if !slices.Equal(got, tt.want) || (err != nil) != tt.fails {
				t.Errorf("got %v, %v; want %v, fails %v", got, err, tt.want, tt.fails)
			}
		})
	}
}

func FuzzTerminalSizes(f *testing.F) {
	f.Add([]byte(`{"Width":80,"Height":24}`), 3)
	f.Add([]byte("{{}}"), 1)
	f.Fuzz(func(t *testing.T, b []byte, split int) {
		split = max(0, min(split, len(b)))
		var whole, parts terminalSizes
		want, wantErr := whole.feed(b)
		got, err := parts.feed(b[:split])
		if err == nil {
			var rest []workload.Size
			rest, err = parts.feed(b[split:])
			got = append(got, rest...)
		}
		if !slices.Equal(got, want) || (err == nil) != (wantErr == nil) {
			t.Errorf("split at %d: %v, %v; whole: %v, %v", split, got, err, want, wantErr)
		}
		if cap(parts.pending) > 2*maxTerminalSizeMessage {
			t.Errorf("holds %d bytes", cap(parts.pending))
		}
	})
}

// The status must mean to a client what the stock server's means.
func TestStatusIsAMetaV1Status(t *testing.T) {
	v4 := remoteCommandProtocolByName("v4.channel.k8s.io")
	tests := []struct {
		status *status
		want   metav1.Status
		text   string // what v1 to v3 send
		code   int
	}{
		{successStatus(), metav1.Status{Status: "Success"}, "", 0},
		{exitStatus(0, "ignored"), metav1.Status{Status: "Success"}, "", 0},
		{exitStatus(3, ""), metav1.Status{
			Status: "Failure", Reason: "NonZeroExitCode", Message: "command terminated with non-zero exit code: 3",
			Details: &metav1.StatusDetails{Causes: []metav1.StatusCause{{Type: "ExitCode", Message: "3"}}},
		}, "command terminated with non-zero exit code: 3", 3},
		{exitStatus(137, "container was stopped"), metav1.Status{
			Status: "Failure", Reason: "NonZeroExitCode", Message: "container was stopped",
			Details: &metav1.StatusDetails{Causes: []metav1.StatusCause{{Type: "ExitCode", Message: "137"}}},
		}, "container was stopped", 137},
		{internalErrorStatus("boom"), metav1.Status{
			Status: "Failure", Reason: "InternalError", Message: "Internal error occurred: boom", Code: 500,
		}, "Internal error occurred: boom", -1},
		{endedStatus("too late"), metav1.Status{Status: "Failure", Reason: "Timeout", Message: "too late", Code: 504}, "too late", -1},
	}
	for _, tt := range tests {
		b := tt.status.encode(v4)
		var got metav1.Status
		if err := json.Unmarshal(b, &got); err != nil {
			t.Fatalf("%s: %v", b, err)
		}
		if got.String() != tt.want.String() {
			t.Errorf("%s\n got %v\nwant %v", b, got.String(), tt.want.String())
		}
		if text := tt.status.encode(remoteCommandProtocolByName("v3.channel.k8s.io")); string(text) != tt.text {
			t.Errorf("v3: %q, want %q", text, tt.text)
		}
		if code := parseStatus(b, v4).exitCode(); code != tt.code {
			t.Errorf("%s: exit code %d, want %d", b, code, tt.code)
		}
	}
}

func TestParseStatus(t *testing.T) {
	v4, v2 := remoteCommandProtocolByName("v4.channel.k8s.io"), remoteCommandProtocolByName("v2.channel.k8s.io")
	if s := parseStatus(nil, v4); s.Status != statusSuccess {
		t.Errorf("an empty error stream: %+v, want success", s)
	}
	if s := parseStatus([]byte("no such thing"), v2); s.Status != statusFailure || !strings.Contains(s.Message, "no such thing") {
		t.Errorf("text: %+v", s)
	}
	if s := parseStatus([]byte(`{"a":1}`), v4); s.Status != statusFailure {
		t.Errorf("JSON that is no status: %+v", s)
	}
	if s := parseStatus([]byte(`{"metadata":{},"status":"Success"}`), v4); s.Status != statusSuccess {
		t.Errorf("status of an older server: %+v", s)
	}
}

func FuzzParseStatus(f *testing.F) {
	f.Add([]byte(`{"status":"Failure","details":{"causes":[{"reason":"ExitCode","message":"3"}]}}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		if code := parseStatus(b, remoteCommandProtocolByName("v4.channel.k8s.io")).exitCode(); code < -1 || code > 255 {
			t.Errorf("exit code %d", code)
		}
	})
}
