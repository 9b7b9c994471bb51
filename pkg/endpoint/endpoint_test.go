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

func TestSame(t *testing.T) {
	for _, test := range []struct {
		a, b string
		want bool
	}{
		{"unix:///run/s.sock", "/run/s.sock", true},
		{"/run/s.sock", "/run/t.sock", false},
		{"", "", false},
		{"/run/s.sock", "tcp://x", false},
	} {
		if got := Same(test.a, test.b); got != test.want {
			t.Errorf("Same(%q, %q) is %v", test.a, test.b, got)
		}
	}
}
