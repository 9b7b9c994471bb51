package holdback

import "time"

// backlog estimates how much of what a client was sent is still on its way to whoever reads it, in
// buffers that cannot be seen from here, and how fast it is read.
//
// It is told how far the peer next to us has come, and when (receipt). What the peer has taken it
// has written to its own socket, which goes fast while there is room in the buffers behind it, and stops
// when they are full, until the reader has made room again. So when the peer stops although there is
// more for it to take, the buffers are full: what they hold is what went in too fast to have been read.
// From one such moment to the next as much is read as is taken. Where the peer does not stop it is not
// known whether the reader is fast or the buffers are large, and nothing is estimated.
//
// It is a model: the reader is assumed to go on as it did for the last few megabytes. It has no clock and
// no lock of its own. The zero value is ready.
type backlog struct {
	points []mark  // of the last backlogWindow bytes, oldest first
	stops  []stop  // of the last rateWindow bytes, since the peer last had nothing to take
	begin  mark    // when that was
	full   float64 // bytes that the buffers hold when they are full; 0 is unknown

	level float64 // bytes on their way, as of the last point; only if rate is known
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
	// minStop is what counts as a stop. A socket takes more when a third of its buffer is free, which
	// makes a peer stop for a second at 1.25 MB/s, and for 50 ms at 25 MB/s.
	minStop = 50 * time.Millisecond
	// minIdle is how long the peer had nothing to take when it is taken to have done so because there was
	// nothing, and not because we were late.
	minIdle = 100 * time.Millisecond
	// minStops is how long stops must have taken together before they mean anything: machines are busy
	// at times.
	minStops = 300 * time.Millisecond
	// stepPart is the part of full buffers that must be free before the peer goes on. The socket next to
	// it wants a third, and there are two or three.
	stepPart = 8
	// rateWindow is how many bytes the reader's pace is measured over.
	rateWindow = 8 << 20
	// backlogMax is more than the buffers between a node and a client take: two or three hops with
	// Linux' limit of 4 MB for what a socket has to send.
	backlogMax = 16 << 20
	// backlogWindow is how far back anything matters.
	backlogWindow = backlogMax + rateWindow
)

// took notes a receipt, which come in order.
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
		// What came last may have been little because there was no more; there was room for a step.
		b.rate = max(b.rate, b.full/stepPart/since)
		b.level = b.full
		return
	}
	if b.rate == 0 {
		return
	}
	// First what was there is read, then also what has come.
	b.level = max(0, b.level-b.rate*max(0, r.first.Sub(last.at).Seconds()))
	b.level = max(0, b.level-b.rate*now.at.Sub(maxTime(last.at, r.first)).Seconds()+now.bytes-last.bytes)
	if b.level > b.full+rateWindow {
		b.rate = 0 // it went through, so the reader has become faster
	}
}

// lastFull is a moment since which the buffers have been full each time that the peer stopped. The first
// quarter of all stopping is left out: machines are busy at times, and buffers grow at first.
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

// unreadAt is how much was on its way at a point, if it was read at the rate that is known now whenever
// there was something to read.
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

// rest is how long after the last point all will have been read that the peer has taken; 0 also when
// nothing is known about the reader.
func (b *backlog) rest() time.Duration {
	if b.rate == 0 {
		return 0
	}
	return time.Duration(b.level / b.rate * float64(time.Second))
}
