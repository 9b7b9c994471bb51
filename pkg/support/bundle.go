// Package support writes what a bug report needs into one archive.
package support

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"context"
	"fmt"
	"io"
	"path"
	"time"
)

// Part is one file of the bundle.
type Part struct {
	Name string // without a folder
	// Gather writes the file's content. What it has written before an error stays; the error goes into errors.txt.
	Gather func(ctx context.Context, to io.Writer) error
}

// Bounds of each part.
const (
	maxPart     = 4 << 20 // bytes; the rest is left out, and errors.txt says so
	partTimeout = 30 * time.Second
)

// Write gathers the parts one after the other and writes a gzipped tar archive with all of them in one folder. A part
// that fails does not fail the others: errors.txt says what is missing and why. The error is that of writing, or of
// the context.
func Write(ctx context.Context, to io.Writer, folder string, now time.Time, parts []Part) error {
	compressed := gzip.NewWriter(to)
	archive := tar.NewWriter(compressed)
	add := func(name string, content []byte) error {
		header := &tar.Header{Name: path.Join(folder, name), Mode: 0o600, Size: int64(len(content)), ModTime: now, Format: tar.FormatPAX}
		if err := archive.WriteHeader(header); err != nil {
			return err
		}
		_, err := archive.Write(content)
		return err
	}
	var failures bytes.Buffer
	for _, part := range parts {
		content, err := gather(ctx, part)
		if ctx.Err() != nil {
			return ctx.Err()
		}
		if err != nil {
			fmt.Fprintf(&failures, "%s: %v\n", part.Name, err)
		}
		if err := add(part.Name, content); err != nil {
			return err
		}
	}
	if failures.Len() > 0 {
		if err := add("errors.txt", failures.Bytes()); err != nil {
			return err
		}
	}
	if err := archive.Close(); err != nil {
		return err
	}
	return compressed.Close()
}

func gather(ctx context.Context, part Part) ([]byte, error) {
	ctx, cancel := context.WithTimeout(ctx, partTimeout)
	defer cancel()
	var content bounded
	err := part.Gather(ctx, &content)
	if err == nil && content.left > 0 {
		err = fmt.Errorf("%d bytes beyond the first %d are left out", content.left, maxPart)
	}
	return content.kept.Bytes(), err
}

// bounded keeps the first maxPart bytes.
type bounded struct {
	kept bytes.Buffer // not embedded: its ReadFrom knows no bound
	left int64
}

func (b *bounded) Write(p []byte) (int, error) {
	n := min(len(p), maxPart-b.kept.Len())
	b.kept.Write(p[:n])
	b.left += int64(len(p) - n)
	return len(p), nil
}
