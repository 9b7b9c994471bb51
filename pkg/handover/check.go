package handover

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strings"
	"sync"
	"time"
)

// StartTimeout bounds the start of a new program, ReadTimeout its reading of the state. Sessions stand still during the
// latter.
const (
	StartTimeout = 15 * time.Second
	ReadTimeout  = 3 * time.Second
)

// Verdict says what a program would do with a state.
type Verdict struct {
	Program string   `json:"program,omitempty"` // its version
	Carried int      `json:"carried"`           // sessions
	Ended   []string `json:"ended,omitempty"`   // a line for each session that it cannot carry
	// Refused says why of each of those, by its id.
	Refused map[string]string `json:"refused,omitempty"`
	Error   string            `json:"error,omitempty"` // why it refuses the state as a whole
}

// Check runs a new program as a child, to find out whether it could take over.
type Check struct {
	// Program is the new program's version.
	Program string

	path     string
	file     os.FileInfo // of path, when it was started
	command  *exec.Cmd
	memory   *os.File
	commands *os.File
	answers  chan answer
	said     *tail
	closed   sync.Once
}

type answer struct {
	verdict Verdict
	err     error
}

// Descriptors that the child inherits.
const (
	checkMemory = 3 + iota
	checkCommands
	checkAnswers
)

// StartCheck starts the program, which must call AnswerCheck, and waits until it is ready to read a state, for
// StartTimeout at most. The caller closes the Check.
func StartCheck(ctx context.Context, program string, args []string) (_ *Check, err error) {
	file, err := os.Stat(program)
	if err != nil {
		return nil, fmt.Errorf("the new program does not start: %w", err)
	}
	memory, err := newMemory()
	if err != nil {
		return nil, err
	}
	c := &Check{path: program, file: file, memory: memory, answers: make(chan answer), said: &tail{}}
	defer func() {
		if err != nil {
			c.Close()
		}
	}()
	theirCommands, ourCommands, err := os.Pipe()
	if err != nil {
		return nil, fmt.Errorf("check the new program: %w", err)
	}
	c.commands = ourCommands
	ourAnswers, theirAnswers, err := os.Pipe()
	if err != nil {
		theirCommands.Close()
		return nil, fmt.Errorf("check the new program: %w", err)
	}
	command := exec.Command(program, args...) //nolint:gosec // the installed program, with our own arguments
	command.ExtraFiles = []*os.File{memory, theirCommands, theirAnswers}
	command.Stdout, command.Stderr = c.said, c.said
	command.WaitDelay = time.Second // its own children may hold its output open
	err = command.Start()
	theirCommands.Close() // with ours open, the end of the child would go unnoticed
	theirAnswers.Close()
	if err != nil {
		ourAnswers.Close()
		return nil, fmt.Errorf("the new program does not start: %w", err)
	}
	c.command = command
	go c.listen(ourAnswers)
	ctx, cancel := context.WithTimeoutCause(ctx, StartTimeout, fmt.Errorf("it has not started within %v", StartTimeout))
	defer cancel()
	verdict, err := c.answer(ctx)
	if err != nil {
		return nil, err
	}
	c.Program = verdict.Program
	return c, nil
}

// listen passes answers on until the child closes its end of the pipe or exits.
func (c *Check) listen(answers *os.File) {
	defer close(c.answers)
	defer answers.Close() //nolint:errcheck // was only read
	lines := bufio.NewReader(io.LimitReader(answers, maxAnswers))
	decoder := json.NewDecoder(lines)
	for {
		var a answer
		if a.err = decoder.Decode(&a.verdict); a.err == io.EOF {
			return
		}
		c.answers <- a
		if a.err != nil {
			return
		}
	}
}

const maxAnswers = 16 << 20 // bytes, enough for a line for each session

// answer returns the child's next answer.
func (c *Check) answer(ctx context.Context) (Verdict, error) {
	select {
	case a, ok := <-c.answers:
		switch {
		case !ok:
			return Verdict{}, c.ended("it has ended")
		case a.err != nil:
			return Verdict{}, c.ended(fmt.Sprintf("its answer is none: %v", a.err))
		case a.verdict.Error != "":
			return Verdict{}, fmt.Errorf("the new program refuses: %s", a.verdict.Error)
		}
		return a.verdict, nil
	case <-ctx.Done():
		return Verdict{}, c.ended(context.Cause(ctx).Error())
	}
}

