package cri

import (
	"strings"
	"testing"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// How an ExecSync ended is told without the command's name, which the audit log may not have, and
// without gRPC's own words.
func TestFailedSync(t *testing.T) {
	for _, test := range []struct {
		code          codes.Code
		reason, about string
	}{
		{codes.Unknown, "failed", "could not be started"},
		{codes.DeadlineExceeded, "timeout", "secret"},
		{codes.Canceled, "client-gone", "secret"},
		{codes.Internal, "failed", "secret"},
	} {
		o := failedSync(status.Error(test.code, `exec: "secret": executable file not found in $PATH`))
		text := o.Err.Error()
		if o.Reason != test.reason || o.ExitCode != -1 || !strings.Contains(text, test.about) || strings.Contains(text, "rpc error") {
			t.Errorf("%v: %+v", test.code, o)
		}
		if test.code == codes.Unknown && strings.Contains(text, "secret") {
			t.Errorf("it names the command: %s", text)
		}
	}
}
