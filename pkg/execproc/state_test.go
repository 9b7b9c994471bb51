package execproc

import (
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"slices"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/streamshim/streamshim/pkg/execproc/internal/reaper"
	"github.com/streamshim/streamshim/pkg/execproc/internal/record"
	"github.com/streamshim/streamshim/pkg/execproc/internal/stdio"
	"github.com/streamshim/streamshim/pkg/execproc/internal/tree"
	"github.com/streamshim/streamshim/pkg/handover"
	"github.com/streamshim/streamshim/pkg/workload"
)

// TestEachFieldOfTheState checks that each field of a process's state is set for some process here, and is the same when
// the process resumed from it is frozen again. It finds a field that is not written, not read, not taken from the process
// or not given to it.
func TestEachFieldOfTheState(t *testing.T) {
	r := newRunner(t)
	c := newContainer(t)
	ignoring := "trap '' HUP TERM; sleep 100000 & "
	samples := map[string]func(t *testing.T) *Process{
		"pipes": func(t *testing.T) *Process {
			p := start(t, r, c, workload.Command{Args: []string{"cat"}, Stdin: true, Stdout: true, Stderr: true})
			p.standIn = "tar"
			return p
		},
		"an unfinished line on a terminal": func(t *testing.T) *Process {
			p := start(t, r, c, workload.Command{Args: shell("stty raw; echo ready; exec sleep 100000"), Stdin: true, Stdout: true, TTY: true})
			awaitText(t, p.Stdout(), "ready")
			io.WriteString(p.Stdin(), "x")
			p.Stdin().Close()
			return p
		},
		"exited": func(t *testing.T) *Process {
			own := newContainer(t)
			p := start(t, r, own, workload.Command{Args: shell("exit 6")})
			closes(t, p.Exited(), "its end")
			unix.Kill(own.InitPid, unix.SIGKILL)
			closes(t, p.ContainerExited(), "the container's end")
			return p
		},
		"being ended": func(t *testing.T) *Process {
			term := newMarker()
			script := "sleep 100000 & " + ignoring + "trap 'touch /tmp/" + term + "; exec sleep 100000' TERM; echo ready; while :; do wait; done"
			p := start(t, r, c, workload.Command{Args: shell(script), Stdin: true, Stdout: true, Stderr: true})
			awaitText(t, p.Stdout(), "ready")
			p.runner.config.KillAfter = time.Hour
			p.Disconnect()
			p.Close()
			eventually(t, "SIGTERM was sent", func() bool { _, err := os.Stat(filepath.Join(rootfs, "tmp", term)); return err == nil })
			return p
		},
		"being ended without its leader": func(t *testing.T) *Process {
			script := ignoring + "trap - HUP TERM; echo ready; exec sleep 100000"
			p := start(t, r, c, workload.Command{Args: shell(script), Stdin: true, Stdout: true, Stderr: true})
			awaitText(t, p.Stdout(), "ready")
			p.Disconnect()
			p.Close()
			closes(t, p.Exited(), "the leader's end")
			return p
		},
		"killed": func(t *testing.T) *Process {
			own := newContainer(t)
			p := start(t, r, own, workload.Command{Args: shell("sleep 100000 & (sleep 0.2 &) ; wait"), Stdin: true, Stdout: true, Stderr: true})
			p.probe.Store(true)
			eventually(t, "its children are there", func() bool { return len(tree.New(p.leader, own.InitPid, p.ends).Living()) >= 2 })
			runc(t, own, "pause", own.ContainerID) // so that SIGKILL has no effect
			t.Cleanup(func() { runc(t, own, "resume", own.ContainerID) })
			p.Kill()
			eventually(t, "SIGKILL was sent", func() bool { stat := mustStat(t, p.PID()); return stat.Killed })
			return p
		},
		"over": func(t *testing.T) *Process {
			p := start(t, r, c, workload.Command{Args: []string{"sleep", "100000"}, Stdout: true, TTY: true})
			p.Kill()
			closes(t, p.ended, "the tree's end")
			return p
		},
		"kept": func(t *testing.T) *Process {
			p := start(t, r, c, workload.Command{Args: []string{"sleep", "100000"}, Stdin: true, Stdout: true})
			p.policy = PolicyKeep
			p.Disconnect()
			p.Close()
			return p
		},
		"kept with a terminal": func(t *testing.T) *Process {
			p := start(t, r, c, workload.Command{Args: []string{"sleep", "100000"}, Stdin: true, Stdout: true, TTY: true})
			p.policy = PolicyKeep
			p.Disconnect()
			p.Close()
			return p
		},
		"what is left of a predecessor's": func(t *testing.T) *Process {
			ended := start(t, r, c, workload.Command{Args: shell("exit 0")})
			closes(t, ended.Exited(), "its end")
			own := newContainer(t)
			p := start(t, r, own, workload.Command{Args: shell(ignoring + "wait; wait"), Stdin: true, Stdout: true})
			path := p.record + ".stranger"
			r.endLeftover(record.Record{
				Container: own.ContainerID, InitPid: own.InitPid, InitStart: own.InitStartTime, Pid: ended.leader.Pid, Start: ended.leader.Start,
				Pipes: slices.Sorted(maps.Keys(p.ends.Pipes)), Ending: true, Policy: PolicyHangup,
			}, path)
			var found *Process
			for _, other := range r.watched() {
				if other.record == path {
					found = other
				}
			}
			eventually(t, "the tree was looked for", func() bool { found.mu.Lock(); defer found.mu.Unlock(); return !found.looking })
			t.Cleanup(func() { p.Kill(); closes(t, p.ended, "its end") })
			return found
		},
		"a predecessor's": func(t *testing.T) *Process {
			p := start(t, r, c, workload.Command{Args: shell(ignoring + "wait; wait"), Stdin: true, Stdout: true})
			path := p.record + ".stranger"
			r.endLeftover(record.Record{Container: c.ContainerID, InitPid: c.InitPid, Pid: p.leader.Pid, Start: p.leader.Start, Policy: PolicyHangup}, path)
			var found *Process
			for _, other := range r.watched() {
				if other.record == path {
					found = other
				}
			}
			eventually(t, "the tree was looked for", func() bool { found.mu.Lock(); defer found.mu.Unlock(); return !found.looking })
			t.Cleanup(func() { p.Kill(); closes(t, p.ended, "its end") })
			return found
		},
	}
	seen := map[string]bool{}
	for name, sample := range samples {
		t.Run(name, func(t *testing.T) {
			var p *Process
			t.Cleanup(func() { p.Kill(); p.Close(); closes(t, p.Exited(), "its end") })
			p = sample(t)
			files := handover.NewFiles()
			defer files.Close()
			var states []processState
			for range 3 {
				state, err := p.freeze(files)
				if err != nil {
					t.Fatal(err)
				}
				p.Discard()
				states = append(states, known(t, state))
				encoded, err := handover.Encode(state)
				if err != nil {
					t.Fatal(err)
				}
				if p, err = r.ResumeProcess(t.Context(), encoded, files); err != nil {
					t.Fatal(err)
				}
			}
			fieldsOf(reflect.ValueOf(states[0]), "", seen)
			for _, again := range states[1:] {
				sameTimes(reflect.ValueOf(&again).Elem(), reflect.ValueOf(states[0]))
				if !reflect.DeepEqual(states[0], again) {
					t.Errorf("frozen\n%+v %+v %+v %+v\nand again\n%+v %+v %+v %+v", states[0], states[0].Pipes, states[0].Terminal, states[0].Ending,
						again, again.Pipes, again.Terminal, again.Ending)
				}
			}
		})
	}
	all := map[string]bool{}
	fieldTypes(reflect.TypeFor[processState](), "", all)
	for path := range all {
		if !seen[path] {
			t.Errorf("no process here has %s", path)
		}
	}
}

