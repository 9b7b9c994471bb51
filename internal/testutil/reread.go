package testutil

import (
	"testing"

	"github.com/streamshim/streamshim/pkg/handover"
)

// Reread returns a state as the next program reads it after a hand-over.
func Reread[S any](t testing.TB, state S) (read S) {
	t.Helper()
	encoded, err := handover.Encode(state)
	if err != nil {
		t.Fatal(err)
	}
	if err := handover.Decode(encoded, &read); err != nil {
		t.Fatal(err)
	}
	return read
}
