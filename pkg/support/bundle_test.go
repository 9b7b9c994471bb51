package support

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"context"
	"errors"
	"io"
	"strings"
	"testing"
	"time"
)

func unpack(t *testing.T, archive io.Reader) map[string]string {
	t.Helper()
	plain, err := gzip.NewReader(archive)
	if err != nil {
		t.Fatal(err)
	}
	files := map[string]string{}
	for reader := tar.NewReader(plain); ; {
		header, err := reader.Next()
		if errors.Is(err, io.EOF) {
			return files
		}
		if err != nil {
			t.Fatal(err)
		}
		if header.Mode != 0o600 {
			t.Errorf("%s has mode %o", header.Name, header.Mode)
		}
		text, err := io.ReadAll(reader)
		if err != nil {
			t.Fatal(err)
		}
		files[header.Name] = string(text)
	}
}

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
	files := unpack(t, &archive)
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
