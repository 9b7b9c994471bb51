package main

import (
	"io"
	"os"

	"golang.org/x/sys/unix"
)

// afterPlay undoes what a program that was cut off in the middle may have asked of the terminal: the
// alternate screen, mouse and focus reports, bracketed paste; and last, by a soft reset, colours, a
// hidden cursor and margins.
const afterPlay = "\x1b[?1047l\x1b[?1000;1002;1003;1004;1006;2004l\x1b[!p"

// borrowTerminal makes an operator's terminal ready for what somebody else's program has written. A
// terminal answers some sequences (what is at the cursor, which colour is this?) as if its user had
// typed: those answers are neither shown nor left for the operator's shell to read. And what is played
// has passed a terminal already: newlines go out as they are. Restore undoes it and what was played.
// Without a terminal on both sides nothing happens, nor in the background, where the shell would stop
// who touches it.
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
		return nothing // the input is no terminal
	}
	raw := *before
	raw.Lflag &^= unix.ECHO | unix.ICANON // not ISIG: ^C ends it
	raw.Oflag &^= unix.OPOST
	if err := unix.IoctlSetTermios(fd, unix.TCSETS, &raw); err != nil {
		return nothing
	}
	return func() {
		io.WriteString(out, afterPlay)                 //nolint:errcheck // the terminal has gone
		unix.IoctlSetTermios(fd, unix.TCSETSF, before) //nolint:errcheck // as above; F forgets what was not read
	}
}
