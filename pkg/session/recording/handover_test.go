package recording

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/streamshim/streamshim/internal/testutil"
	"github.com/streamshim/streamshim/internal/testutil/leak"
	"github.com/streamshim/streamshim/pkg/asciicast"
	"github.com/streamshim/streamshim/pkg/handover"
	"github.com/streamshim/streamshim/pkg/session"
	"github.com/streamshim/streamshim/pkg/workload"
)

// handOver brings a session and its recording to another recorder, by way of the encoded state.
func (f *fixture) handOver(t *testing.T, s *session.Session, change func(*State)) (*fixture, *session.Session) {
	t.Helper()
	next := *f
	next.Recorder = New(Config{Deny: f.config.Deny}, nil, slog.New(slog.DiscardHandler)) // which would record nothing
	next.registry = session.NewRegistry(slog.New(slog.DiscardHandler), next.Recorder)
	return &next, f.resumeIn(t, next.registry, s, change)
}

func (f *fixture) resumeIn(t *testing.T, to *session.Registry, s *session.Session, change func(*State)) *session.Session {
	t.Helper()
	files := handover.NewFiles()
	defer files.Close()
	frozen := s.Freeze(files)
	if encoded := frozen.Guards["recording"]; encoded != nil {
		var state State
		if err := handover.Decode(encoded, &state); err != nil {
			t.Fatal(err)
		}
		change(&state)
		var err error
		if frozen.Guards["recording"], err = handover.Encode(state); err != nil {
			t.Fatal(err)
		}
	}
	resumed, err := to.Resume(t.Context(), frozen, files)
	if err != nil {
		t.Fatal(err)
	}
	return resumed
}

// One file has all that was shown, in whichever program, character by character. To be resumed where it was frozen is the same.
func TestRecordingGoesOn(t *testing.T) {
	for name, deny := range map[string]bool{"allow": false, "deny": true} {
		t.Run(name, func(t *testing.T) {
			f := newFixture(t, func(c *Config) { c.Deny, c.Input = deny, true })
			s := f.begin(t, info)
			shown, typed := strings.Repeat("zum Beispiel: äöü€𝄞\r\n", 2000), strings.Repeat("ß𝄞", 3000)
			for outLeft, inLeft := []byte(shown), []byte(typed); len(outLeft)+len(inLeft) > 0; {
				n := min(rand.IntN(997), len(outLeft))
				if err := s.Taps.Output(session.Stdout, outLeft[:n]); err != nil {
					t.Fatal(err)
				}
				outLeft = outLeft[n:]
				n = min(rand.IntN(451), len(inLeft))
				if err := s.Taps.Input(inLeft[:n]); err != nil {
					t.Fatal(err)
				}
				inLeft = inLeft[n:]
				switch rand.IntN(3) {
				case 0:
					f, s = f.handOver(t, s, func(*State) {})
				case 1:
					if same := f.resumeIn(t, f.registry, s, func(*State) {}); same != s {
						t.Fatal("another session was thawed")
					}
				}
			}
			s.End(session.Outcome{Reason: "exited", ExitCode: 3})
			c := f.only(t)
			if got := c.text("o"); got != shown {
				t.Errorf("%d bytes of output are recorded, of %d, or others", len(got), len(shown))
			}
			if got := c.text("i"); got != typed {
				t.Errorf("%d bytes of input are recorded, of %d, or others", len(got), len(typed))
			}
			if marks := c.text("m"); marks != "streamshim: the session has ended: exited, exit code 3" {
				t.Errorf("marked: %q", marks)
			}
		})
	}
}

// read is the only recording, which may be broken.
func (f *fixture) read(t *testing.T) (cast, error) {
	t.Helper()
	f.Close()
	file, err := os.Open(f.files(t)[0])
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	reader, err := asciicast.NewReader(file)
	if err != nil {
		return cast{}, err
	}
	c := cast{width: reader.Header.Width, height: reader.Header.Height, header: map[string]any{"title": reader.Header.Title}}
	for {
		event, err := reader.Next()
		if errors.Is(err, io.EOF) {
			return c, nil
		}
		if err != nil {
			return c, err
		}
		c.events = append(c.events, castEvent{event.Time.Seconds(), event.Code, event.Data})
	}
}

