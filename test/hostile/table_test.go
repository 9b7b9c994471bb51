package hostile

import (
	"fmt"
	"io"
	"maps"
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