// known replaces descriptors by their files, and sorts what has no order.
func known(t *testing.T, s processState) processState {
	t.Helper()
	file := func(d *handover.Descriptor) {
		var stat unix.Stat_t
		if *d != 0 {
			if err := unix.Fstat(int(*d), &stat); err != nil {
				t.Fatal(err)
			}
			*d = handover.Descriptor(stat.Ino<<8 | stat.Rdev) //nolint:gosec // a number to compare
		}
	}
	copied := s
	if s.Pipes != nil {
		pipes := *s.Pipes
		copied.Pipes = &pipes
		file(&pipes.Stdin.Descriptor)
		file(&pipes.Stdout.Descriptor)
		file(&pipes.Stderr.Descriptor)
	}
	if s.Terminal != nil {
		terminal := *s.Terminal
		copied.Terminal = &terminal
		file(&terminal.Descriptor)
	}
	copied.Kept = slices.Clone(s.Kept)
	for i := range copied.Kept {
		file(&copied.Kept[i].Descriptor)
	}
	if s.Ending != nil {
		ending := *s.Ending
		copied.Ending = &ending
		ending.Tree.Members, ending.Tree.Watched = slices.Clone(s.Ending.Tree.Members), slices.Clone(s.Ending.Tree.Watched)
		slices.SortFunc(ending.Tree.Members, func(a, b tree.MemberState) int { return a.Pid - b.Pid })
		for i := range ending.Tree.Watched {
			file(&ending.Tree.Watched[i].Descriptor)
		}
	}
	return copied
}

