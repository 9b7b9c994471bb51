package main

import (
	"strings"
	"testing"
	"time"

	"github.com/streamshim/streamshim/pkg/admin"
)

// What "upgrade" says of a hand-over, and of what one would be.
func TestHandoverTexts(t *testing.T) {
	began := time.Date(2026, 11, 28, 7, 0, 0, 0, time.Local)
	done := admin.Handover{ID: "1", Phase: admin.HandoverDone, Began: began, From: "1", To: "2", Carried: 12, State: 120 << 10, Descriptors: 40, Pause: 0.0851}
	for _, test := range []struct {
		name     string
		handover admin.Handover
		want     []string
	}{
		{"done", done, []string{"streamshim 2 has taken over from 1: 12 sessions go on, 0 have ended; all stood still for 85ms (state of 120.0Ki, 40 descriptors)"}},
		{"done by an older version", admin.Handover{Phase: admin.HandoverDone, From: "1", To: "2", State: 1024}, []string{
			"streamshim 2 has taken over from 1: 0 sessions go on, 0 have ended; all stood still for 0s (state of 1.0Ki)",
		}},
		{"dry run", admin.Handover{
			DryRun: true, Phase: admin.HandoverDone, From: "2", To: "3", Carried: 3, EndedSessions: []string{"abc attach: TLS"},
			State: 16 << 10, Descriptors: 50, DescriptorLimit: 1024, Pause: 0.06,
		}, []string{
			"streamshim 3 would take over from 2: 3 sessions would go on, 1 would end", "  abc attach: TLS",
			"all would stand still for about 60ms (state of about 16.0Ki; 50 descriptors are open, of 1024)",
		}},
		{"dry run after a hand-over, with few descriptors", admin.Handover{
			DryRun: true, Phase: admin.HandoverDone, From: "2", To: "3", State: 1024, Descriptors: 50, DescriptorLimit: 99, Pause: 0.06, Last: &done,
		}, []string{
			"streamshim 3 would take over from 2: 0 sessions would go on, 0 would end",
			"all would stand still for about 60ms (state of about 1.0Ki; 50 descriptors are open, of 99)",
			"the limit of descriptors may not suffice: in a hand-over most are open twice for a moment (LimitNOFILE of the service)",
			"the last hand-over, from 1 to 2 at 2026-11-28 07:00:00, took 85ms with 12 sessions (state of 120.0Ki, 40 descriptors)",
		}},
		{"dry run of an older version", admin.Handover{DryRun: true, Phase: admin.HandoverDone, From: "1", To: "2"}, []string{
			"streamshim 2 would take over from 1: 0 sessions would go on, 0 would end",
		}},
	} {
		var out strings.Builder
		if err := printHandover(&out, test.handover); err != nil {
			t.Errorf("%s: %v", test.name, err)
		}
		if want := strings.Join(test.want, "\n") + "\n"; out.String() != want {
			t.Errorf("%s:\n%swant:\n%s", test.name, out.String(), want)
		}
	}
	if err := printHandover(new(strings.Builder), admin.Handover{Phase: admin.HandoverFailed, From: "1", Error: "it has ended"}); err == nil || err.Error() != "streamshim 1 goes on as it was: it has ended" {
		t.Errorf("a hand-over that has failed: %v", err)
	}
}
