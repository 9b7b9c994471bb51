// Command image makes an OCI archive (a tar of an OCI image layout) of one static program for several
// architectures. The same programs give the same bytes: there is no time and no order of chance in it.
//
//	image -o OUT -tag REFERENCE -version VERSION linux/amd64=PATH linux/arm64=PATH ...
package main

import (
	"archive/tar"
	"bytes"
	"errors"
	"flag"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/layout"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
	"github.com/google/go-containerregistry/pkg/v1/types"
)

func main() {
	out := flag.String("o", "", "OCI archive to write")
	tag := flag.String("tag", "", "reference that runtimes give the image when they import it")
	version := flag.String("version", "", "version, for the image's annotations")
	license := flag.String("license", "", "file that goes along with the program")
	flag.Parse()
	if err := run(*out, *tag, *version, *license, flag.Args()); err != nil {
		fmt.Fprintln(os.Stderr, "image:", err)
		os.Exit(1)
	}
}

func run(out, tag, version, license string, programs []string) error {
	if out == "" || tag == "" || len(programs) == 0 {
		return errors.New("usage: image -o OUT -tag REFERENCE -version VERSION linux/ARCH=PATH...")
	}
	index := mutate.IndexMediaType(empty.Index, types.OCIImageIndex)
	for _, program := range programs {
		platform, path, _ := strings.Cut(program, "=")
		image, err := build(platform, path, license, version)
		if err != nil {
			return fmt.Errorf("%s: %w", program, err)
		}
		p, err := v1.ParsePlatform(platform)
		if err != nil {
			return err
		}
		index = mutate.AppendManifests(index, mutate.IndexAddendum{Add: image, Descriptor: v1.Descriptor{Platform: p}})
	}
	folder, err := os.MkdirTemp("", "streamshim-image-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(folder)
	path, err := layout.Write(folder, empty.Index)
	if err != nil {
		return err
	}
	// containerd reads the first annotation, other runtimes read the second.
	if err := path.AppendIndex(index, layout.WithAnnotations(map[string]string{
		"io.containerd.image.name":          tag,
		"org.opencontainers.image.ref.name": tag[strings.LastIndex(tag, ":")+1:],
	})); err != nil {
		return err
	}
	return pack(folder, out)
}

func build(platform, path, license, version string) (v1.Image, error) {
	p, err := v1.ParsePlatform(platform)
	if err != nil {
		return nil, err
	}
	layerTar, err := files(map[string]string{"usr/bin/streamshim": path, "usr/share/doc/streamshim/copyright": license})
	if err != nil {
		return nil, err
	}
	layer, err := tarball.LayerFromOpener(func() (io.ReadCloser, error) {
		return io.NopCloser(bytes.NewReader(layerTar)), nil
	}, tarball.WithMediaType(types.OCILayer))
	if err != nil {
		return nil, err
	}
	image := mutate.ConfigMediaType(mutate.MediaType(empty.Image, types.OCIManifestSchema1), types.OCIConfigJSON)
	image, err = mutate.AppendLayers(image, layer)
	if err != nil {
		return nil, err
	}
	file, err := image.ConfigFile()
	if err != nil {
		return nil, err
	}
	file = file.DeepCopy()
	file.OS, file.Architecture, file.Variant = p.OS, p.Architecture, p.Variant
	file.Config = v1.Config{
		Env:        []string{"PATH=/usr/bin"},
		Entrypoint: []string{"/usr/bin/streamshim"},
		Cmd:        []string{"--help"},
		Labels: map[string]string{
			"org.opencontainers.image.title":    "streamshim",
			"org.opencontainers.image.version":  version,
			"org.opencontainers.image.licenses": "Apache-2.0",
		},
	}
	return mutate.ConfigFile(image, file)
}

// files returns a layer with these files and the folders above them, owned by root.
func files(sources map[string]string) ([]byte, error) {
	var buffer bytes.Buffer
	archive := tar.NewWriter(&buffer)
	for _, folder := range []string{"tmp", "usr", "usr/bin", "usr/share", "usr/share/doc", "usr/share/doc/streamshim"} {
		mode := int64(0o755)
		if folder == "tmp" {
			mode = 0o1777
		}
		if err := archive.WriteHeader(&tar.Header{Typeflag: tar.TypeDir, Name: folder + "/", Mode: mode, ModTime: epoch}); err != nil {
			return nil, err
		}
	}
	for _, name := range []string{"usr/bin/streamshim", "usr/share/doc/streamshim/copyright"} {
		data, err := os.ReadFile(sources[name])
		if err != nil {
			return nil, err
		}
		mode := int64(0o644)
		if strings.HasPrefix(name, "usr/bin/") {
			mode = 0o755
		}
		if err := archive.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: name, Mode: mode, Size: int64(len(data)), ModTime: epoch}); err != nil {
			return nil, err
		}
		if _, err := archive.Write(data); err != nil {
			return nil, err
		}
	}
	if err := archive.Close(); err != nil {
		return nil, err
	}
	return buffer.Bytes(), nil
}

var epoch = time.Unix(0, 0).UTC()

// pack writes the folder as a tar, sorted by name.
func pack(folder, out string) error {
	file, err := os.Create(out + ".tmp")
	if err != nil {
		return err
	}
	archive := tar.NewWriter(file)
	err = filepath.WalkDir(folder, func(path string, entry fs.DirEntry, err error) error {
		if err != nil || path == folder {
			return err
		}
		name, err := filepath.Rel(folder, path)
		if err != nil {
			return err
		}
		if entry.IsDir() {
			return archive.WriteHeader(&tar.Header{Typeflag: tar.TypeDir, Name: name + "/", Mode: 0o755, ModTime: epoch})
		}
		data, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		if err := archive.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: name, Mode: 0o644, Size: int64(len(data)), ModTime: epoch}); err != nil {
			return err
		}
		_, err = archive.Write(data)
		return err
	})
	if err := errors.Join(err, archive.Close(), file.Close()); err != nil {
		return errors.Join(err, os.Remove(out+".tmp"))
	}
	return os.Rename(out+".tmp", out)
}
