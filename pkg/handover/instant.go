package handover

import (
	"time"

	"golang.org/x/sys/unix"
)

// Instant is a time in nanoseconds of CLOCK_MONOTONIC, which goes on over execve and is not set by anybody. Zero is none.
type Instant int64

// InstantOf is the instant of a time, none of a zero one.
func InstantOf(t time.Time) Instant {
	if t.IsZero() {
		return 0
	}
	return Now() + Instant(time.Until(t))
}

// Time is when it is on this program's clock, the zero time of none.
func (i Instant) Time() time.Time {
	if i == 0 {
		return time.Time{}
	}
	return time.Now().Add(time.Duration(i - Now()))
}

// Since is the time since an instant, also one of another program.
func Since(i Instant) time.Duration { return time.Duration(Now() - i) }

// Now is the present instant.
func Now() Instant {
	var t unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_MONOTONIC, &t); err != nil {
		panic(err) // every Linux has this clock
	}
	return Instant(t.Nano())
}
