package audit

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/streamshim/streamshim/internal/testutil/leak"
	"github.com/streamshim/streamshim/pkg/session"
	"github.com/streamshim/streamshim/pkg/workload"
)

func fileConfig(t *testing.T) Config {
	return Config{
		Destination: File, File: filepath.Join(t.TempDir(), "logs", "audit.log"), MaxFiles: 3,
		Command: session.CommandArg0, Fsync: FsyncAlways,
	}
}

func newLog(t *testing.T, c Config) *Log {
	t.Helper()
	leak.Check(t)
	l, err := New(c, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(l.Close)
	return l
}

var info = session.Info{
	Kind:     session.Exec,
	Target:   workload.Target{PodName: "web", PodNamespace: "shop", ContainerName: "app", ContainerID: "c1", SandboxID: "s1", PodUID: "u1"},
	Command:  []string{"sh", "-c", "echo secret"},
	Protocol: "SPDY/3.1 v4.channel.k8s.io", Peer: "127.0.0.1:1", TTY: true,
	User: &session.User{UID: 1000, GID: 2000}, AuditID: "a-1",
}

func records(t *testing.T, path string) []Record {
	t.Helper()
	text, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	var all []Record
	for line := range bytes.Lines(text) {
		var r Record
		if err := json.Unmarshal(line, &r); err != nil || line[len(line)-1] != '\n' {
			t.Fatalf("%q: %v", line, err)
		}
		all = append(all, r)
	}
	return all
}

// begin admits a session through a registry with this log alone.
func begin(t *testing.T, l *Log) (*session.Session, error) {
	t.Helper()
	return session.NewRegistry(slog.New(slog.DiscardHandler), l).Begin(t.Context(), info)
}

func TestStartAndEnd(t *testing.T) {
	c := fileConfig(t)
	l := newLog(t, c)
	s, err := begin(t, l)
	if err != nil {
		t.Fatal(err)
	}
	s.End(session.Outcome{Reason: "exited", ExitCode: 0})
	l.Close()
	all := records(t, c.File)
	if len(all) != 2 {
		t.Fatalf("%d records", len(all))
	}
	first, last := all[0], all[1]
	if first.Event != Start || first.Session != s.ID || first.PodName != "web" || first.AuditID != "a-1" ||
		first.User.GID != 2000 || fmt.Sprint(first.Command) != "[sh]" || first.ExitCode != nil || first.Version != SchemaVersion {
		t.Errorf("start: %+v", first)
	}
	if last.Event != End || last.Session != s.ID || *last.ExitCode != 0 || last.Reason != "exited" || last.Duration == nil || *last.BytesIn != 0 {
		t.Errorf("end: %+v", last)
	}
	for path, mode := range map[string]os.FileMode{c.File: 0o600, filepath.Dir(c.File): 0o700} {
		if stat, err := os.Stat(path); err != nil || stat.Mode().Perm() != mode {
			t.Errorf("%s: %v, %v", path, stat.Mode(), err)
		}
	}
}

func TestCommandLevels(t *testing.T) {
	long := strings.Repeat("x", 20<<10)
	for _, test := range []struct {
		level session.CommandLevel
		args  []string
		want  string
		cut   bool
	}{
		{session.CommandNone, []string{"a", "b"}, "[]", false},
		{session.CommandArg0, []string{"a", "b"}, "[a]", false},
		{session.CommandFull, []string{"a", "b"}, "[a b]", false},
		{session.CommandFull, nil, "[]", false},
		{"", []string{"a"}, "[]", false}, // nothing by mistake
		{session.CommandFull, []string{"a", long}, "[a " + long[:16<<10-1] + "]", true},
	} {
		got, cut := test.level.Visible(test.args)
		if fmt.Sprint(got) != test.want || cut != test.cut {
			t.Errorf("%q of %.20v: %.40v, %v", test.level, test.args, got, cut)
		}
	}
}

// A file that is removed or renamed under the log is made again, and no record is lost.
func TestFileMovedAway(t *testing.T) {
	c := fileConfig(t)
	l := newLog(t, c)
	write := func() {
		t.Helper()
		s, err := begin(t, l)
		if err != nil {
			t.Fatal(err)
		}
		s.End(session.Outcome{Reason: "exited"})
		flush(t, l)
	}
	write()
	if err := os.Rename(c.File, c.File+".moved"); err != nil {
		t.Fatal(err)
	}
	write()
	if got := len(records(t, c.File)); got != 2 {
		t.Errorf("%d records after the rename", got)
	}
	if err := os.RemoveAll(filepath.Dir(c.File)); err != nil {
		t.Fatal(err)
	}
	write()
	if got := len(records(t, c.File)); got != 2 {
		t.Errorf("%d records after the removal", got)
	}
	// As "logrotate copytruncate" does.
	if err := os.Truncate(c.File, 0); err != nil {
		t.Fatal(err)
	}
	write()
	if got := len(records(t, c.File)); got != 2 {
		t.Errorf("%d records after the truncation", got)
	}
}

// flush returns when all that was put before is written.
func flush(t *testing.T, l *Log) {
	t.Helper()
	written := make(chan error, 1)
	if err := l.put(entry{line: (&Record{Event: Lost}).line(), written: written}); err != nil {
		t.Fatal(err)
	}
	if err := <-written; err != nil {
		t.Fatal(err)
	}
	// The marker itself is not to be seen by the test.
	path := l.current().File
	text, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(path, int64(bytes.LastIndexByte(text[:len(text)-1], '\n')+1)); err != nil {
		t.Fatal(err)
	}
}

func TestRotation(t *testing.T) {
	c := fileConfig(t)
	c.MaxSize, c.MaxFiles = 4<<10, 2
	l := newLog(t, c)
	for range 40 {
		s, err := begin(t, l)
		if err != nil {
			t.Fatal(err)
		}
		s.End(session.Outcome{Reason: "exited"})
	}
	l.Close()
	files, _ := filepath.Glob(c.File + "*")
	if len(files) != 3 {
		t.Errorf("files: %v", files)
	}
	for _, path := range files {
		stat, err := os.Stat(path)
		if err != nil || stat.Size() > c.MaxSize || stat.Mode().Perm() != 0o600 {
			t.Errorf("%s: %d bytes, %v, %v", path, stat.Size(), stat.Mode(), err)
		}
		records(t, path)
	}
}

// Files beyond a max_files that was lowered go at the next rotation.
func TestFewerFiles(t *testing.T) {
	c := fileConfig(t)
	if err := os.MkdirAll(filepath.Dir(c.File), 0o700); err != nil {
		t.Fatal(err)
	}
	for n := 1; n <= 9; n++ {
		if err := os.WriteFile(fmt.Sprintf("%s.%d", c.File, n), nil, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	s, err := openFile(c.File, 1, 3)
	if err != nil {
		t.Fatal(err)
	}
	defer s.close()
	for range 2 {
		if err := s.write([]byte("{}\n")); err != nil {
			t.Fatal(err)
		}
	}
	if files, _ := filepath.Glob(c.File + ".*"); len(files) != 3 {
		t.Errorf("files: %v", files)
	}
}

// tmpfs mounts a file system of this size, so that a full disk is a real one.
func tmpfs(t *testing.T, size string) string {
	t.Helper()
	dir := t.TempDir()
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, "size="+size); err != nil {
		t.Skipf("mount a tmpfs: %v", err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(dir, 0); err != nil {
			t.Error(err)
		}
	})
	return dir
}

// fill takes all the room there is, and gives it back when called.
func fill(t *testing.T, dir string) (free func()) {
	t.Helper()
	path := filepath.Join(dir, "filler")
	file, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	for chunk := make([]byte, 4096); err == nil; {
		_, err = file.Write(chunk)
	}
	if !errors.Is(err, unix.ENOSPC) {
		t.Fatal(err)
	}
	return func() {
		if err := os.Remove(path); err != nil {
			t.Fatal(err)
		}
	}
}

// With a full disk, deny refuses sessions and allow counts what is lost; both recover, and no line
// is ever torn.
func TestFullDisk(t *testing.T) {
	for _, deny := range []bool{true, false} {
		t.Run(fmt.Sprintf("deny=%v", deny), func(t *testing.T) {
			leak.Check(t)
			dir := tmpfs(t, "64k")
			c := fileConfig(t)
			c.File, c.Deny = filepath.Join(dir, "audit.log"), deny
			l, err := New(c, slog.New(slog.DiscardHandler))
			if err != nil {
				t.Fatal(err)
			}
			defer l.Close()
			s, err := begin(t, l)
			if err != nil {
				t.Fatal(err)
			}
			s.End(session.Outcome{Reason: "exited"})
			free := fill(t, dir)
			refused := 0
			for range 40 { // the last page of the file has some room left
				s, err := begin(t, l)
				var refusal *session.RefusedError
				switch {
				case err == nil:
					s.End(session.Outcome{Reason: "exited"})
				case errors.As(err, &refusal) && refusal.Refusal == session.Unavailable:
					refused++
				default:
					t.Fatal(err)
				}
			}
			if deny != (refused > 0) {
				t.Errorf("%d sessions were refused", refused)
			}
			waitForEmptyQueue(t, l)
			free()
			if s, err = begin(t, l); err != nil {
				t.Fatalf("with room again: %v", err)
			}
			s.End(session.Outcome{Reason: "exited"})
			l.Close()
			all := records(t, c.File)
			var lost int64
			for _, r := range all {
				lost += r.LostRecords
			}
			if lost == 0 || l.Lost() != lost {
				t.Errorf("the log says that %d records were lost, and it were %d", lost, l.Lost())
			}
			if last := all[len(all)-1]; last.Session != s.ID || last.Event != End {
				t.Errorf("the last record is %+v", last)
			}
		})
	}
}

func waitForEmptyQueue(t *testing.T, l *Log) {
	t.Helper()
	for deadline := time.Now().Add(30 * time.Second); len(l.queue) > 0; time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("the queue is not emptied")
		}
	}
}

