package main

import (
	"bytes"
	"fmt"
	"strconv"
	"sync"
	"time"
)

// sequence is what `seq 1 n` prints. Sessions whose output must have the right sum print it.
func sequence(n int) []byte {
	sequences.Lock()
	defer sequences.Unlock()
	for next := len(sequences.ends) + 1; next <= n; next++ {
		sequences.text = append(strconv.AppendInt(sequences.text, int64(next), 10), '\n')
		sequences.ends = append(sequences.ends, len(sequences.text))
	}
	if n == 0 {
		return nil
	}
	// What is handed out is never written to again: a longer text is appended behind it.
	return sequences.text[:sequences.ends[n-1]:sequences.ends[n-1]]
}

var sequences struct {
	sync.Mutex
	text []byte
	ends []int // of each number's line
}

// checker compares what is written to it with what must come. What is wrong counts only when the session says that
// it has succeeded: a command whose input is cut by a shutdown may say something else.
type checker struct {
	what  string
	want  []byte
	got   int
	wrong string
	// pace is how long each write takes, for a slow reader.
	pace time.Duration
	// drop is the write that is lost, counted from 1; see injectCut.
	drop, writes int
}

func (c *checker) Write(data []byte) (int, error) {
	time.Sleep(c.pace)
	if c.writes++; c.writes == c.drop {
		return len(data), nil
	}
	if c.wrong == "" && (c.got+len(data) > len(c.want) || !bytes.Equal(data, c.want[c.got:c.got+len(data)])) {
		c.wrong = fmt.Sprintf("%s: after %d right bytes of %d there come %d others, beginning with %q",
			c.what, c.got, len(c.want), len(data), data[:min(len(data), 40)])
	}
	c.got += len(data)
	return len(data), nil
}

// whole says whether everything has come, and nothing else.
func (c *checker) whole() error {
	if c.wrong != "" {
		return wrongError{c.wrong}
	}
	if c.got != len(c.want) {
		return wrongError{fmt.Sprintf("%s: %d bytes came of %d, and the session succeeded", c.what, c.got, len(c.want))}
	}
	return nil
}

// wrongError is output that is not what the command has written, of a session that did not fail.
type wrongError struct{ text string }

func (e wrongError) Error() string { return e.text }
