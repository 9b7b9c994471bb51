// Package images builds the container images that the tests and the lab need, in memory and without a network, and serves
// them as a read-only registry.
//
// The images consist of Debian's busybox and one small static Go program (./actor) that plays nginx, httpd, pause and
// whatever else critest expects. They imitate the real images as far as critest v1.36.0 looks. The same inputs give the
// same digests.
//
// Repositories have no host: a runtime asks this registry for every registry host (containerd's certs.d/_default). That is
// also how critest gets "the same image from two registries".
package images

import (
	"encoding/json"
	"fmt"
	"os"
	"runtime"
	"strings"
	"time"
)

// Inputs are the programs in the images.
type Inputs struct {
	// Busybox is the path of a busybox binary. If it is dynamic, its libraries on this machine are added. Debian's
	// busybox-static does not work: its shell runs applets without exec, which defeats critest's MaskedPaths spec.
	Busybox string
	// Actor is the path of the static program built from ./actor.
	Actor string
}

// Image is one image of a Registry.
type Image struct {
	// References are "repository:tag", without a registry host.
	References []string
	// Digest is that of the manifest: "sha256:" and 64 hexadecimal digits.
	Digest string
}

// Build builds every image of the catalogue. It reads the inputs and keeps nothing open.
func Build(inputs Inputs) (*Registry, error) {
	actor, err := os.ReadFile(inputs.Actor)
	if err != nil {
		return nil, fmt.Errorf("images: read the actor program: %w", err)
	}
	base, err := baseFiles(inputs.Busybox, actor)
	if err != nil {
		return nil, fmt.Errorf("images: make the base layer from %s: %w", inputs.Busybox, err)
	}
	registry := &Registry{blobs: map[string]blob{}, manifests: map[string]string{}}
	for _, definition := range catalogue(newLayer(base...), actor) {
		if err := registry.add(definition); err != nil {
			return nil, fmt.Errorf("images: build %s: %w", definition.references[0], err)
		}
	}
	return registry, nil
}

// definition describes an image before it is built.
type definition struct {
	references []string // "repository" means "repository:latest"
	config     imageConfig
	layers     []*layer
}

// imageConfig is the part of an OCI image configuration that describes how to run it.
type imageConfig struct {
	User       string   `json:"User,omitempty"`
	Env        []string `json:"Env,omitempty"`
	Entrypoint []string `json:"Entrypoint,omitempty"`
	Cmd        []string `json:"Cmd,omitempty"`
}

// Media types of the OCI image specification.
const (
	manifestType = "application/vnd.oci.image.manifest.v1+json"
	configType   = "application/vnd.oci.image.config.v1+json"
	layerType    = "application/vnd.oci.image.layer.v1.tar+gzip"
)

const searchPath = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

// buildTime is the only time stamp in the images, so that digests do not depend on the clock.
var buildTime = time.Date(2026, time.January, 1, 0, 0, 0, 0, time.UTC)

type descriptor struct {
	MediaType string `json:"mediaType"`
	Digest    string `json:"digest"`
	Size      int    `json:"size"`
}

// add builds an image and stores its blobs and tags.
func (r *Registry) add(d definition) error {
	if d.config.Env == nil {
		d.config.Env = []string{searchPath}
	}
	var diffIDs []string
	var layers []descriptor
	for _, l := range d.layers {
		if err := l.pack(); err != nil {
			return err
		}
		diffIDs = append(diffIDs, l.diffID)
		layers = append(layers, r.put(layerType, l.archive))
	}
	config, err := json.Marshal(map[string]any{
		"created": buildTime, "architecture": runtime.GOARCH, "os": "linux",
		"config": d.config,
		"rootfs": map[string]any{"type": "layers", "diff_ids": diffIDs},
		// Without the name, images of equal content would be one image, and critest counts images.
		"history": []any{map[string]any{"created": buildTime, "comment": d.references[0]}},
	})
	if err != nil {
		return err
	}
	manifest, err := json.Marshal(map[string]any{
		"schemaVersion": 2, "mediaType": manifestType,
		"config": r.put(configType, config), "layers": layers,
	})
	if err != nil {
		return err
	}
	image := Image{Digest: r.put(manifestType, manifest).Digest}
	for _, reference := range d.references {
		if !strings.Contains(reference, ":") {
			reference += ":latest"
		}
		repository, _, _ := strings.Cut(reference, ":")
		image.References = append(image.References, reference)
		r.manifests[reference] = image.Digest
		r.manifests[repository+"@"+image.Digest] = image.Digest
	}
	r.images = append(r.images, image)
	return nil
}