// scenarios are what a recording has to know after a hand-over. Each ends its session and returns what is wrong.
var scenarios = []func(t *testing.T, change func(*State)) error{
	func(t *testing.T, change func(*State)) error {
		f := newFixture(t, func(c *Config) { c.Input = true })
		s := f.begin(t, info)
		s.Taps.Resize(workload.Size{Width: 100, Height: 50})
		s.Taps.Output(session.Stdout, []byte("one \xe2\x82"))
		s.Taps.Output(session.Stderr, []byte("two \xe2"))
		s.Taps.Input([]byte("three \xe2\x82"))
		f, s = f.handOver(t, s, func(state *State) {
			state.Last += time.Hour
			change(state)
		})
		place := f.places[f.config.Directory]
		written := place != nil && place.live[filepath.Base(f.files(t)[0])] && place.liveBytes > 0
		s.Taps.Resize(workload.Size{Width: 100, Height: 50})
		s.Taps.Resize(workload.Size{Width: 60, Height: 20})
		s.Taps.Output(session.Stdout, []byte("\xac."))
		s.Taps.Output(session.Stderr, []byte("\x82\xac."))
		s.Taps.Input([]byte("\xac."))
		s.Taps.Resize(workload.Size{Width: 80, Height: 24})
		s.End(session.Outcome{Reason: "exited", ExitCode: -1})
		c, err := f.read(t)
		if err != nil {
			return err
		}
		if c.width != 100 || c.text("o") != "one two €.€." || c.text("i") != "three €." || c.text("r") != "60x2080x24" {
			return fmt.Errorf("recorded: %d columns, %q, %q, sizes %q", c.width, c.text("o"), c.text("i"), c.text("r"))
		}
		if !written {
			return errors.New("the file is not taken to be written")
		}
		if last := c.events[len(c.events)-1]; last.time < time.Hour.Seconds() {
			return fmt.Errorf("the time goes back to %v", last.time)
		}
		return nil
	},
	// Without any output the first size still belongs into the header, and what is shown of the command is as it was.
	func(t *testing.T, change func(*State)) error {
		f := newFixture(t, func(c *Config) { c.Command = session.CommandFull })
		f, s := f.handOver(t, f.begin(t, info), change)
		s.Taps.Resize(workload.Size{Width: 33, Height: 22})
		s.End(session.Outcome{Reason: "exited", ExitCode: -1})
		if c, err := f.read(t); err != nil || c.width != 33 || !strings.Contains(fmt.Sprint(c.header["title"]), "/bin/bash -l") {
			return fmt.Errorf("header: %v, %w", c.header, err)
		}
		return nil
	},
	// The size's limit is that of the whole file.
	func(t *testing.T, change func(*State)) error {
		const limit = 4096
		f := newFixture(t, func(c *Config) { c.MaxSize = limit })
		s := f.begin(t, info)
		for range 20 {
			s.Taps.Output(session.Stdout, bytes.Repeat([]byte("x"), limit/10))
			f, s = f.handOver(t, s, change)
		}
		s.End(session.Outcome{Reason: "exited", ExitCode: -1})
		if c, err := f.read(t); err != nil || len(c.text("o")) > limit || !strings.Contains(c.text("m"), "limit") {
			return fmt.Errorf("%d bytes of output, %q, %w", len(c.text("o")), c.text("m"), err)
		}
		return nil
	},
	// Nothing is shown behind the end of a recording that has to be there.
	func(t *testing.T, change func(*State)) error {
		f := newFixture(t, func(c *Config) { c.MaxSize, c.Deny = 2048, true })
		s := f.begin(t, info)
		for s.Taps.Output(session.Stdout, []byte("xxxxxxxxxxxxxxxx")) == nil {
		}
		for range 3 {
			f, s = f.handOver(t, s, change)
			if s.Taps.Output(session.Stdout, []byte("y")) == nil {
				return errors.New("something was shown")
			}
		}
		var end *session.EndError
		if !errors.As(context.Cause(s.Context()), &end) || end.Reason != "recording-failed" {
			return fmt.Errorf("the session ends with %v", context.Cause(s.Context()))
		}
		s.End(session.Outcome{Reason: "exited", ExitCode: -1})
		f.Close()
		return nil
	},
	// A recording that has gaps is incomplete once.
	func(t *testing.T, change func(*State)) error {
		f := newFixture(t, nil)
		s := f.begin(t, info)
		f.recordings[s].overflow()
		if f.Incomplete() != 1 {
			t.Fatal("it is not counted")
		}
		f, s = f.handOver(t, s, change)
		if rec := f.recordings[s]; rec != nil {
			rec.overflow()
		}
		s.End(session.Outcome{Reason: "exited", ExitCode: -1})
		f.Close()
		if n := f.Incomplete(); n != 0 {
			return fmt.Errorf("it is counted another %d times", n)
		}
		return nil
	},
}

