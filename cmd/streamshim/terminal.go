package main

import (
	"io"
	"os"

	"golang.org/x/sys/unix"
)

// afterPlay resets the modes that a program which was cut off may have left set: the alternate screen, mouse and focus
// reports, and bracketed paste. A soft reset at the end resets colours, a hidden cursor and margins.
const afterPlay = "\x1b[?1047l\x1b[?1000;1002;1003;1004;1006;2004l\x1b[!p"

// borrowTerminal prepares an operator's terminal for the output of another program. A terminal answers some sequences, such
// as a query of the cursor position, as if its user had typed. Those answers are neither echoed nor left for the
// operator's shell. Newlines are written unchanged, because the output has passed a terminal already. restore undoes all
// that, and what the output has set. borrowTerminal does nothing unless both input and output are terminals. In the
// background it does nothing either, because the shell would stop a process that changes the terminal.
func borrowTerminal(in *os.File, out io.Writer) (restore func()) {
	nothing := func() {}
	if !isTerminal(out) {
		return nothing
	}
	fd := int(in.Fd())
	if group, err := unix.IoctlGetInt(fd, unix.TIOCGPGRP); err == nil && group != unix.Getpgrp() {
		return nothing
	}
	before, err := unix.IoctlGetTermios(fd, unix.TCGETS)
	if err != nil {
		return nothing // the input is not a terminal
	}
	raw := *before
	raw.Lflag &^= unix.ECHO | unix.ICANON // keeps ISIG, so that ^C ends it
	raw.Oflag &^= unix.OPOST
	if err := unix.IoctlSetTermios(fd, unix.TCSETS, &raw); err != nil {
		return nothing
	}
	return func() {
		io.WriteString(out, afterPlay)                 //nolint:errcheck // the terminal has gone
		unix.IoctlSetTermios(fd, unix.TCSETSF, before) //nolint:errcheck // as above; F discards unread input
	}
}
