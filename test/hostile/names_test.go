package hostile

import (
	"bufio"
	"context"
	"fmt"
	"testing"

	"github.com/streamshim/streamshim/internal/testutil"
	"github.com/streamshim/streamshim/pkg/workload"
)

// markers are the names by which an engine, or a runtime, may know a process that has not become the command yet.
var markers = []string{"enter:[2:INIT]", "runc:[2:INIT]", "runc:[1:CHILD]", "runc:[0:PARENT]", "exe", "streamshim-enter", "launcher"}

// A command that takes the name of a process on its way into the container runs once.
func TestCommandWithOurName(t *testing.T) {
	c := newContainer(t)
	run := func(e *entrance, name string) int64 {
		before := c.runs(t)
		_, _ = e.enter(context.Background(), c, "/victim", hostFile, "name="+name, "runs=/runs", "die") // by SIGKILL
		return c.runs(t) - before
	}
	for _, e := range entrances(t) {
		for _, name := range markers {
			for range *count {
				if runs := run(e, name); runs != 1 {
					t.Errorf("%s: a command named %q ran %d times", e.name, name, runs)
				}
			}
		}
		r := row{attack: "our own names", configuration: "default", entrance: e.name, commands: *count * len(markers)}
		note(r)
	}
	if runs := run(wrong(t, "runs-twice"), markers[0]); runs != 2 {
		t.Errorf("with a launcher that goes by names the command ran %d times", runs)
	}
}

// The whole tree of a command ends with it, whatever its processes are called.
func TestStrangeNames(t *testing.T) {
	c := newContainer(t)
	for _, e := range engines(t) {
		for _, name := range append([]string{"a) R 1 1 1", "a\n) Z 1", "((((", "))))", ") 0 (", "\n\n\n", " ", "\xff\xfe", "1"}, markers[:2]...) {
			const children = 4
			p, err := e.runner.Start(context.Background(), c.Container, workload.Command{
				Args: []string{"/victim", hostFile, "name=" + name, fmt.Sprintf("children=%d", children)}, Stdout: true,
			})
			if err != nil {
				t.Errorf("%s, %q: %v", e.name, name, err)
				continue
			}
			if line, err := bufio.NewReader(p.Stdout()).ReadString('\n'); err != nil {
				t.Errorf("%s, %q: %q, %v", e.name, name, line, err)
			}
			testutil.Eventually(t, "the command has its children", func() bool { return c.processes(t) == 2+children })
			p.Disconnect()
			testutil.Eventually(t, fmt.Sprintf("%s: all processes named %q end", e.name, name), func() bool { return c.processes(t) == 1 })
			p.Close()
		}
		note(row{attack: "strange names", configuration: "default", entrance: e.name, commands: 11})
	}
}
