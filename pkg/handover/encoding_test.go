package handover

import (
	"bytes"
	"testing"
	"time"
)

type old struct {
	Version int
	At      time.Time
	Data    []byte
	Dropped string
}

type young struct {
	Version int
	At      time.Time
	Data    []byte
	Added   []int
}

func TestStatesOfOtherVersions(t *testing.T) {
	at := time.Now()
	encoded, err := Encode(old{1, at, []byte{0, 255}, "x"})
	if err != nil {
		t.Fatal(err)
	}
	var y young
	if err := Decode(encoded, &y); err != nil || y.Version != 1 || !y.At.Equal(at) || !bytes.Equal(y.Data, []byte{0, 255}) || y.Added != nil {
		t.Errorf("an old state: %+v, %v", y, err)
	}
	if encoded, err = Encode(young{2, time.Time{}, nil, []int{1}}); err != nil {
		t.Fatal(err)
	}
	var o old
	if err := Decode(encoded, &o); err != nil || o.Version != 2 || !o.At.IsZero() || o.Dropped != "" {
		t.Errorf("a young state: %+v, %v", o, err)
	}
}

func FuzzDecode(f *testing.F) {
	encoded, err := Encode(young{2, time.Now(), []byte("x"), []int{1}})
	if err != nil {
		f.Fatal(err)
	}
	f.Add(encoded)
	f.Fuzz(func(t *testing.T, b []byte) {
		var y young
		Decode(b, &y) //nolint:errcheck // it must return
	})
}