// sameTimes replaces times by those of another value if they are nearly equal.
func sameTimes(v, of reflect.Value) {
	switch {
	case v.Type() == reflect.TypeFor[handover.Instant]():
		if d := time.Duration(v.Int() - of.Int()); d.Abs() < 100*time.Millisecond {
			v.SetInt(of.Int())
		}
	case v.Kind() == reflect.Pointer && !v.IsNil() && !of.IsNil():
		sameTimes(v.Elem(), of.Elem())
	case v.Kind() == reflect.Struct:
		for i := range v.NumField() {
			sameTimes(v.Field(i), of.Field(i))
		}
	}
}

// fieldsOf records the fields of a value that are not zero.
func fieldsOf(v reflect.Value, path string, seen map[string]bool) {
	switch v.Kind() {
	case reflect.Pointer:
		if !v.IsNil() {
			fieldsOf(v.Elem(), path, seen)
		}
	case reflect.Slice:
		for i := range v.Len() {
			fieldsOf(v.Index(i), path, seen)
		}
	case reflect.Struct:
		for i := range v.NumField() {
			fieldsOf(v.Field(i), path+"."+v.Type().Field(i).Name, seen)
		}
	default:
		seen[path] = seen[path] || !v.IsZero()
	}
}

func fieldTypes(of reflect.Type, path string, all map[string]bool) {
	switch of.Kind() {
	case reflect.Pointer, reflect.Slice:
		fieldTypes(of.Elem(), path, all)
	case reflect.Struct:
		for i := range of.NumField() {
			fieldTypes(of.Field(i).Type, path+"."+of.Field(i).Name, all)
		}
	default:
		all[path] = true
	}
}

// TestThawLeavesChildrenAlone checks that in the same program os/exec still waits for its children.
func TestThawLeavesChildrenAlone(t *testing.T) {
	r := newRunner(t)
	command := exec.Command("sh", "-c", "read line; exit 3")
	in, err := command.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := command.Start(); err != nil {
		t.Fatal(err)
	}
	refreeze(t, r)
	in.Close()
	eventually(t, "it has ended", func() bool { stat := mustStat(t, command.Process.Pid); return stat.Zombie() })
	r.reaper.ReapOrphans()
	var exit *exec.ExitError
	if err := command.Wait(); !errors.As(err, &exit) || exit.ExitCode() != 3 {
		t.Errorf("%v", err)
	}
}

// TestFreezeWithoutDescriptors checks that a freeze for which there is no descriptor fails and leaves everything as it was.
func TestFreezeWithoutDescriptors(t *testing.T) {
	r := newRunner(t, func(config *Config) { config.OnDisconnect = PolicyKeep })
	c := newContainer(t)
	p := start(t, r, c, workload.Command{Args: shell(echo), Stdin: true, Stdout: true})
	kept := start(t, r, c, workload.Command{Args: shell("while :; do echo x; echo x > /tmp/alive; done"), Stdin: true, Stdout: true, Stderr: true})
	kept.Disconnect()
	kept.Close()
	if err := r.Quiesce(t.Context()); err != nil {
		t.Fatal(err)
	}
	files := handover.NewFiles()
	defer files.Close()
	withoutDescriptors(t, func() {
		if _, err := p.Freeze(files); !errors.Is(err, unix.EMFILE) {
			t.Errorf("freeze a process: %v", err)
		}
	})
	io.WriteString(p.Stdin(), "a\n")
	awaitText(t, p.Stdout(), "got a")
	state, err := p.Freeze(files)
	if err != nil {
		t.Fatal(err)
	}
	p.Discard()
	withoutDescriptors(t, func() {
		if _, err := r.Freeze(files); !errors.Is(err, unix.EMFILE) {
			t.Errorf("freeze the Runner: %v", err)
		}
	})
	if p, err = r.ResumeProcess(t.Context(), state, files); err != nil {
		t.Fatal(err)
	}
	r.EndUnclaimed(files)
	io.WriteString(p.Stdin(), "b\n")
	awaitText(t, p.Stdout(), "got b")
	p.Stdin().Close()
	if code := exitCode(t, p); code != 7 {
		t.Errorf("exit code %d", code)
	}
	p.Close()
	alive := filepath.Join(rootfs, "tmp", "alive")
	os.Remove(alive)
	eventually(t, "the kept one goes on", func() bool { _, err := os.Stat(alive); return err == nil })
	if _, err := r.RunSync(context.Background(), c, workload.SyncCommand{Args: []string{"true"}}); err != nil {
		t.Error(err)
	}
	kept.Kill() // has no effect: it was resumed as another
	for _, p := range r.watched() {
		p.Kill()
		closes(t, p.Exited(), "its end")
	}
}

func withoutDescriptors(t *testing.T, f func()) {
	t.Helper()
	var limit unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &limit); err != nil {
		t.Fatal(err)
	}
	few := limit
	few.Cur = 4 // all that are allowed are in use
	if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &few); err != nil {
		t.Fatal(err)
	}
	defer unix.Setrlimit(unix.RLIMIT_NOFILE, &limit)
	f()
}

