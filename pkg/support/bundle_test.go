package support

import (
	"bytes"
	"context"
	"errors"
	"io"
	"strings"
	"testing"
	"time"

	"github.com/streamshim/streamshim/internal/testutil"
)

// Each part is there, whatever becomes of the others, within its bounds.
func TestWrite(t *testing.T) {
	var archive bytes.Buffer
	err := Write(t.Context(), &archive, "bundle", time.Now(), []Part{
		{"good", func(_ context.Context, to io.Writer) error { _, err := io.WriteString(to, "well"); return err }},
		{"half", func(_ context.Context, to io.Writer) error {
			io.WriteString(to, "so far") //nolint:errcheck // a buffer
			return errors.New("and no further")
		}},
		{"endless", func(_ context.Context, to io.Writer) error {
			_, err := io.CopyN(to, strings.NewReader(strings.Repeat("x", 5<<20)), 5<<20)
			return err
		}},
	})
	if err != nil {
		t.Fatal(err)
	}
	files := testutil.Unpack(t, &archive)
	if files["bundle/good"] != "well" || files["bundle/half"] != "so far" || len(files["bundle/endless"]) != maxPart {
		t.Errorf("%d files, %d bytes of the endless one", len(files), len(files["bundle/endless"]))
	}
	for _, want := range []string{"half: and no further", "endless: 1048576 bytes beyond"} {
		if !strings.Contains(files["bundle/errors.txt"], want) {
			t.Errorf("errors.txt lacks %q: %s", want, files["bundle/errors.txt"])
		}
	}
}

func TestWriteEndsWithTheContext(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	err := Write(ctx, io.Discard, "bundle", time.Now(), []Part{{"hung", func(ctx context.Context, _ io.Writer) error {
		cancel()
		<-ctx.Done()
		return ctx.Err()
	}}})
	if !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
}
