package remotecommand

import (
	"net/http"
	"testing"
	"time"

	"github.com/streamshim/streamshim/pkg/workload"
)

// TestKubectlIsNotAsked checks that no receipts are asked for where they are not needed or possible: kubectl's own SPDY
// does not need them, and a client that sends input could not answer.
func TestKubectlIsNotAsked(t *testing.T) {
	for _, test := range []struct {
		name   string
		config Config
		stdin  bool
		header http.Header
		asked  bool
	}{
		{"kubectl", Config{StatusWait: time.Minute}, false, http.Header{"Kubectl-Command": {"kubectl exec"}}, false},
		{"a translator", Config{StatusWait: time.Minute}, false, http.Header{"User-Agent": {"Go-http-client/1.1"}}, true},
		{"a translator of input", Config{StatusWait: time.Minute}, true, nil, false},
		{"off", Config{}, false, nil, false},
	} {
		if asked := test.config.holdsStatusBack(&http.Request{Header: test.header}, workload.Command{Stdin: test.stdin}); asked != test.asked {
			t.Errorf("%s: asked %v", test.name, asked)
		}
	}
}