// TestDecodeState checks that a damaged state, or one of another version, is an error.
func TestDecodeState(t *testing.T) {
	good := processState{Version: stateVersion, Pid: 1 << 30, Start: 1, Policy: PolicyHangup}
	for what, change := range map[string]func(*processState){
		"":          func(*processState) {},
		"version":   func(s *processState) { s.Version++ },
		"pid":       func(s *processState) { s.Pid = 1 },
		"own pid":   func(s *processState) { s.Pid = os.Getpid() },
		"policy":    func(s *processState) { s.Policy = "" },
		"two kinds": func(s *processState) { s.Pipes, s.Terminal = &pipesState{}, &terminalState{} },
		"stage":     func(s *processState) { s.Ending = &endingState{Stage: 9} },
		"no stage":  func(s *processState) { s.Ending = &endingState{Stage: -1} },
		"endless": func(s *processState) {
			s.Terminal = &terminalState{Input: &stdio.InputState{Typing: &stdio.TypingState{}}}
		},
		"descriptor": func(s *processState) { s.Pipes = &pipesState{Stdin: streamState{true, 77}} },
	} {
		state := good
		change(&state)
		encoded, err := handover.Encode(state)
		if err != nil {
			t.Fatal(err)
		}
		_, err = decodeProcess(encoded)
		if ok := what == "" || what == "descriptor"; ok != (err == nil) {
			t.Errorf("%q: %v", what, err)
		}
		runner, err := handover.Encode(runnerState{Version: stateVersion, Own: [][]byte{encoded}})
		if err != nil {
			t.Fatal(err)
		}
		if ok := what == "" || what == "descriptor"; ok != (CheckState(runner) == nil) {
			t.Errorf("check %q: %v", what, CheckState(runner))
		}
	}
	if encoded, err := handover.Encode(runnerState{Version: stateVersion + 1}); err != nil || CheckState(encoded) == nil {
		t.Errorf("another version: %v", err)
	}
	r := newRunner(t)
	good.Watched, good.InitEnded, good.InitPid = true, true, os.Getpid()
	encoded, err := handover.Encode(good)
	if err != nil {
		t.Fatal(err)
	}
	p, err := r.ResumeProcess(t.Context(), encoded, handover.NewFiles())
	if err != nil {
		t.Fatal(err)
	}
	if code := exitCode(t, p); code != reaper.LostStatus {
		t.Errorf("a process that is not there ended with %d", code)
	}
	closes(t, p.ContainerExited(), "the end of a container that had ended before, whoever has its pid")
	p.Close()
	good.Pipes = &pipesState{Stdin: streamState{true, 77}}
	if encoded, err = handover.Encode(good); err != nil {
		t.Fatal(err)
	}
	if _, err := r.ResumeProcess(t.Context(), encoded, handover.NewFiles()); err == nil {
		t.Error("a file was taken that was not handed over")
	}
	if err := r.Resume(nil, handover.NewFiles()); err == nil {
		t.Error("resumed what is not frozen")
	}
}

func FuzzDecodeState(f *testing.F) {
	full := processState{
		Version: stateVersion, Pid: 1 << 30, Policy: PolicyHangup, Ends: tree.EndsState{Pipes: []string{"pipe:[1]"}}, Pipes: &pipesState{},
		Kept: []keptState{{Descriptor: 3}}, Ending: &endingState{Stage: stageTerm, Tree: tree.State{Members: []tree.MemberState{{Pid: 5}}, Watched: []tree.WatchedPipeState{{Descriptor: 4}}}},
	}
	process, err := handover.Encode(full)
	if err != nil {
		f.Fatal(err)
	}
	runner, err := handover.Encode(runnerState{Version: stateVersion, Own: [][]byte{process}, Sessions: [][]byte{process}, Children: []childState{{1, 2}}, Unheard: []int{1}})
	if err != nil {
		f.Fatal(err)
	}
	f.Add(process)
	f.Add(runner)
	f.Add([]byte(fmt.Sprint("\xa1gVersion\x01")))
	f.Fuzz(func(t *testing.T, data []byte) {
		_ = CheckState(data)
		s, err := decodeProcess(data)
		if err != nil {
			return
		}
		again, err := handover.Encode(s)
		if err != nil {
			t.Fatal(err)
		}
		if decoded, err := decodeProcess(again); err != nil || !reflect.DeepEqual(s, decoded) {
			t.Errorf("%+v\n%+v, %v", s, decoded, err)
		}
		// None of its descriptors was handed over, and there is no such process here.
		takeStreams(stdio.TakeFrom(handover.NewFiles()), s)
		s.Ends.Resume()
	})
}
