package images

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"io/fs"
)

// file is one entry of a layer. At most one of data and hardLink is set. If neither is set, it is an empty file, or a
// folder if mode says so.
type file struct {
	path     string      // without a leading slash
	mode     fs.FileMode // permission bits, fs.ModeDir, fs.ModeSetuid, fs.ModeSticky
	data     []byte
	hardLink string // path of an earlier entry
}

func folder(path string) file {
	return file{path: path, mode: fs.ModeDir | 0o755}
}

func program(path string, data []byte) file {
	return file{path: path, mode: 0o755, data: data}
}

func text(path, content string) file {
	return file{path: path, mode: 0o644, data: []byte(content)}
}

// layer is a list of files that several images may share. It is packed once.
type layer struct {
	files   []file
	archive []byte // gzipped tar, nil until packed
	diffID  string // digest of the tar before compression (OCI image specification)
}

func newLayer(files ...file) *layer {
	return &layer{files: files}
}

// pack makes the archive: the files in their order, all owned by root.
func (l *layer) pack() error {
	if l.archive != nil {
		return nil
	}
	var raw, compressed bytes.Buffer
	writer := tar.NewWriter(&raw)
	for _, f := range l.files {
		if err := writer.WriteHeader(f.header()); err != nil {
			return fmt.Errorf("pack %s: %w", f.path, err)
		}
		if _, err := writer.Write(f.data); err != nil {
			return fmt.Errorf("pack %s: %w", f.path, err)
		}
	}
	if err := writer.Close(); err != nil {
		return fmt.Errorf("pack a layer: %w", err)
	}
	packer, err := gzip.NewWriterLevel(&compressed, gzip.BestSpeed)
	if err != nil {
		return err
	}
	if _, err := packer.Write(raw.Bytes()); err != nil {
		return fmt.Errorf("compress a layer: %w", err)
	}
	if err := packer.Close(); err != nil {
		return fmt.Errorf("compress a layer: %w", err)
	}
	l.archive, l.diffID = compressed.Bytes(), digestOf(raw.Bytes())
	return nil
}

func (f file) header() *tar.Header {
	h := &tar.Header{
		Name: f.path, Mode: int64(f.mode.Perm()), ModTime: buildTime,
		Typeflag: tar.TypeReg, Size: int64(len(f.data)),
	}
	if f.mode&fs.ModeSetuid != 0 {
		h.Mode |= 0o4000
	}
	if f.mode&fs.ModeSticky != 0 {
		h.Mode |= 0o1000
	}
	switch {
	case f.mode.IsDir():
		h.Typeflag, h.Name = tar.TypeDir, f.path+"/"
	case f.hardLink != "":
		h.Typeflag, h.Linkname = tar.TypeLink, f.hardLink
	}
	return h
}

func digestOf(content []byte) string {
	sum := sha256.Sum256(content)
	return "sha256:" + hex.EncodeToString(sum[:])
}
