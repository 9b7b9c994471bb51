package upgrade

import (
	"bufio"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/streamshim/streamshim/internal/testutil"
	"github.com/streamshim/streamshim/test/internal/harness"
	"github.com/streamshim/streamshim/test/internal/node"
)

// change is a text in a source file that differs in another version.
type change struct{ file, from, to string }

// buildChanged builds a program with changed source: a version of streamshim that does not exist yet.
func buildChanged(t *testing.T, version string, changes ...change) string {
	t.Helper()
	folder := t.TempDir()
	overlay := struct{ Replace map[string]string }{map[string]string{}}
	for i, c := range changes {
		source, err := filepath.Abs(filepath.Join("../../..", c.file))
		if err != nil {
			t.Fatal(err)
		}
		path, again := overlay.Replace[source]
		if !again {
			path = filepath.Join(folder, fmt.Sprintf("%d.go", i))
			overlay.Replace[source] = path
		}
		read := source
		if again {
			read = path
		}
		text, err := os.ReadFile(read)
		if err != nil {
			t.Fatal(err)
		}
		if strings.Count(string(text), c.from) != 1 {
			t.Fatalf("%s has %q not once", c.file, c.from)
		}
		if err := os.WriteFile(path, []byte(strings.Replace(string(text), c.from, c.to, 1)), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	text, err := json.Marshal(overlay)
	if err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(folder, "overlay.json")
	if err := os.WriteFile(file, text, 0o600); err != nil {
		t.Fatal(err)
	}
	return build(t, version, "-overlay", file)
}

// trio is one live session of each kind over a transport: two commands, one of them on a terminal, and a port-forward with
// a connection.
type trio struct {
	t            *testing.T
	transport    string
	command, tty *session
	forward      *harness.Forward
	conn         *net.TCPConn
	fromConn     *bufio.Reader
	said         int // lines
}

func (l *load) trio(transport string, pod *harness.Pod, port int) *trio {
	l.t.Helper()
	s := &trio{t: l.t, transport: transport}
	s.command = l.exec(transport, false, "sh", "-c", "cat; exit 3")
	s.tty = l.exec(transport, true, "sh", "-c", "stty -echo; echo ready; cat; exit 4")
	s.forward = harness.StartForward(l.t, l.shim.Runtime, pod.ID, transport, port)
	var err error
	if s.conn, err = s.forward.Dial(port); err != nil {
		l.t.Fatal(err)
	}
	s.fromConn = bufio.NewReader(s.conn)
	if line, err := s.tty.out.ReadString('\n'); line != "ready\r\n" {
		l.t.Fatalf("the terminal says %q, %v", line, err)
	}
	for _, kind := range []string{"command", "terminal", "forward"} {
		if err := s.talk(kind); err != nil {
			l.t.Fatalf("%s over %s: %v", kind, transport, err)
		}
	}
	return s
}

// talk sends something to a session and waits for its echo.
func (s *trio) talk(kind string) error {
	s.said++
	line := fmt.Sprintf("line %d\n", s.said)
	var to io.Writer
	var from *bufio.Reader
	switch kind {
	case "command":
		to, from = s.command.in, s.command.out
	case "terminal":
		to, from = s.tty.in, s.tty.out
	case "forward":
		to, from = s.conn, s.fromConn
	}
	if _, err := io.WriteString(to, line); err != nil {
		return err
	}
	got, err := from.ReadString('\n')
	if err == nil && strings.ReplaceAll(got, "\r", "") != line {
		err = fmt.Errorf("%q came back of %q", got, line)
	}
	return err
}

// goesOn returns why a session has not gone on, or has not ended as it should.
func (s *trio) goesOn(kind string) error {
	if err := s.talk(kind); err != nil {
		return err
	}
	switch kind {
	case "command":
		s.command.in.Close()
		go io.Copy(io.Discard, s.command.out)
		return s.command.wantExit(3)
	case "terminal":
		io.WriteString(s.tty.in, "\x04")
		go io.Copy(io.Discard, s.tty.out)
		return s.tty.wantExit(4)
	}
	s.conn.CloseWrite()
	if rest, err := io.ReadAll(s.fromConn); err != nil || len(rest) > 0 {
		return fmt.Errorf("the connection ends with %q, %w", rest, err)
	}
	select {
	case err := <-s.forward.Ended:
		return fmt.Errorf("the port-forward has ended: %w", err)
	default:
		return nil
	}
}

// endsWith returns why a session has not ended with the error that it should.
func (s *trio) endsWith(kind, want string) error {
	var err error
	switch kind {
	case "command":
		go io.Copy(io.Discard, s.command.out)
		err = testutil.Receive(s.t, "the command's end", s.command.ended)
	case "terminal":
		go io.Copy(io.Discard, s.tty.out)
		err = testutil.Receive(s.t, "the terminal's end", s.tty.ended)
	case "forward": // kubectl prints the text of the error stream; what its library returns only says that it is over
		err = testutil.Receive(s.t, "the port-forward's end", s.forward.Ended)
		s.forward.Ended <- err // for Close
		if err == nil {
			return fmt.Errorf("its client takes the end for one in order")
		}
		return nil
	}
	if err == nil || !strings.Contains(err.Error(), want) {
		return fmt.Errorf("it ends with %w, want %q", err, want)
	}
	return nil
}

// outcome is that of one session in the audit log.
type outcome struct {
	starts, ends int
	reason       string
}

func audited(t *testing.T, file string) map[string]*outcome {
	t.Helper()
	text, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	all := map[string]*outcome{}
	for line := range strings.Lines(string(text)) {
		var record struct{ Event, Session, Reason string }
		if err := json.Unmarshal([]byte(line), &record); err != nil {
			t.Fatal(err)
		}
		if record.Session == "" {
			continue
		}
		o := all[record.Session]
		if o == nil {
			o = &outcome{}
			all[record.Session] = o
		}
		switch record.Event {
		case "start":
			o.starts++
		case "end":
			o.ends++
			o.reason = record.Reason
		}
	}
	return all
}

// TestVersionsMeet has two versions of streamshim take over from each other, in both directions. Sessions that both know go
// on, with all that they have. A session that the other version does not know ends alone, its client is told why, and the
// audit log has its end.
func TestVersionsMeet(t *testing.T) {
	const (
		commands = "pkg/streaming/remotecommand/state.go"
		forwards = "pkg/streaming/portforward/handover.go"
		sessions = "pkg/session/handover.go"
		server   = "pkg/streaming/handover.go"
	)
	first := build(t, "first")
	field := func(file, structure string) change {
		return change{file, "type " + structure + " struct {\n", "type " + structure + " struct {\n\tOfTheNextVersion map[string]string\n"}
	}
	for _, test := range []struct {
		name    string
		changes []change
		ended   []string // their kinds
	}{
		{"commands", []change{{commands, "const stateVersion = 1", "const stateVersion = 2"}}, []string{"command", "terminal"}},
		{"port-forwards", []change{{forwards, "const stateVersion = 1", "const stateVersion = 2"}}, []string{"forward"}},
		{"no-port-forwards", []change{
			{server, "case state.Kind == session.PortForward:\n\t\treturn portforward.CheckState(state.State)\n", ""},
			{server, "case session.PortForward:\n\t\tresumed", "case \"unknown\":\n\t\tresumed"},
			{server, "if err := each.running.Carriable(); err != nil {\n\t\treturn nil, err\n\t}\n\tstate :=", "if each.live.Kind == session.PortForward {\n\t\treturn nil, errors.New(\"unknown\")\n\t}\n\tstate :="},
		}, []string{"forward"}},
		{"connections", []change{{"pkg/streaming/internal/transport/handover.go", "const version = 1", "const version = 2"}}, []string{"command", "terminal", "forward"}},
		{"sessions", []change{{sessions, "const StateVersion = 1", "const StateVersion = 2"}}, []string{"command", "terminal", "forward"}},
		// Fields that the other version does not have, in both directions.
		{"fields", []change{
			field("pkg/handover/state.go", "State"), field(server, "State"), field(server, "SessionState"), field(sessions, "State"),
			field(commands, "State"), field(commands, "ClientState"), field("pkg/streaming/remotecommand/internal/stdin/stdin.go", "State"), field("pkg/streaming/remotecommand/internal/drain/drain.go", "State"), field("pkg/streaming/remotecommand/internal/drain/drain.go", "OutputState"), field(forwards, "State"), field(forwards, "ConnectionState"),
			field("pkg/execproc/handover.go", "runnerState"), field("pkg/execproc/state.go", "processState"),
			field("pkg/portforward/freeze.go", "ConnectionState"), field("pkg/portforward/freeze.go", "ForwarderState"),
			field("pkg/streaming/internal/transport/handover.go", "State"),
			{commands, "Withheld  bool ", "Withheld bool `cbor:\"-\"` "}, {forwards, "Received, Sent int64 // by", "Received int64 `cbor:\"-\"`\n\tSent int64 // by"},
			{sessions, "Tapped  bool ", "Tapped bool `cbor:\"-\"` "},
		}, nil},
	} {
		t.Run(test.name, func(t *testing.T) {
			other := buildChanged(t, "other-"+test.name, test.changes...)
			audit := filepath.Join(t.TempDir(), "audit.log")
			shim := harness.StartInstalled(t, fmt.Sprintf("[audit]\ndestination = \"file\"\nfile = %q\n", audit), first)
			container := harness.RunContainer(t, node.ContainerSpec{})
			pod := harness.NewPod(t, harness.Shared.Node, node.PodSpec{Name: harness.Unique("echo")})
			port := pod.Listen("127.0.0.1", func(conn *net.TCPConn) {
				io.Copy(conn, conn)
				conn.CloseWrite()
			})
			l := newLoad(t, shim, container)
			ended := 0
			for _, next := range []string{other, first} {
				var all []*trio
				for _, transport := range harness.Transports {
					all = append(all, l.trio(transport, pod, port))
				}
				shim.Install(t, next)
				out, err := shim.Upgrade(t)
				want := fmt.Sprintf("%d sessions go on, %d have ended", len(all)*(3-len(test.ended)), len(all)*len(test.ended))
				if err != nil || !strings.Contains(out, want) {
					t.Errorf("%v: %s; want %q", err, out, want)
				}
				for _, s := range all {
					for _, kind := range []string{"command", "terminal", "forward"} {
						var err error
						if ends := strings.Contains(" "+strings.Join(test.ended, " ")+" ", " "+kind+" "); ends {
							err = s.endsWith(kind, "streamshim is being upgraded and it cannot be carried over")
							ended++
						} else {
							err = s.goesOn(kind)
						}
						if err != nil {
							t.Errorf("%s over %s, taken over by %s: %v", kind, s.transport, filepath.Base(next), err)
						}
					}
					s.conn.Close()
					s.forward.Close()
				}
			}
			l.finish()
			testutil.Eventually(t, "each session's end is in the audit log", func() bool {
				uncarried := 0
				for _, o := range audited(t, audit) {
					if o.starts != 1 || o.ends != 1 {
						return false
					}
					if o.reason == "not-carried" {
						uncarried++
					}
				}
				return uncarried == ended
			})
		})
	}
}

// TestVersionsThatCannotMeet checks that there is no hand-over if another version cannot read the state at all, or does not
// know its processes: the old program goes on with everything.
func TestVersionsThatCannotMeet(t *testing.T) {
	first := build(t, "first")
	shim := harness.StartInstalled(t, "", first)
	l := newLoad(t, shim, harness.RunContainer(t, node.ContainerSpec{}))
	for _, transport := range harness.Transports {
		l.terminal(transport)
		l.echo(transport)
	}
	l.await(4)
	for _, test := range []struct{ name, file, want string }{
		{"state", "pkg/handover/state.go", "the state has version 1, this program knows 2"},
		{"server", "pkg/streaming/handover.go", "streaming server: the state has version 1"},
		{"processes", "pkg/execproc/state.go", "the state of processes has version 1"},
	} {
		shim.Install(t, buildChanged(t, "strange-"+test.name, change{test.file, "const stateVersion = 1", "const stateVersion = 2"}))
		out, err := shim.Upgrade(t)
		if err == nil || !strings.Contains(out, test.want) || !strings.Contains(out, "streamshim first goes on as it was") {
			t.Errorf("%s: %v: %s; want %q", test.name, err, out, test.want)
		}
		time.Sleep(10 * time.Millisecond) // the sessions go on meanwhile
	}
	l.finish()
}
