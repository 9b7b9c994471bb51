package handover

import (
	"time"

	"golang.org/x/sys/unix"
)

// Instant is a CLOCK_MONOTONIC time in nanoseconds. That clock continues across execve and cannot be set. Zero means none.
type Instant int64

// InstantOf converts a time. The zero time becomes zero.
func InstantOf(t time.Time) Instant {
	if t.IsZero() {
		return 0
	}
	return Now() + Instant(time.Until(t))
}

// Time converts an instant, possibly of another program, to a time of this one. Zero becomes the zero time.
func (i Instant) Time() time.Time {
	if i == 0 {
		return time.Time{}
	}
	return time.Now().Add(time.Duration(i - Now()))
}

// Since returns the time elapsed since an instant, possibly of another program.
func Since(i Instant) time.Duration { return time.Duration(Now() - i) }

// Now returns the current instant.
func Now() Instant {
	var t unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_MONOTONIC, &t); err != nil {
		panic(err) // every Linux has this clock
	}
	return Instant(t.Nano())
}