// A disk that hangs costs records, never time: the queue is bounded.
func TestSlowDisk(t *testing.T) {
	leak.Check(t)
	stuck := &stuckSink{release: make(chan struct{})}
	l := stuckLog(stuck, Config{Destination: File})
	for range 2 * queueSize {
		if err := l.start(context.Background(), "s", info); err != nil {
			t.Fatal(err)
		}
	}
	close(stuck.release)
	l.Close()
	lost := 0
	for _, line := range stuck.lines {
		var r Record
		if err := json.Unmarshal([]byte(line), &r); err != nil {
			t.Fatal(err)
		}
		lost += int(r.LostRecords)
	}
	if written := len(stuck.lines) - 1; lost == 0 || written+lost != 2*queueSize || l.Lost() != int64(lost) {
		t.Errorf("%d records were written and %d are said to be lost", written, lost)
	}
}

func stuckLog(sink sink, c Config) *Log {
	l := &Log{log: slog.New(slog.DiscardHandler), config: c, queue: make(chan entry, queueSize+updatesSize), done: make(chan struct{})}
	go l.run(destination{sink, FsyncNever})
	return l
}

// A reload neither waits for a disk that hangs nor holds sessions up, also when all places in the
// queue are taken; too many of them are refused, and what was in force stays.
func TestUpdateWhileDiskHangs(t *testing.T) {
	leak.Check(t)
	stuck := &stuckSink{release: make(chan struct{})}
	c := fileConfig(t)
	l := stuckLog(stuck, c)
	for range queueSize + 2 { // one more than fits is in the writer's hands
		if err := l.start(context.Background(), "s", info); err != nil {
			t.Fatal(err)
		}
	}
	accepted := 0
	for i := range updatesSize + 3 {
		c.MaxFiles = i
		if err := l.Update(c); err == nil {
			accepted++
		} else if !errors.Is(err, errStuck) {
			t.Fatal(err)
		}
	}
	if accepted < updatesSize || accepted > updatesSize+1 || l.current().MaxFiles != accepted-1 {
		t.Errorf("%d changes were accepted, max_files is %d", accepted, l.current().MaxFiles)
	}
	close(stuck.release)
	waitForEmptyQueue(t, l)
	if err := l.start(context.Background(), "last", info); err != nil {
		t.Fatal(err)
	}
	l.Close()
	all := records(t, c.File)
	if len(all) == 0 || all[len(all)-1].Session != "last" {
		t.Errorf("the new destination has %+v", all)
	}
}

