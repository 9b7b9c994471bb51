package record

import (
	"strings"
	"testing"
)

func FuzzParseRecord(f *testing.F) {
	f.Add(`{"container":"c","initPid":7,"pid":8,"start":9,"boot":"b","policy":"hangup"}`)
	f.Fuzz(func(t *testing.T, text string) {
		if found, err := Parse([]byte(text)); err == nil && found.Pid <= 1 && (found.Pid != 0 || found.Since == 0) {
			t.Errorf("pid %d of %q", found.Pid, text)
		}
		if owner, ok := OwnerOf(text); ok && (owner.Pid <= 0 || !strings.Contains(text, "-")) {
			t.Errorf("owner %v of %q", owner, text)
		}
	})
}
