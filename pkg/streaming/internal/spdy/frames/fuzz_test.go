package frames

import "testing"

// FuzzHeaderBlock feeds a header reader two blocks in a row.
func FuzzHeaderBlock(f *testing.F) {
	f.Add(plainBlock(true, 1, "name", "value"), plainBlock(false, 2, "a", "1", "b", "2"))
	f.Add(plainBlock(true, 0), []byte{})
	f.Add(plainBlock(true, 0xffffffff), plainBlock(false, 1, "A", ""))
	f.Add([]byte{0x78, 0xf9, 0xe3, 0xc6, 0xa7, 0xc2, 0x62, 0x60, 0x60, 0x60, 0, 0, 0, 0, 0xff, 0xff}, []byte{0x02, 0x61, 0, 0, 0, 0, 0xff, 0xff})
	f.Fuzz(func(t *testing.T, first, second []byte) {
		r := TakeHeaderReader()
		defer r.Release()
		for _, block := range [][]byte{first, second} {
			header, err := r.Read(block, testLimits)
			if err == nil && len(header) > testLimits.Count {
				t.Errorf("%d headers", len(header))
			}
			if err != nil && header != nil {
				t.Error("headers and an error")
			}
			if r.input.left() > maxLeftover && err == nil {
				t.Errorf("%d bytes left over", r.input.left())
			}
		}
	})
}
