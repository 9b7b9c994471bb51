package hostile

import (
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"slices"
	"strings"
	"sync"
	"text/tabwriter"
)

// row is one attack in one configuration on one engine.
type row struct {
	attack, configuration, entrance string
	commands, failed, seen          int
	gained                          map[string]int
	met                             map[string]int // as outcome.met
}

var table struct {
	sync.Mutex
	rows []row
}

func note(r row) {
	table.Lock()
	defer table.Unlock()
	table.rows = append(table.rows, r)
}

// printTable writes what all attacks have come to.
func printTable(to io.Writer) {
	if len(table.rows) == 0 {
		return
	}
	w := tabwriter.NewWriter(to, 0, 0, 2, ' ', 0)
	fmt.Fprintln(w, "attack\tconfiguration\tengine\tcommands\tfailed\tseen\tgained")
	for _, r := range table.rows {
		gained := make([]string, 0, len(r.gained))
		for _, what := range slices.Sorted(maps.Keys(r.gained)) {
			given := ""
			if reason := givenByRunc(r.configuration, what); reason != "" {
				given = " (as runc exec)"
			}
			gained = append(gained, fmt.Sprintf("%s: %d%s", strings.TrimSuffix(what, ":"), r.gained[what], given))
		}
		if len(gained) == 0 {
			gained = []string{"-"}
		}
		fmt.Fprintf(w, "%s\t%s\t%s\t%d\t%d\t%d\t%s\n", r.attack, r.configuration, r.entrance, r.commands, r.failed, r.seen, strings.Join(gained, "; "))
	}
	w.Flush()
}

// sum is how many commands one attack has met in one configuration, and what nobody excuses of what it gained.
type sum struct {
	Attack, Configuration, Engine string
	Commands, Met, Gained         int
}

// sums adds the rows up: "together" counts for each of the attacks that were made together.
func sums(rows []row) []sum {
	var all []sum
	for _, r := range rows {
		gained := 0
		for what, times := range r.gained {
			if givenByRunc(r.configuration, what) == "" {
				gained += times
			}
		}
		made := []string{r.attack}
		if r.attack == "together" {
			made = passive
		}
		for _, attack := range made {
			met := r.commands // of what is no attacker's doing each command is one
			if r.met != nil {
				met = r.met[attack]
			}
			all = append(all, sum{attack, r.configuration, r.entrance, r.commands, met, gained})
		}
	}
	return add(all)
}

// add joins those of the same attack, configuration and engine.
func add(sums []sum) []sum {
	type key struct{ attack, configuration, engine string }
	joined := map[key]sum{}
	for _, s := range sums {
		k := key{s.Attack, s.Configuration, s.Engine}
		before := joined[k]
		s.Commands, s.Met, s.Gained = s.Commands+before.Commands, s.Met+before.Met, s.Gained+before.Gained
		joined[k] = s
	}
	return slices.SortedFunc(maps.Values(joined), func(a, b sum) int {
		return cmp.Or(cmp.Compare(a.Engine, b.Engine), cmp.Compare(a.Configuration, b.Configuration), cmp.Compare(a.Attack, b.Attack))
	})
}

// printSums writes how many commands each attack has met, with those of earlier runs that a file has kept. An
// empty name keeps nothing.
func printSums(to io.Writer, file string) error {
	all := sums(table.rows)
	if file != "" {
		data, err := os.ReadFile(file)
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
		var before []sum
		if err == nil {
			if err := json.Unmarshal(data, &before); err != nil {
				return fmt.Errorf("%s: %w", file, err)
			}
		}
		all = add(append(before, all...))
		if data, err = json.MarshalIndent(all, "", "\t"); err != nil {
			return err
		}
		if err := os.WriteFile(file, data, 0o600); err != nil {
			return err
		}
	}
	if len(all) == 0 {
		return nil
	}
	w := tabwriter.NewWriter(to, 0, 0, 2, ' ', 0)
	fmt.Fprintln(w, "\nattack\tconfiguration\tengine\tcommands\tmet\tgained, not as runc exec")
	for _, s := range all {
		fmt.Fprintf(w, "%s\t%s\t%s\t%d\t%d\t%d\n", s.Attack, s.Configuration, s.Engine, s.Commands, s.Met, s.Gained)
	}
	return w.Flush()
}
