package holdback

import "time"

// backlog estimates how many bytes are still on their way from the peer to the reader, in buffers that cannot be seen from
// here, and how fast they are read.
//
// Receipts say how far the peer has come, and when. What the peer has read, it writes to its own socket. That is fast while
// there is room in the buffers behind it. When they are full, the peer stops until the reader has made room. So when the
// peer stops although there is more data for it, the buffers are full, and hold what went in too fast to have been read.
// From one stop to the next, as many bytes are read as the peer takes. If the peer does not stop, either the reader is fast
// or the buffers are large. Then nothing is estimated.
//
// It is a model: it assumes that the reader continues at the rate of the last few megabytes. It has no clock and no lock of
// its own. The zero value is ready to use.
type backlog struct {
	points []mark  // of the last backlogWindow bytes, oldest first
	stops  []stop  // of the last rateWindow bytes, since begin
	begin  mark    // when the peer last had nothing to read
	full   float64 // bytes that the buffers hold when they are full; 0 is unknown

	level float64 // bytes on their way, as of the last point; valid if rate is known
	rate  float64 // bytes a second that are read; 0 is unknown
}

// mark is how far the peer had come at a time.
type mark struct {
	at    time.Time
	bytes float64
}

// stop is a mark at which the peer stopped for a while.
type stop struct {
	mark
	pause time.Duration
}

const (
	// minStop is the shortest pause that counts as a stop. A socket accepts more when a third of its buffer is free. So
	// a peer stops for a second at 1.25 MB/s, and for 50 ms at 25 MB/s.
	minStop = 50 * time.Millisecond
	// minIdle is the shortest time without data for the peer that means that there was none. A shorter time may mean
	// that we were late.
	minIdle = 100 * time.Millisecond
	// minStops is how long all stops together must have lasted before they count. Shorter ones may be due to a busy
	// machine.
	minStops = 300 * time.Millisecond
	// stepPart: a stepPart-th part of the full buffers must be free before the peer continues. The socket next to it
	// requires a third, and there are two or three.
	stepPart = 8
	// rateWindow is the number of bytes over which the reader's rate is measured.
	rateWindow = 8 << 20
	// backlogMax is more than the buffers between a node and a client hold: two or three hops with Linux' limit of
	// 4 MB for a socket's send buffer.
	backlogMax = 16 << 20
	// backlogWindow is how many bytes back points are kept.
	backlogWindow = backlogMax + rateWindow
)

// took adds a receipt. Receipts come in order.
func (b *backlog) took(r receipt) {
	if len(b.points) == 0 {
		b.points = append(b.points, mark{at: r.first})
	}
	last, now := b.points[len(b.points)-1], mark{r.came, float64(r.bytes)}
	b.points = append(b.points, now)
	for now.bytes-b.points[1].bytes > backlogWindow {
		b.points = b.points[1:]
	}
	stopped := last // if it stopped then
	if idle := r.asked.Sub(last.at); idle > 0 {
		stopped.at = r.asked
		if idle >= minIdle {
			b.stops, b.begin = b.stops[:0], stopped
		}
	}
	if pause := r.came.Sub(stopped.at); pause >= minStop {
		b.stops = append(b.stops, stop{stopped, pause})
	}
	for len(b.stops) > 0 && now.bytes-b.stops[0].bytes > rateWindow {
		b.stops = b.stops[1:]
	}
	if full, ok := b.lastFull(); ok {
		since := now.at.Sub(full.at).Seconds()
		b.rate = (now.bytes - full.bytes) / since
		if b.full == 0 || now.bytes-b.begin.bytes <= backlogWindow {
			b.full = max(b.full, b.unreadAt(full))
		}
		// The last receipt may have been small because there was no more data. There was room for one step.
		b.rate = max(b.rate, b.full/stepPart/since)
		b.level = b.full
		return
	}
	if b.rate == 0 {
		return
	}
	// Until r.first only the old bytes are read, then also the new ones.
	b.level = max(0, b.level-b.rate*max(0, r.first.Sub(last.at).Seconds()))
	b.level = max(0, b.level-b.rate*now.at.Sub(maxTime(last.at, r.first)).Seconds()+now.bytes-last.bytes)
	if b.level > b.full+rateWindow {
		b.rate = 0 // the buffers accepted more than they can hold, so the reader has become faster
	}
}

// lastFull returns a moment since which the buffers were full at each stop. It ignores the first quarter of all stopped
// time, because machines may be busy and buffers grow at first.
func (b *backlog) lastFull() (mark, bool) {
	var all, sum time.Duration
	for _, s := range b.stops {
		all += s.pause
	}
	if all < minStops {
		return mark{}, false
	}
	for _, s := range b.stops {
		if sum += s.pause; sum >= all/4 {
			return s.mark, true
		}
	}
	return mark{}, false
}

// unreadAt returns how many bytes were on their way at a point, if the reader has always read at the current rate.
func (b *backlog) unreadAt(at mark) float64 {
	most := 0.0
	for _, p := range b.points {
		if !p.at.Before(at.at) {
			break
		}
		most = max(most, at.bytes-p.bytes-b.rate*at.at.Sub(p.at).Seconds())
	}
	return min(most, backlogMax)
}

func maxTime(a, b time.Time) time.Time {
	if a.After(b) {
		return a
	}
	return b
}

// rest returns how long after the last point everything that the peer has taken will have been read. It is 0 if nothing is
// known about the reader.
func (b *backlog) rest() time.Duration {
	if b.rate == 0 {
		return 0
	}
	return time.Duration(b.level / b.rate * float64(time.Second))
}
