package holdback

import (
	"math"
	"testing"
	"time"
)

// river is a command's output on its way: through our window, to a peer that holds it in memory, the buffers behind the
// peer, and a reader. Time passes in steps.
type river struct {
	tank     float64 // bytes that the buffers behind the peer hold
	step     float64 // a full tank accepts more when this much of it is free, for example a third of a socket's buffer
	speed    float64 // bytes a second that the peer moves while there is room
	output   func(at float64) float64
	reader   func(at float64) float64 // bytes a second
	duration float64                  // of the output, in seconds
}

// run returns how long the reader still needs when all was sent, and what the model estimates then.
func (r river) run() (needed, estimated time.Duration) {
	const tick = 0.001
	type asked struct{ bytes, first, at float64 }
	var (
		model               backlog
		questions           []asked
		sent, taken, read   float64
		asking, first       float64
		full                bool
		base                = time.Unix(1000, 0)
		moment              = func(at float64) time.Time { return base.Add(time.Duration(at * float64(time.Second))) }
		at, last, remaining float64
	)
	for ; ; at += tick {
		produced := r.output(min(at, r.duration))
		// As the window does it.
		window := min(256<<10+max(0, taken-16<<20)/16, 8<<20)
		before := sent
		if sent = max(sent, min(produced, taken+window)); before == asking && sent > before {
			first = at
		}
		if every := min(window/2, 1<<20); sent-asking >= every || (at >= r.duration && sent == produced && asking < sent) {
			questions, asking = append(questions, asked{sent, first, at}), sent
		}
		read = min(taken, read+r.reader(at)*tick)
		room := r.tank - (taken - read)
		if full && room >= r.step {
			full = false
		}
		if !full {
			taken = min(sent, taken+min(room, r.speed*tick))
			full = taken < sent && taken-read >= r.tank-1
		}
		for len(questions) > 0 && questions[0].bytes <= taken {
			model.took(receipt{
				bytes: int64(questions[0].bytes), first: moment(questions[0].first), asked: moment(questions[0].at), came: moment(at),
			})
			last = at
			questions = questions[1:]
		}
		if at >= r.duration && taken >= produced {
			break
		}
	}
	for remaining = at; read < taken; remaining += tick {
		read += r.reader(remaining) * tick
	}
	seconds := func(s float64) time.Duration { return time.Duration(s * float64(time.Second)) }
	return seconds(remaining - last), model.rest()
}

func constant(pace float64) func(float64) float64 { return func(float64) float64 { return pace } }

// burst returns output that is all there at once.
func burst(size float64) func(float64) float64 { return func(float64) float64 { return size } }

// TestBacklog checks that the model estimates how long a reader still needs, and estimates nothing if it has seen nothing.
func TestBacklog(t *testing.T) {
	const mb = 1e6
	for _, test := range []struct {
		name     string
		river    river
		min, max float64 // of the estimate, relative to what is needed; both 0: no wait at all
	}{
		{"slow reader", river{output: burst(20 * mb), reader: constant(1.25 * mb)}, 0.95, 1.6},
		{"slow reader, a long output", river{output: burst(300 * mb), reader: constant(1.25 * mb)}, 0.95, 1.6},
		{"very slow reader", river{output: burst(12 * mb), reader: constant(0.1 * mb)}, 0.95, 1.7},
		{"reader of 10 MB/s", river{output: burst(100 * mb), reader: constant(10 * mb)}, 0.95, 1.6},
		{"busy machine", river{speed: 10 * mb, output: burst(20 * mb), reader: constant(1.25 * mb)}, 0.95, 1.6},
		{"smaller buffers", river{tank: 3 * mb, step: 0.5 * mb, output: burst(20 * mb), reader: constant(1.25 * mb)}, 0.95, 1.6},
		{"little more than the buffers take", river{output: burst(10 * mb), reader: constant(1.25 * mb)}, 0.95, 2.5},
		{"hardly more than the buffers take", river{output: burst(9.1 * mb), reader: constant(1.25 * mb)}, 0.95, 1.7},
		{"no more than the buffers take", river{output: burst(8 * mb), reader: constant(1.25 * mb)}, 0, 0},
		{"fast reader", river{output: burst(500 * mb), reader: constant(400 * mb)}, 0, 0},
		{"reader faster than the command", river{
			duration: 60, output: func(at float64) float64 { return at * 2 * mb }, reader: constant(100 * mb),
		}, 0, 0},
		{"reader a little slower than the command", river{
			duration: 60, output: func(at float64) float64 { return at * 2 * mb }, reader: constant(1.5 * mb),
		}, 0.9, 1.6},
		{"burst, then nothing for a minute", river{
			duration: 60, output: func(at float64) float64 { return 20 * mb }, reader: constant(1.25 * mb),
		}, 0, 0},
		{"burst, then a trickle", river{
			duration: 60, output: func(at float64) float64 { return 20*mb + at*10_000 }, reader: constant(1.25 * mb),
		}, 0, 0},
		{"trickle, then a burst", river{
			duration: 60, output: func(at float64) float64 {
				if at < 59.9 {
					return at * 10_000
				}
				return 20 * mb
			}, reader: constant(1.25 * mb),
		}, 0.95, 1.6},
		{"two bursts with a pause, the second no more than the buffers take", river{
			duration: 40, output: func(at float64) float64 {
				if at < 39.9 {
					return 20 * mb
				}
				return 27 * mb
			}, reader: constant(1.25 * mb),
		}, 0.95, 1.6},
		{"reader that becomes slower", river{output: burst(60 * mb), reader: func(at float64) float64 {
			if at < 5 {
				return 8 * mb
			}
			return 1.25 * mb
		}}, 0.95, 2},
		{"reader that was slow once", river{output: burst(200 * mb), reader: func(at float64) float64 {
			if at < 5 {
				return 1.25 * mb
			}
			return 400 * mb
		}}, 0, 0},
		{"reader that stood still once", river{output: burst(200 * mb), reader: func(at float64) float64 {
			if at > 0.1 && at < 3 {
				return 0
			}
			return 400 * mb
		}}, 0, 0},
		{"reader that pauses each second", river{output: burst(40 * mb), reader: func(at float64) float64 {
			if math.Mod(at, 1) < 0.5 {
				return 0
			}
			return 3 * mb
		}}, 0.85, 1.6},
		{"machine that stood still for a moment", river{output: burst(100 * mb), reader: func(at float64) float64 {
			if at > 0.2 && at < 0.4 {
				return 0
			}
			return 400 * mb
		}}, 0, 0},
	} {
		t.Run(test.name, func(t *testing.T) {
			r := test.river
			if r.tank == 0 {
				r.tank, r.step = 9*mb, 1.4*mb
			}
			if r.speed == 0 {
				r.speed = 400 * mb
			}
			needed, estimated := r.run()
			t.Logf("needed %v, estimated %v", needed.Round(time.Millisecond), estimated.Round(time.Millisecond))
			if test.max == 0 {
				// It costs nothing to wait as long as a fast reader needs anyway.
				if estimated > max(needed, 50*time.Millisecond) {
					t.Errorf("a wait of %v, the reader needs %v", estimated, needed)
				}
				return
			}
			if part := estimated.Seconds() / needed.Seconds(); part < test.min || part > test.max {
				t.Errorf("estimated %v, needed %v", estimated, needed)
			}
		})
	}
}
