package critest

import (
	"slices"
	"strings"
	"testing"
	"time"
)

const exampleReport = `[{"SpecReports": [
  {"LeafNodeType": "BeforeSuite", "State": "passed"},
  {"LeafNodeType": "It", "ContainerHierarchyTexts": ["[k8s.io] Streaming"], "LeafNodeText": "exec", "State": "passed", "RunTime": 1500000000},
  {"LeafNodeType": "It", "ContainerHierarchyTexts": ["[k8s.io] Streaming"], "LeafNodeText": "attach", "State": "failed", "Failure": {"Message": "no\nway"}},
  {"LeafNodeType": "It", "ContainerHierarchyTexts": ["[k8s.io] AppArmor"], "LeafNodeText": "profile", "State": "skipped", "Failure": {"Message": "AppArmor is disabled"}},
  {"LeafNodeType": "It", "ContainerHierarchyTexts": ["[k8s.io] benchmark"], "LeafNodeText": "pods", "State": "skipped"},
  {"LeafNodeType": "AfterSuite", "State": "panicked", "Failure": {"Message": "at the end"}}
]}]`

func TestParseResults(t *testing.T) {
	results, err := parseResults([]byte(exampleReport))
	if err != nil {
		t.Fatal(err)
	}
	if got, want := results.Summary(), "1 passed, 2 failed, 1 skipped, 1 not selected"; got != want {
		t.Errorf("got %q, want %q", got, want)
	}
	for _, spec := range results {
		if spec.Name == "[k8s.io] Streaming exec" && spec.Time != 1500*time.Millisecond {
			t.Errorf("took %v", spec.Time)
		}
	}
	if _, err := parseResults([]byte(`{"not": "a list"}`)); err == nil {
		t.Error("a report of another shape was accepted")
	}
}

func spec(name string, state State) Spec { return Spec{Name: name, State: state, Message: "why"} }

func TestResultsOfTwoRuns(t *testing.T) {
	first := Results{spec("a", Passed), spec("b", NotSelected), spec("c", NotSelected), spec("d", Skipped)}
	second := Results{spec("a", NotSelected), spec("b", "failed"), spec("c", NotSelected), spec("d", NotSelected)}
	want := Results{spec("a", Passed), spec("b", "failed"), spec("c", NotSelected), spec("d", Skipped)}
	if got := first.and(second); !slices.Equal(got, want) {
		t.Errorf("got %v, want %v", got, want)
	}
}

func TestCompare(t *testing.T) {
	for _, test := range []struct {
		name        string
		bare, front Results
		want        string // part of the only problem; "" for none
	}{
		{"both pass", Results{spec("a", Passed)}, Results{spec("a", Passed)}, ""},
		{"both fail", Results{spec("a", "failed")}, Results{spec("a", "panicked")}, ""},
		{"both skip", Results{spec("a", Skipped)}, Results{spec("a", Skipped)}, ""},
		{"streamshim mends", Results{spec("a", "failed")}, Results{spec("a", Passed)}, ""},
		{"streamshim breaks", Results{spec("a", Passed)}, Results{spec("a", "failed")}, "a: failed with streamshim, passed with containerd alone: why"},
		{"streamshim times out", Results{spec("a", Passed)}, Results{spec("a", "timedout")}, "timedout with streamshim"},
		{"streamshim skips", Results{spec("a", Passed)}, Results{spec("a", Skipped)}, "skipped with streamshim"},
		{"streamshim skips what fails", Results{spec("a", "failed")}, Results{spec("a", Skipped)}, "skipped with streamshim"},
		{"one more", Results{}, Results{spec("a", Passed)}, "only with streamshim"},
		{"one fewer", Results{spec("a", Passed)}, Results{}, "only with containerd alone"},
	} {
		t.Run(test.name, func(t *testing.T) {
			problems := compare(test.bare, test.front)
			switch {
			case test.want == "" && len(problems) > 0:
				t.Errorf("got %q, want no problem", problems)
			case test.want != "" && (len(problems) != 1 || !strings.Contains(problems[0], test.want)):
				t.Errorf("got %q, want one with %q", problems, test.want)
			}
		})
	}
}

func TestCheckBaseline(t *testing.T) {
	results := func(passed, failed, skipped int, skippedName string) Results {
		var r Results
		for range passed {
			r = append(r, spec("p", Passed))
		}
		for range failed {
			r = append(r, spec("f", "failed"))
		}
		for range skipped {
			r = append(r, spec(skippedName, Skipped))
		}
		return r
	}
	for _, test := range []struct {
		name  string
		bare  Results
		sound bool
	}{
		{"as known", results(108, 0, 9, "AppArmor"), true},
		{"with AppArmor", results(117, 0, 0, ""), true},
		{"no idmap mounts", results(102, 0, 6, "UserNamespaces"), true},
		{"one fails", results(107, 1, 9, "AppArmor"), false},
		{"only AppArmor skips do not excuse", results(107, 0, 10, "AppArmor"), false},
		{"nothing ran", nil, false},
	} {
		if problems := checkBaseline(test.bare); (len(problems) == 0) != test.sound {
			t.Errorf("%s: %q", test.name, problems)
		}
	}
}

func TestMarkdown(t *testing.T) {
	got := markdown(Results{spec("a|b", Passed)}, Results{spec("a|b", "failed")})
	if !strings.Contains(got, `| a\|b | passed | 0.0 | failed | 0.0 |`) {
		t.Error(got)
	}
}

func TestParseSegments(t *testing.T) {
	const table = "       key      shmid perms                  size  cpid  lpid nattch   uid\n" +
		"         0          7   644               1048576  1234     0      0     0\n"
	segments, err := parseSegments(strings.NewReader(table))
	if err != nil || len(segments) != 1 || segments[7] != (segment{7, 1 << 20, 0}) {
		t.Errorf("got %+v, %v", segments, err)
	}
	if _, err := parseSegments(strings.NewReader("heading\n0 x 644 1 1 1 0\n")); err == nil {
		t.Error("a broken table was accepted")
	}
}