// A session that was refused because nobody waited any longer for its record does not look as if it
// had taken place, once the disk answers.
func TestStartThatIsGivenUp(t *testing.T) {
	leak.Check(t)
	stuck := &stuckSink{release: make(chan struct{})}
	l := stuckLog(stuck, Config{Destination: File, Deny: true})
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	var refused *session.RefusedError
	if err := l.start(ctx, "s", info); !errors.As(err, &refused) {
		t.Errorf("the session begins: %v", err)
	}
	close(stuck.release)
	l.Close()
	var last Record
	if len(stuck.lines) != 2 || json.Unmarshal([]byte(stuck.lines[1]), &last) != nil ||
		last.Event != End || last.Session != "s" || last.Reason != "refused" {
		t.Errorf("records: %s", stuck.lines)
	}
}

type stuckSink struct {
	release chan struct{}
	lines   []string
}

func (s *stuckSink) write(line []byte) error {
	<-s.release
	s.lines = append(s.lines, string(line))
	return nil
}
func (s *stuckSink) sync() error  { return nil }
func (s *stuckSink) close() error { return nil }

// What a crash has left unfinished does not spoil the first record.
func TestUnfinishedLine(t *testing.T) {
	c := fileConfig(t)
	if err := os.MkdirAll(filepath.Dir(c.File), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(c.File, []byte(`{"version":1,"ev`), 0o644); err != nil {
		t.Fatal(err)
	}
	l := newLog(t, c)
	if _, err := begin(t, l); err != nil {
		t.Fatal(err)
	}
	l.Close()
	text, err := os.ReadFile(c.File)
	if err != nil {
		t.Fatal(err)
	}
	lines := strings.Split(strings.TrimSpace(string(text)), "\n")
	if len(lines) != 2 || !json.Valid([]byte(lines[1])) {
		t.Errorf("lines: %q", lines)
	}
}

func TestExecSyncIsSwitchable(t *testing.T) {
	c := fileConfig(t)
	l := newLog(t, c)
	for _, on := range []bool{false, true} {
		c.ExecSync = on
		if err := l.Update(c); err != nil {
			t.Fatal(err)
		}
		end, err := l.BeginSync(t.Context(), session.Info{Kind: session.ExecSync})
		if err != nil {
			t.Fatal(err)
		}
		end(session.Outcome{Reason: "exited", ExitCode: 7}, 42)
	}
	l.Close()
	all := records(t, c.File)
	if len(all) != 2 || *all[1].ExitCode != 7 || *all[1].BytesOut != 42 || all[1].Session == "" {
		t.Errorf("records: %+v", all)
	}
}

// A destination that cannot be opened is refused, and the old one stays.
func TestUpdateFails(t *testing.T) {
	c := fileConfig(t)
	l := newLog(t, c)
	bad := c
	bad.File = "/proc/nope/audit.log"
	if err := l.Update(bad); err == nil {
		t.Fatal("it was taken over")
	}
	if _, err := begin(t, l); err != nil {
		t.Fatal(err)
	}
	l.Close()
	if len(records(t, c.File)) != 1 {
		t.Error("the old file was not used")
	}
}

// journald gets one datagram for each record, also after it was restarted.
func TestJournald(t *testing.T) {
	leak.Check(t)
	path := filepath.Join(t.TempDir(), "socket")
	listen := func() *net.UnixConn {
		conn, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: path, Net: "unixgram"})
		if err != nil {
			t.Fatal(err)
		}
		return conn
	}
	journal := listen()
	s, err := openJournal(path)
	if err != nil {
		t.Fatal(err)
	}
	defer s.close()
	for range 2 {
		if err := s.write(describe(Start, "s1", info, session.CommandFull).line()); err != nil {
			t.Fatal(err)
		}
		buffer := make([]byte, 64<<10)
		n, err := journal.Read(buffer)
		if err != nil {
			t.Fatal(err)
		}
		fields := map[string]string{}
		for line := range strings.Lines(string(buffer[:n])) {
			name, value, ok := strings.Cut(strings.TrimSuffix(line, "\n"), "=")
			if !ok {
				t.Errorf("line %q", line)
			}
			fields[name] = value
		}
		if fields["SYSLOG_IDENTIFIER"] != "streamshim-audit" || !json.Valid([]byte(fields["MESSAGE"])) {
			t.Errorf("fields %q", fields)
		}
		journal.Close()
		os.Remove(path)
		journal = listen()
	}
	journal.Close()
	if _, err := openJournal(filepath.Join(t.TempDir(), "none")); err == nil || !strings.Contains(err.Error(), "audit.destination") {
		t.Errorf("without journald: %v", err)
	}
}

