package testutil

import (
	"fmt"
	"regexp"
	"slices"
	"testing"
)

func TestBufferTake(t *testing.T) {
	var b Buffer
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		for i := range 100 {
			fmt.Fprintf(&b, "line %d\n", i)
		}
	}()
	if got, want := b.Take(regexp.MustCompile(`line (9\d)(x)?\n`), nil), []string{"line 90\n", "90", ""}; !slices.Equal(got, want) {
		t.Errorf("%q, want %q", got, want)
	}
	if got := b.Take(regexp.MustCompile("line 89"), ended); got != nil {
		t.Errorf("%q is there again", got)
	}
	if got := b.String(); got != "line 91\nline 92\nline 93\nline 94\nline 95\nline 96\nline 97\nline 98\nline 99\n" {
		t.Errorf("left: %q", got)
	}
}
