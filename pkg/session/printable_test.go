package session

import (
	"encoding/json"
	"strings"
	"testing"
)

func TestPrintableJSON(t *testing.T) {
	for _, text := range []string{
		"echo a > b && c", "ü €", "\x1b[2J\x07", "\u009b2J", "a\u202eb", "\x7f", "\U000e0001", "\u2028", "\xff", `"\`, "a\nb", "",
	} {
		for _, indent := range []string{"", "  "} {
			got, err := PrintableJSON([]string{text}, indent)
			if err != nil {
				t.Fatal(err)
			}
			if strings.ContainsAny(string(got), "\x1b\x07\u009b\u202e\x7f\U000e0001\u2028") || (indent == "" && strings.Contains(string(got), "\n")) {
				t.Errorf("%q becomes %q", text, got)
			}
			var back []string
			if err := json.Unmarshal(got, &back); err != nil || back[0] != strings.ToValidUTF8(text, "\uFFFD") {
				t.Errorf("%s is read as %q, %v", got, back, err)
			}
		}
	}
	if got, _ := PrintableJSON("a > ü", ""); string(got) != `"a > ü"` {
		t.Errorf("%s", got)
	}
}
