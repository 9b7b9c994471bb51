package images

import (
	"bytes"
	"io"
	"net/http"
	"slices"
	"strings"
)

// Registry holds images and serves them. It implements the pull half of the OCI distribution specification (version check,
// manifests, blobs; GET and HEAD, with ranges). It does not change once built and is safe for concurrent use.
type Registry struct {
	images    []Image
	blobs     map[string]blob   // by digest
	manifests map[string]string // "repository:tag" or "repository@digest" to digest
}

type blob struct {
	mediaType string
	content   []byte
}

// Images returns all images in the order of the catalogue.
func (r *Registry) Images() []Image {
	return slices.Clone(r.images)
}

// Digest returns the manifest digest of a reference such as "busybox:latest", or "" if there is
// none.
func (r *Registry) Digest(reference string) string {
	return r.manifests[reference]
}

func (r *Registry) put(mediaType string, content []byte) descriptor {
	digest := digestOf(content)
	r.blobs[digest] = blob{mediaType, content}
	return descriptor{mediaType, digest, len(content)}
}

// ServeHTTP implements the registry API. If something does not exist, it answers 404 with the API's error body.
func (r *Registry) ServeHTTP(w http.ResponseWriter, request *http.Request) {
	path, isAPI := strings.CutPrefix(request.URL.Path, "/v2/")
	switch {
	case request.Method != http.MethodGet && request.Method != http.MethodHead:
		fail(w, http.StatusMethodNotAllowed, "UNSUPPORTED", "this registry is read-only")
	case !isAPI:
		fail(w, http.StatusNotFound, "UNSUPPORTED", "the API begins with /v2/")
	case path == "":
		w.Header().Set("Docker-Distribution-Api-Version", "registry/2.0")
		reply(w, http.StatusOK, "{}")
	default:
		r.serveContent(w, request, path)
	}
}

func (r *Registry) serveContent(w http.ResponseWriter, request *http.Request, path string) {
	var digest string
	if repository, reference, ok := strings.Cut(path, "/manifests/"); ok {
		digest = r.manifests[repository+":"+reference]
		if digest == "" {
			digest = r.manifests[repository+"@"+reference]
		}
		if digest == "" {
			fail(w, http.StatusNotFound, "MANIFEST_UNKNOWN", "no such image in the test registry")
			return
		}
	} else if _, digest, ok = strings.Cut(path, "/blobs/"); !ok {
		fail(w, http.StatusNotFound, "UNSUPPORTED", "only manifests and blobs are served")
		return
	}
	content, ok := r.blobs[digest]
	if !ok {
		fail(w, http.StatusNotFound, "BLOB_UNKNOWN", "no such blob in the test registry")
		return
	}
	w.Header().Set("Content-Type", content.mediaType)
	w.Header().Set("Docker-Content-Digest", digest)
	w.Header().Set("Etag", `"`+digest+`"`)
	http.ServeContent(w, request, "", buildTime, bytes.NewReader(content.content))
}

func fail(w http.ResponseWriter, status int, code, message string) {
	reply(w, status, `{"errors":[{"code":"`+code+`","message":"`+message+`"}]}`)
}

func reply(w http.ResponseWriter, status int, body string) {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	_, _ = io.WriteString(w, body) // a client that has left needs no answer
}
