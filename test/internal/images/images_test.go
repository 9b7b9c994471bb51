package images

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// TestMain lets the test binary take the place of busybox: it is an ELF program, a dynamic one with -race, and lists
// applets when asked.
func TestMain(m *testing.M) {
	if len(os.Args) == 2 && os.Args[1] == "--list" {
		fmt.Println("sh\nls\nbusybox\nls\npgrep")
		return
	}
	os.Exit(m.Run())
}

func buildRegistry(t *testing.T) *Registry {
	t.Helper()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	actor := filepath.Join(t.TempDir(), "actor")
	if err := os.WriteFile(actor, []byte("the actor"), 0o755); err != nil {
		t.Fatal(err)
	}
	registry, err := Build(Inputs{Busybox: self, Actor: actor})
	if err != nil {
		t.Fatal(err)
	}
	return registry
}

func TestSameInputsGiveSameDigests(t *testing.T) {
	first, second := buildRegistry(t).Images(), buildRegistry(t).Images()
	if len(first) == 0 || len(first) != len(second) {
		t.Fatalf("%d images, then %d", len(first), len(second))
	}
	seen := map[string]string{}
	for i, image := range first {
		if image.Digest != second[i].Digest {
			t.Errorf("%v: %s, then %s", image.References, image.Digest, second[i].Digest)
		}
		if other := seen[image.Digest]; other != "" {
			t.Errorf("%v and %s are one image", image.References, other)
		}
		seen[image.Digest] = image.References[0]
	}
}

func TestMissingInputIsNamed(t *testing.T) {
	_, err := Build(Inputs{Busybox: "/nonexistent/busybox", Actor: os.Args[0]})
	if err == nil || !strings.Contains(err.Error(), "/nonexistent/busybox") {
		t.Errorf("got %v", err)
	}
}

// TestPull fetches every image as a container runtime does and checks all digests.
func TestPull(t *testing.T) {
	registry := buildRegistry(t)
	server := httptest.NewServer(registry)
	defer server.Close()

	unpacked := map[string]string{} // layer digest to diff ID
	for _, image := range registry.Images() {
		for _, reference := range image.References {
			repository, tag, _ := strings.Cut(reference, ":")
			manifest := get(t, server.URL+"/v2/"+repository+"/manifests/"+tag, manifestType, image.Digest)
			get(t, server.URL+"/v2/"+repository+"/manifests/"+image.Digest, manifestType, image.Digest)
			var content struct {
				Config descriptor   `json:"config"`
				Layers []descriptor `json:"layers"`
			}
			if err := json.Unmarshal(manifest, &content); err != nil {
				t.Fatalf("%s: %v", reference, err)
			}
			var config struct {
				RootFS struct {
					DiffIDs []string `json:"diff_ids"`
				} `json:"rootfs"`
			}
			if err := json.Unmarshal(get(t, server.URL+"/v2/"+repository+"/blobs/"+content.Config.Digest, configType, content.Config.Digest), &config); err != nil {
				t.Fatalf("%s: %v", reference, err)
			}
			if len(config.RootFS.DiffIDs) != len(content.Layers) {
				t.Fatalf("%s: %d diff IDs for %d layers", reference, len(config.RootFS.DiffIDs), len(content.Layers))
			}
			for i, layer := range content.Layers {
				if unpacked[layer.Digest] == config.RootFS.DiffIDs[i] {
					continue // seen with another image
				}
				archive := get(t, server.URL+"/v2/"+repository+"/blobs/"+layer.Digest, layerType, layer.Digest)
				if len(archive) != layer.Size {
					t.Errorf("%s: layer of %d bytes, %d announced", reference, len(archive), layer.Size)
				}
				unpacked[layer.Digest] = config.RootFS.DiffIDs[i]
				if got := digestOf(unpack(t, archive)); got != config.RootFS.DiffIDs[i] {
					t.Errorf("%s: diff ID %s, want %s", reference, got, config.RootFS.DiffIDs[i])
				}
			}
		}
	}
}

