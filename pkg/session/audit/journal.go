package audit

import (
	"bytes"
	"fmt"
	"net"
	"os"
	"time"
)

// journalSocket is systemd-journald's socket for records (systemd.io/JOURNAL_NATIVE_PROTOCOL).
const journalSocket = "/run/systemd/journal/socket"

// journalSink sends each record as one datagram with the JSON line as its MESSAGE. SYSLOG_IDENTIFIER tells records
// from other messages:
//
//	journalctl --identifier streamshim-audit --output cat
type journalSink struct {
	path string
	conn net.Conn
}

func openJournal(path string) (*journalSink, error) {
	s := &journalSink{path: path}
	return s, s.dial()
}

func (s *journalSink) dial() error {
	conn, err := net.Dial("unixgram", s.path)
	if err != nil {
		return fmt.Errorf("journald: %w; use audit.destination = \"stdout\" or \"file\" where there is none", err)
	}
	s.conn = conn
	return nil
}

// write sends the line. A restarted journald has a new socket at the same path, so write reconnects.
func (s *journalSink) write(line []byte) error {
	var datagram bytes.Buffer
	datagram.WriteString("SYSLOG_IDENTIFIER=streamshim-audit\nPRIORITY=6\nMESSAGE=")
	datagram.Write(bytes.TrimSuffix(line, []byte{'\n'})) // the JSON contains no newline
	datagram.WriteByte('\n')
	if s.conn != nil {
		if err := s.send(datagram.Bytes()); err == nil {
			return nil
		}
		s.conn.Close() //nolint:errcheck // the connection is replaced anyway
		s.conn = nil
	}
	if err := s.dial(); err != nil {
		return err
	}
	return s.send(datagram.Bytes())
}

// send does not wait indefinitely for a stuck journald.
func (s *journalSink) send(datagram []byte) error {
	if err := s.conn.SetWriteDeadline(time.Now().Add(writeTimeout)); err != nil {
		return err
	}
	_, err := s.conn.Write(datagram)
	return err
}

func (s *journalSink) sync() error { return nil }

func (s *journalSink) close() error {
	if s.conn == nil {
		return nil
	}
	return s.conn.Close()
}

// stdoutSink writes to standard output, which systemd passes to journald.
type stdoutSink struct{}

func (stdoutSink) write(line []byte) error {
	_, err := os.Stdout.Write(line)
	return err
}

func (stdoutSink) sync() error  { return nil }
func (stdoutSink) close() error { return nil }

// discard drops all lines.
type discard struct{}

func (discard) write([]byte) error { return nil }
func (discard) sync() error        { return nil }
func (discard) close() error       { return nil }