// ended ends the child and returns an error with its last line of output.
func (c *Check) ended(why string) error {
	c.Close()
	if last := c.said.last(); last != "" {
		why += ": " + last
	}
	return fmt.Errorf("the new program cannot take over: %s", why)
}

// Read makes the child read a state and returns its verdict, and the size of the encoded state in bytes. It waits for
// ReadTimeout at most, and may be called once.
func (c *Check) Read(ctx context.Context, state *State) (verdict Verdict, size int, err error) {
	data, err := Encode(state)
	if err != nil {
		return Verdict{}, 0, err
	}
	if err := writeState(c.memory, data); err != nil {
		return Verdict{}, 0, err
	}
	if _, err := c.commands.Write([]byte{'\n'}); err != nil {
		return Verdict{}, 0, c.ended("it has ended")
	}
	ctx, cancel := context.WithTimeoutCause(ctx, ReadTimeout, fmt.Errorf("it has not read the state within %v", ReadTimeout))
	defer cancel()
	verdict, err = c.answer(ctx)
	return verdict, len(data), err
}

// EndChild kills the child and waits for it. It keeps the state, which Exec needs.
func (c *Check) EndChild() {
	c.closed.Do(func() {
		if c.commands != nil {
			c.commands.Close()
		}
		if c.command == nil {
			return
		}
		c.command.Process.Kill() //nolint:errcheck // fails when it has ended
		c.command.Wait()         //nolint:errcheck // it was killed
		for range c.answers {    // until listen returns
		}
	})
}

// Close ends the child and drops the state.
func (c *Check) Close() {
	c.EndChild()
	c.memory.Close() //nolint:errcheck // a successor has its own descriptor
}

// AnswerCheck is the child's side of StartCheck. It calls start, which reports why this program could not take over and
// must have no lasting side effects, then waits for a state and calls read. It returns when the verdict has been sent or
// the parent has gone.
func AnswerCheck(program string, start func() error, read func(*State) Verdict) error {
	memory, commands, answers := os.NewFile(checkMemory, "state"), os.NewFile(checkCommands, "commands"), os.NewFile(checkAnswers, "answers")
	if memory == nil || commands == nil || answers == nil {
		return errors.New("this is for streamshim itself: its descriptors are missing")
	}
	say := func(v Verdict) error {
		v.Program = program
		if err := json.NewEncoder(answers).Encode(v); err != nil {
			return fmt.Errorf("answer: %w", err)
		}
		return nil
	}
	if err := start(); err != nil {
		return errors.Join(err, say(Verdict{Error: err.Error()}))
	}
	if err := say(Verdict{}); err != nil {
		return err
	}
	if _, err := commands.Read(make([]byte, 1)); err != nil {
		return nil //nolint:nilerr // the parent has gone
	}
	data, err := readState(memory)
	if err != nil {
		return errors.Join(err, say(Verdict{Error: err.Error()}))
	}
	state, err := parseState(data)
	if err != nil {
		return errors.Join(err, say(Verdict{Error: err.Error()}))
	}
	return say(read(state))
}

// tail keeps the last tailSize bytes written to it.
type tail struct {
	mu   sync.Mutex
	text []byte
}

const tailSize = 4 << 10

func (t *tail) Write(p []byte) (int, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.text = append(t.text, p...)
	if excess := len(t.text) - tailSize; excess > 0 {
		t.text = append(t.text[:0], t.text[excess:]...)
	}
	return len(p), nil
}

// last returns the last line that is not empty, or the line with a panic's message.
func (t *tail) last() string {
	t.mu.Lock()
	defer t.mu.Unlock()
	text := bytes.TrimSpace(t.text)
	for line := range strings.Lines(string(text)) {
		if strings.HasPrefix(line, "panic: ") {
			return strings.TrimSpace(line)
		}
	}
	return string(text[bytes.LastIndexByte(text, '\n')+1:])
}
