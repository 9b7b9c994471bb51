package main

import (
	"bytes"
	"io"
	"os"
	"strings"
	"testing"

	"github.com/creack/pty"
	"golang.org/x/sys/unix"
)

// What a terminal answers to a recording does not become the operator's input, and the recording's
// modes end with it.
func TestBorrowedTerminal(t *testing.T) {
	master, terminal, err := pty.Open()
	if err != nil {
		t.Fatal(err)
	}
	defer master.Close()
	defer terminal.Close()
	fd := int(terminal.Fd())
	before, err := unix.IoctlGetTermios(fd, unix.TCGETS)
	if err != nil {
		t.Fatal(err)
	}
	restore := borrowTerminal(terminal, terminal)
	during, err := unix.IoctlGetTermios(fd, unix.TCGETS)
	if err != nil || during.Lflag&unix.ECHO != 0 || during.Lflag&unix.ISIG == 0 || during.Oflag&unix.OPOST != 0 {
		t.Errorf("while it plays: %x, %v", during.Lflag, err)
	}
	if _, err := io.WriteString(master, "\x1b[5;1R"); err != nil {
		t.Fatal(err)
	}
	unread := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
	if n, err := unix.Poll(unread, int(testTimeout.Milliseconds())); n != 1 {
		t.Fatal("the answer has not come", err)
	}
	restore()
	after, err := unix.IoctlGetTermios(fd, unix.TCGETS)
	if err != nil || *after != *before {
		t.Errorf("not restored: %+v, %v", after, err)
	}
	if n, err := unix.IoctlGetInt(fd, unix.TIOCINQ); err != nil || n != 0 {
		t.Errorf("%d bytes are left to be read, %v", n, err)
	}
	shown := make([]byte, 256)
	if n, err := master.Read(shown); err != nil || !strings.Contains(string(shown[:n]), afterPlay) || strings.Contains(string(shown[:n]), "R") {
		t.Errorf("the terminal got %q, %v", shown[:n], err)
	}

	var file bytes.Buffer
	borrowTerminal(os.Stdin, &file)()
	if file.Len() != 0 {
		t.Errorf("what is no terminal got %q", file.String())
	}
}
