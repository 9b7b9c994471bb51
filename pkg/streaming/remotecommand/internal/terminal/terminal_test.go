package terminal

import (
	"slices"
	"strings"
	"testing"

	"github.com/streamshim/streamshim/pkg/workload"
)

func TestParser(t *testing.T) {
	tests := []struct {
		name   string
		chunks []string
		want   []workload.Size
		fails  bool
	}{
		{"one", []string{`{"Width":80,"Height":24}`}, []workload.Size{{Width: 80, Height: 24}}, false},
		{"with newlines", []string{"{\"Width\":80,\"Height\":24}\n{\"Width\":1,\"Height\":2}\n"}, []workload.Size{{Width: 80, Height: 24}, {Width: 1, Height: 2}}, false},
		{"split", []string{`{"Wid`, `th":80,"Hei`, `ght":24`, `}`}, []workload.Size{{Width: 80, Height: 24}}, false},
		{"lower case", []string{`{"width":80,"height":24}`}, []workload.Size{{Width: 80, Height: 24}}, false},
		{"too large a number", []string{`{"Width":70000,"Height":24}`}, nil, true},
		{"negative", []string{`{"Width":-1,"Height":24}`}, nil, true},
		{"something else", []string{`80x24`}, nil, true},
		{"endless", []string{"{" + strings.Repeat(" ", maxMessage)}, nil, true},
		{"good, then bad", []string{`{"Width":80,"Height":24}x`}, []workload.Size{{Width: 80, Height: 24}}, true},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			var sizes parser
			var got []workload.Size
			var err error
			for _, chunk := range tt.chunks {
				var s []workload.Size
				s, err = sizes.feed([]byte(chunk))
				got = append(got, s...)
			}
			if !slices.Equal(got, tt.want) || (err != nil) != tt.fails {
				t.Errorf("got %v, %v; want %v, fails %v", got, err, tt.want, tt.fails)
			}
		})
	}
}

func FuzzParser(f *testing.F) {
	f.Add([]byte(`{"Width":80,"Height":24}`), 3)
	f.Add([]byte("{{}}"), 1)
	f.Fuzz(func(t *testing.T, b []byte, split int) {
		split = max(0, min(split, len(b)))
		var whole, parts parser
		want, wantErr := whole.feed(b)
		got, err := parts.feed(b[:split])
		if err == nil {
			var rest []workload.Size
			rest, err = parts.feed(b[split:])
			got = append(got, rest...)
		}
		if !slices.Equal(got, want) || (err == nil) != (wantErr == nil) {
			t.Errorf("split at %d: %v, %v; whole: %v, %v", split, got, err, want, wantErr)
		}
		if cap(parts.pending) > 2*maxMessage {
			t.Errorf("holds %d bytes", cap(parts.pending))
		}
	})
}
