package limits

import (
	"fmt"
	"os"
	"time"

	"golang.org/x/sys/unix"

	"github.com/streamshim/streamshim/pkg/session"
)

const (
	// countAfter is how long a count of the open files is valid. Until the next count, each session is assumed to
	// have opened as many as a session opens at most.
	countAfter    = time.Second
	perSession    = 10
	perConnection = 3 // a forwarded one
	spareFraction = 8 // the reciprocal of the share kept for SpareDescriptors = -1
)

// descriptors refuses sessions before the process runs out of descriptors, at which point probes and live sessions
// would fail too. The Limiter's lock protects it.
type descriptors struct {
	counted time.Time
	open    int
	since   int // assumed to be opened since the count, for what was admitted
	// count and limit are OpenDescriptors and DescriptorLimit; tests replace them.
	count func() (int, error)
	limit func() uint64
}

// check refuses if only spare descriptors or fewer are left.
func (d *descriptors) check(spare int) error {
	if spare == 0 {
		return nil
	}
	if now := time.Now(); d.counted.IsZero() || now.Sub(d.counted) >= countAfter {
		open, err := d.count()
		if err != nil {
			// Either nothing can be opened any more, or /proc is missing. Other errors will say so.
			open = 0
		}
		d.open, d.since, d.counted = open, 0, now
	}
	most := int(min(d.limit(), 1<<30)) //nolint:gosec // bounded by min
	if spare < 0 {
		spare = most / spareFraction
	}
	if open := d.open + d.since; d.open > 0 && open > most-spare {
		return &session.RefusedError{Refusal: session.TooMany, Message: fmt.Sprintf(
			"streamshim has about %d of %d files open, and keeps %d for probes and the sessions that run (limits.spare_descriptors): try again when sessions have ended, or raise LimitNOFILE",
			open, most, spare)}
	}
	return nil
}

// admitted counts files that will be opened.
func (d *descriptors) admitted(files int) { d.since += files }

// DescriptorLimit returns how many files this process may have open. It is read anew because it can be changed
// from outside.
func DescriptorLimit() uint64 {
	var allowed unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &allowed); err != nil {
		return 1 << 30
	}
	return allowed.Cur
}

// OpenDescriptors counts the files that this process has open.
func OpenDescriptors() (int, error) {
	// Since Linux 6.2 the directory's size is the number.
	if info, err := os.Stat("/proc/self/fd"); err == nil && info.Size() > 0 {
		return int(info.Size()), nil
	}
	folder, err := os.Open("/proc/self/fd")
	if err != nil {
		return 0, err
	}
	defer folder.Close() //nolint:errcheck // only read
	names, err := folder.Readdirnames(-1)
	return len(names), err
}
