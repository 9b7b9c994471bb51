package limits

import (
	"sync"
	"testing"
)

func TestRoom(t *testing.T) {
	r := NewRoom(10)
	if !r.Take(6) || !r.Take(4) || r.Take(1) || r.Used() != 10 || r.Refused() != 1 {
		t.Errorf("%d used, %d refused", r.Used(), r.Refused())
	}
	r.Update(12)
	if !r.Take(2) || r.Take(1) {
		t.Error("not the new limit")
	}
	r.Return(12)
	r.Update(0)
	if !r.Take(1 << 40) {
		t.Error("0 is a limit")
	}
}

func TestRoomAtOnce(t *testing.T) {
	r := NewRoom(100)
	var all sync.WaitGroup
	for range 50 {
		all.Go(func() {
			for range 1000 {
				if r.Take(7) {
					r.Return(7)
				}
			}
		})
	}
	all.Wait()
	if r.Used() != 0 {
		t.Errorf("%d used", r.Used())
	}
}
