package handover

import (
	"testing"
	"time"
)

func TestInstant(t *testing.T) {
	if InstantOf(time.Time{}) != 0 || !Instant(0).Time().IsZero() {
		t.Error("no time is an instant")
	}
	in := time.Now().Add(time.Hour)
	if off := InstantOf(in).Time().Sub(in); off.Abs() > time.Second {
		t.Errorf("an instant is off by %v", off)
	}
}
