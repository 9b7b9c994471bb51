package endpoint

import (
	"strings"
	"testing"
)

func TestPath(t *testing.T) {
	long := "/" + strings.Repeat("x", maxPath-1)
	for address, want := range map[string]string{
		"unix:///run/s.sock":   "/run/s.sock",
		"unix:/run/s.sock":     "/run/s.sock",
		"/run/s.sock":          "/run/s.sock",
		"unix://" + long:       long,
		"unix://" + long + "x": "",
		"":                     "",
		"run/s.sock":           "",
		"unix://run/s.sock":    "",
		"tcp://127.0.0.1:1":    "",
		"http://x/run/s.sock":  "",
	} {
		if got, err := Path(address); got != want || (err == nil) != (want != "") {
			t.Errorf("Path(%q) = %q, %v; want %q", address, got, err, want)
		}
	}
}
