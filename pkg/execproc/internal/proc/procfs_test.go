package proc

import (
	"strings"
	"testing"
)

// FuzzParseStat checks the parser with arbitrary names: a process may have any.
func FuzzParseStat(f *testing.F) {
	f.Add("42 (a b) c) S 1 42 43 0 -1 4194304 1 2 3 4 5 6 7 8 20 0 1 0 12345 0 0 0 0 0 0 0 0 0")
	f.Add("42 () Z 1 42 43")
	f.Fuzz(func(t *testing.T, line string) {
		stat, err := ParseStat([]byte(line))
		if err == nil && (stat.State == 0 || !strings.Contains(line, "("+stat.Name+")")) {
			t.Errorf("%+v of %q", stat, line)
		}
	})
}

func TestParseStat(t *testing.T) {
	stat, err := ParseStat([]byte("42 (a b) c) S 1 42 43 0 -1 4194304 1 2 3 4 5 6 7 8 20 0 1 0 12345 0 0 0 0 0 0 0 0 256\n"))
	want := Stat{Identity: Identity{Pid: 42, Start: 12345}, Name: "a b) c", State: 'S', Parent: 1, Session: 43, Threads: 1, Killed: true}
	if err != nil || stat != want {
		t.Errorf("%+v, %v", stat, err)
	}
}
