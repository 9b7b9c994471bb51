package remotecommand

import (
	"net/http"
	"testing"
	"time"

	"github.com/streamshim/streamshim/pkg/workload"
)

// kubectl's own SPDY needs no receipts, and who sends input could not answer.
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
