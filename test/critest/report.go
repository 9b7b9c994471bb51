// Package critest runs the CRI conformance suite (critest of cri-tools v1.36.0) against containerd
// alone and against streamshim in front of the same containerd, and compares them spec by spec.
package critest

import (
	"encoding/json"
	"fmt"
	"os"
	"slices"
	"strings"
	"time"
)

// State is how a spec ended, in ginkgo's words.
type State string

// The states that matter here. Every other one, such as "panicked", counts as a failure.
const (
	Passed  State = "passed"
	Skipped State = "skipped"
	// NotSelected is ours: ginkgo calls also a spec "skipped" that a filter left out.
	NotSelected State = "not selected"
)

// Spec is one spec's result.
type Spec struct {
	Name    string        `json:"name"`
	State   State         `json:"state"`
	Message string        `json:"message,omitempty"` // why it failed or was skipped
	Time    time.Duration `json:"nanoseconds"`
}

// failed is whether the spec ran and did not pass.
func (s Spec) failed() bool {
	return s.State != Passed && s.State != Skipped && s.State != NotSelected
}

// Results are the results of one run of critest, sorted by name.
type Results []Spec

// and joins the results of two runs that shared the specs between them.
func (r Results) and(other Results) Results {
	selected := map[string]bool{}
	for _, spec := range other {
		if spec.State != NotSelected {
			selected[spec.Name] = true
			r = append(r, spec)
		}
	}
	r = slices.DeleteFunc(r, func(s Spec) bool { return s.State == NotSelected && selected[s.Name] })
	slices.SortStableFunc(r, func(a, b Spec) int { return strings.Compare(a.Name, b.Name) })
	return r
}

// Count returns how many specs are in a state.
func (r Results) Count(state State) int {
	count := 0
	for _, spec := range r {
		if spec.State == state {
			count++
		}
	}
	return count
}

// Failures returns the specs that ran and did not pass.
func (r Results) Failures() Results {
	return slices.DeleteFunc(slices.Clone(r), func(s Spec) bool { return !s.failed() })
}

// Summary says the totals in one line.
func (r Results) Summary() string {
	return fmt.Sprintf("%d passed, %d failed, %d skipped, %d not selected",
		r.Count(Passed), len(r.Failures()), r.Count(Skipped), r.Count(NotSelected))
}

// ReadResults reads the file that critest writes with -ginkgo.json-report.
func ReadResults(path string) (Results, error) {
	text, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	results, err := parseResults(text)
	if err != nil {
		return nil, fmt.Errorf("read critest's report %s: %w", path, err)
	}
	return results, nil
}

func parseResults(text []byte) (Results, error) {
	var suites []struct {
		SpecReports []struct {
			ContainerHierarchyTexts []string
			LeafNodeType            string
			LeafNodeText            string
			State                   State
			RunTime                 time.Duration
			Failure                 struct{ Message string }
		}
	}
	if err := json.Unmarshal(text, &suites); err != nil {
		return nil, err
	}
	var results Results
	for _, suite := range suites {
		for _, report := range suite.SpecReports {
			name := strings.Join(append(report.ContainerHierarchyTexts, report.LeafNodeText), " ")
			spec := Spec{Name: strings.TrimSpace(name), State: report.State, Message: report.Failure.Message, Time: report.RunTime}
			if report.LeafNodeType != "It" { // the suite's own set-up and clean-up
				if spec.failed() {
					spec.Name = report.LeafNodeType + " " + spec.Name
					results = append(results, spec)
				}
				continue
			}
			if spec.State == Skipped && spec.Message == "" {
				spec.State = NotSelected
			}
			results = append(results, spec)
		}
	}
	slices.SortFunc(results, func(a, b Spec) int { return strings.Compare(a.Name, b.Name) })
	return results, nil
}

// knownToPass is how many specs passed on containerd 2.4.2 with runc 1.5.2 on the first machine,
// which had no AppArmor.
const knownToPass = 108

// checkBaseline says what is wrong with the run against containerd alone, which would make a
// comparison worthless. A machine that lacks something makes critest skip specs and say why; those
// it may have fewer. One with AppArmor has more.
func checkBaseline(bare Results) []string {
	expected := knownToPass
	for _, spec := range bare {
		if spec.State == Skipped && !strings.Contains(spec.Name, "AppArmor") {
			expected--
		}
	}
	if passed := bare.Count(Passed); passed < expected {
		problem := fmt.Sprintf("containerd alone: only %d specs passed, expected at least %d", passed, expected)
		for _, spec := range bare.Failures() {
			problem += fmt.Sprintf("\n  %s %s: %s", spec.State, spec.Name, firstLine(spec.Message))
		}
		return []string{problem}
	}
	return nil
}

// compare says where streamshim behaves differently from containerd alone. That a spec passes only
// with streamshim is a difference too, but not one to complain about.
func compare(bare, front Results) []string {
	var problems []string
	alone := map[string]Spec{}
	for _, spec := range bare {
		alone[spec.Name] = spec
	}
	for _, spec := range front {
		reference, known := alone[spec.Name]
		delete(alone, spec.Name)
		switch {
		case !known:
			problems = append(problems, fmt.Sprintf("%s: only with streamshim (%s) %s", spec.Name, spec.State, firstLine(spec.Message)))
		case spec.failed() && !reference.failed(), !spec.failed() && spec.State != Passed && spec.State != reference.State:
			problems = append(problems, fmt.Sprintf("%s: %s with streamshim, %s with containerd alone: %s",
				spec.Name, spec.State, reference.State, firstLine(spec.Message)))
		}
	}
	for name, spec := range alone {
		problems = append(problems, fmt.Sprintf("%s: only with containerd alone (%s)", name, spec.State))
	}
	slices.Sort(problems)
	return problems
}

func firstLine(s string) string {
	line, _, _ := strings.Cut(strings.TrimSpace(s), "\n")
	return line
}

// markdown renders both runs as a table.
func markdown(bare, front Results) string {
	var out strings.Builder
	fmt.Fprintf(&out, "# critest v1.36.0\n\ncontainerd alone: %s\n\nstreamshim: %s\n\n", bare.Summary(), front.Summary())
	out.WriteString("| spec | containerd | seconds | streamshim | seconds |\n|---|---|---:|---|---:|\n")
	alone := map[string]Spec{}
	for _, spec := range bare {
		alone[spec.Name] = spec
	}
	for _, spec := range front {
		reference := alone[spec.Name]
		fmt.Fprintf(&out, "| %s | %s | %.1f | %s | %.1f |\n", strings.ReplaceAll(spec.Name, "|", `\|`),
			reference.State, reference.Time.Seconds(), spec.State, spec.Time.Seconds())
	}
	return out.String()
}