func get(t *testing.T, url, mediaType, digest string) []byte {
	t.Helper()
	response, err := http.Get(url)
	if err != nil {
		t.Fatal(err)
	}
	defer response.Body.Close()
	body, err := io.ReadAll(response.Body)
	if err != nil || response.StatusCode != http.StatusOK {
		t.Fatalf("%s: %s, %v", url, response.Status, err)
	}
	if got := digestOf(body); got != digest || response.Header.Get("Docker-Content-Digest") != digest {
		t.Errorf("%s: content %s, header %s, want %s", url, got, response.Header.Get("Docker-Content-Digest"), digest)
	}
	if got := response.Header.Get("Content-Type"); got != mediaType {
		t.Errorf("%s: media type %s, want %s", url, got, mediaType)
	}
	return body
}

func unpack(t *testing.T, archive []byte) []byte {
	t.Helper()
	reader, err := gzip.NewReader(bytes.NewReader(archive))
	if err != nil {
		t.Fatal(err)
	}
	content, err := io.ReadAll(reader)
	if err != nil {
		t.Fatal(err)
	}
	return content
}

func TestRegistryRefusals(t *testing.T) {
	registry := buildRegistry(t)
	digest := registry.Digest(Busybox)
	for _, test := range []struct {
		method, path string
		status       int
	}{
		{http.MethodGet, "/v2/", http.StatusOK},
		{http.MethodGet, "/", http.StatusNotFound},
		{http.MethodGet, "/v1/busybox/manifests/latest", http.StatusNotFound},
		{http.MethodGet, "/v2/busybox/manifests/latest", http.StatusOK},
		{http.MethodHead, "/v2/busybox/manifests/latest", http.StatusOK},
		{http.MethodGet, "/v2/busybox/manifests/none", http.StatusNotFound},
		{http.MethodGet, "/v2/none/manifests/latest", http.StatusNotFound},
		{http.MethodGet, "/v2/none/manifests/" + digest, http.StatusNotFound},
		{http.MethodGet, "/v2/busybox/blobs/sha256:none", http.StatusNotFound},
		{http.MethodGet, "/v2/busybox/tags/list", http.StatusNotFound},
		{http.MethodPut, "/v2/busybox/manifests/latest", http.StatusMethodNotAllowed},
		{http.MethodPost, "/v2/busybox/blobs/uploads/", http.StatusMethodNotAllowed},
	} {
		recorder := httptest.NewRecorder()
		registry.ServeHTTP(recorder, httptest.NewRequest(test.method, test.path, nil))
		if recorder.Code != test.status {
			t.Errorf("%s %s: %d, want %d", test.method, test.path, recorder.Code, test.status)
		}
	}
}

func TestBaseLayer(t *testing.T) {
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	files, err := baseFiles(self, []byte("the actor"))
	if err != nil {
		t.Fatal(err)
	}
	base := newLayer(files...)
	if err := base.pack(); err != nil {
		t.Fatal(err)
	}
	entries := map[string]*tar.Header{}
	for reader := tar.NewReader(bytes.NewReader(unpack(t, base.archive))); ; {
		header, err := reader.Next()
		if err == io.EOF {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		if entries[header.Name] != nil {
			t.Errorf("%s is there twice", header.Name)
		}
		if header.Typeflag == tar.TypeLink && entries[header.Linkname] == nil {
			t.Errorf("%s is a link to %s, which has not come yet", header.Name, header.Linkname)
		}
		entries[header.Name] = header
	}
	for name, want := range map[string]string{
		"bin/ls":    "bin/busybox",
		"bin/pgrep": "bin/busybox",   // busybox has one
		"bin/ipcs":  "usr/bin/actor", // busybox does not have it
	} {
		if entries[name] == nil || entries[name].Linkname != want {
			t.Errorf("%s: %+v, want a link to %s", name, entries[name], want)
		}
	}
	if tmp := entries["tmp/"]; tmp == nil || tmp.Mode != 0o1777 {
		t.Errorf("tmp: %+v", tmp)
	}
	interpreter, err := interpreterOf(self)
	if err != nil {
		t.Fatal(err)
	}
	if name := strings.TrimPrefix(interpreter, "/"); name != "" && entries[name] == nil {
		t.Errorf("the dynamic loader %s is not in the layer", name)
	}
}

func TestSetuidReachesTheArchive(t *testing.T) {
	for _, d := range catalogue(nil, []byte("the actor")) {
		if !strings.Contains(d.references[0], "nonewprivs") {
			continue
		}
		if got := d.layers[1].files[0].header().Mode; got != 0o4755 {
			t.Errorf("mode %o, want 4755", got)
		}
		return
	}
	t.Error("no nonewprivs image")
}