func TestStateOfARecording(t *testing.T) {
	testutil.DropEachField(t, func(t *testing.T, change func(*State)) error {
		var errs []error
		for _, scenario := range scenarios {
			errs = append(errs, scenario(t, change))
		}
		return errors.Join(errs...)
	})
}

// A file that is frozen is not removed to make room for others.
func TestFrozenRecordingStays(t *testing.T) {
	f := newFixture(t, func(c *Config) { c.MaxFiles = 1 })
	s := f.begin(t, info)
	files := handover.NewFiles()
	frozen := s.Freeze(files)
	f.begin(t, info).End(session.Outcome{})
	if err := f.Settle(t.Context()); err != nil {
		t.Fatal(err)
	}
	place := f.places[f.config.Directory]
	place.retain(f.config)
	if _, err := os.Stat(filepath.Join(f.config.Directory, fileName(s))); err != nil {
		t.Error(err)
	}
	if _, err := f.registry.Resume(t.Context(), frozen, files); err != nil {
		t.Fatal(err)
	}
	s.End(session.Outcome{})
	f.Close()
	if place.liveBytes != 0 || len(place.live) != 0 {
		t.Errorf("%d bytes of %v are taken to be written", place.liveBytes, place.live)
	}
}

// A recording that cannot be carried ends its session only where nothing may go unrecorded.
func TestRecordingThatIsNotCarried(t *testing.T) {
	for name, deny := range map[string]bool{"allow": false, "deny": true} {
		f := newFixture(t, func(c *Config) { c.Deny = deny })
		next, s := f.handOver(t, f.begin(t, info), func(state *State) { state.Version = 99 })
		if stopped := s.Context().Err() != nil; stopped != deny {
			t.Errorf("%s: stopped: %v", name, stopped)
		}
		s.End(session.Outcome{})
		next.Close()
	}
}

func FuzzState(f *testing.F) {
	leak.Check(f)
	directory := f.TempDir()
	valid, err := handover.Encode(State{Version: stateVersion, Path: filepath.Join(directory, "x"+Suffix), Buffer: 1 << 20, Deny: true, Over: true})
	if err != nil {
		f.Fatal(err)
	}
	f.Add(valid)
	f.Fuzz(func(_ *testing.T, encoded []byte) {
		r := New(Config{}, nil, slog.New(slog.DiscardHandler))
		registry := session.NewRegistry(slog.New(slog.DiscardHandler), r)
		s, err := registry.Begin(context.Background(), info)
		if err != nil {
			return
		}
		r.Resume(s, encoded, handover.NewFiles())
		s.End(session.Outcome{})
		r.Close()
	})
}