// Many sessions that wait for their records share an fsync and all get through.
func TestManyWait(t *testing.T) {
	c := fileConfig(t)
	c.Deny = true
	l := newLog(t, c)
	var all sync.WaitGroup
	for range 200 {
		all.Go(func() {
			if err := l.start(context.Background(), "s", info); err != nil {
				t.Error(err)
			}
		})
	}
	all.Wait()
	l.Close()
	if got := len(records(t, c.File)); got != 200 {
		t.Errorf("%d records", got)
	}
}

// What a kill leaves without an end gets one from the next process, once, and nothing else does.
func TestSessionsThatAKillHasCut(t *testing.T) {
	for _, fails := range []bool{false, true} {
		c := fileConfig(t)
		c.OpenDir = filepath.Join(t.TempDir(), "audit")
		c.Deny = fails
		killed := newLog(t, c)
		var open []string
		for i := range 3 {
			s, err := begin(t, killed)
			if err != nil {
				t.Fatal(err)
			}
			if i == 0 {
				s.End(session.Outcome{Reason: "exited", ExitCode: 0})
				continue
			}
			open = append(open, s.ID)
		}
		flush(t, killed)
		// Cut short by the kill, and something that is none of ours.
		for name, text := range map[string]string{"0000000000000000.open": `{"version":1`, "else": "x"} {
			if err := os.WriteFile(filepath.Join(c.OpenDir, name), []byte(text), 0o600); err != nil {
				t.Fatal(err)
			}
		}
		before := len(records(t, c.File))
		for range 2 { // the second start finds nothing
			next := newLog(t, c)
			next.Close()
		}
		added := records(t, c.File)[before:]
		var ended []string
		for _, r := range added {
			if r.Event != End || r.Reason != "interrupted" || r.PodName != "web" || fmt.Sprint(r.Command) != "[sh]" || r.Duration != nil {
				t.Errorf("%+v", r)
			}
			ended = append(ended, r.Session)
		}
		slices.Sort(open)
		slices.Sort(ended)
		if !slices.Equal(ended, open) {
			t.Errorf("ends of %v, want %v", ended, open)
		}
		if left, err := os.ReadDir(c.OpenDir); err != nil || len(left) != 1 {
			t.Errorf("left: %v, %v", left, err)
		}
	}
}

// An audit id proves nothing, and its record says so.
func TestAuditIDIsUnverified(t *testing.T) {
	c := fileConfig(t)
	l := newLog(t, c)
	s, err := begin(t, l)
	if err != nil {
		t.Fatal(err)
	}
	s.End(session.Outcome{Reason: "exited"})
	l.Close()
	for _, r := range records(t, c.File) {
		if r.AuditID == "" || r.AuditIDVerified == nil || *r.AuditIDVerified {
			t.Errorf("%+v", r)
		}
	}
	if r := describe(Start, "", session.Info{}, session.CommandNone); r.AuditIDVerified != nil {
		t.Error("a session without an id has one that is unverified")
	}
}
