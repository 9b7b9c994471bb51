package admin

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"net"
	"net/http"
	"net/url"
	"strconv"
	"time"
)

const dialTimeout = 5 * time.Second

// Client talks to the admin socket of a running streamshim.
type Client struct {
	http *http.Client
	path string
}

// NewClient returns a client of the socket at path. The caller closes it.
func NewClient(path string) *Client {
	dialer := net.Dialer{Timeout: dialTimeout}
	return &Client{path: path, http: &http.Client{Transport: &http.Transport{
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return dialer.DialContext(ctx, "unix", path)
		},
	}}}
}

// Close closes idle connections.
func (c *Client) Close() { c.http.CloseIdleConnections() }

// List returns the live sessions, oldest first.
func (c *Client) List(ctx context.Context) ([]Session, error) {
	var list SessionList
	err := c.get(ctx, "/v1/sessions", &list)
	return list.Sessions, err
}

// Show returns one session. In this and the methods below, the id may be shortened as long as it is unique, and the error
// is an *Error if the server has answered.
func (c *Client) Show(ctx context.Context, id string) (Session, error) {
	var s Session
	err := c.get(ctx, "/v1/sessions/"+url.PathEscape(id), &s)
	return s, err
}

// Kill ends a session or signals its process.
func (c *Client) Kill(ctx context.Context, id string, request KillRequest) error {
	return c.post(ctx, "/v1/sessions/"+url.PathEscape(id)+"/kill", request, nil)
}

// Watch returns what the session's terminal shows from now on, as an asciicast that ends with the
// session, or with the program that serves it. The caller closes it.
func (c *Client) Watch(ctx context.Context, id string) (*Watch, error) {
	return c.WatchAgain(ctx, id, "")
}

// WatchAgain is Watch after an earlier watch of the session has ended, whose name it takes. If the terminal's user was told of
// that one, this one is not announced.
func (c *Client) WatchAgain(ctx context.Context, id, before string) (*Watch, error) {
	header := http.Header{}
	if before != "" {
		header.Set(HeaderWatch, before)
	}
	response, err := c.ask(ctx, http.MethodGet, "/v1/sessions/"+url.PathEscape(id)+"/watch", header, http.NoBody) //nolint:bodyclose // Watch.Close does
	if err != nil {
		return nil, err
	}
	return &Watch{response: response}, nil
}

// Watch is what a session's terminal shows, as an asciicast. It is used by one goroutine at a time.
type Watch struct {
	response *http.Response
	over     bool // Read has returned an error
}

// Read reads the asciicast.
func (w *Watch) Read(p []byte) (int, error) {
	n, err := w.response.Body.Read(p)
	w.over = w.over || err != nil
	return n, err
}

// Name returns the name of the watch, for WatchAgain. It is empty if streamshim is of a version that gives none.
func (w *Watch) Name() string { return w.response.Header.Get(HeaderWatch) }

// Close ends the watch.
func (w *Watch) Close() error { return w.response.Body.Close() }

// End returns how the watch has ended, once Read has returned an error. Before that it is empty.
func (w *Watch) End() WatchEnd {
	if !w.over {
		return ""
	}
	if end := WatchEnd(w.response.Trailer.Get(trailerWatchEnd)); end != "" {
		return end
	}
	return WatchLost
}

// Missed returns how many bytes the session has sent to its client, about, between the end of an earlier watch and the
// beginning of this one; false if that is not known.
func (w *Watch) Missed(since *Watch) (bytes int64, known bool) {
	before, err := strconv.ParseInt(since.response.Trailer.Get(trailerBytesOut), 10, 64)
	if err != nil {
		return 0, false
	}
	now, err := strconv.ParseInt(w.response.Header.Get(headerBytesOut), 10, 64)
	return max(now-before, 0), err == nil
}

// Recordings returns the recordings on the node, newest first.
func (c *Client) Recordings(ctx context.Context) ([]Recording, error) {
	var list RecordingList
	err := c.get(ctx, "/v1/recordings", &list)
	return list.Recordings, err
}

// Recording returns a recording, an asciicast. The caller closes it.
func (c *Client) Recording(ctx context.Context, name string) (io.ReadCloser, error) {
	return c.do(ctx, http.MethodGet, "/v1/recordings/"+url.PathEscape(name), http.NoBody)
}

// HandOver starts a hand-over to the installed program and returns at once. LastHandover returns its progress.
func (c *Client) HandOver(ctx context.Context, request HandoverRequest) (Handover, error) {
	var begun Handover
	err := c.post(ctx, "/v1/handover", request, &begun)
	return begun, err
}

// LastHandover returns the progress or result of the last hand-over.
func (c *Client) LastHandover(ctx context.Context) (Handover, error) {
	var last Handover
	err := c.get(ctx, "/v1/handover", &last)
	return last, err
}

func (c *Client) get(ctx context.Context, path string, answer any) error {
	return c.call(ctx, http.MethodGet, path, http.NoBody, answer)
}

func (c *Client) post(ctx context.Context, path string, request, answer any) error {
	body, err := json.Marshal(request)
	if err != nil {
		return err
	}
	return c.call(ctx, http.MethodPost, path, bytes.NewReader(body), answer)
}

// call decodes the answer, unless it is nil.
func (c *Client) call(ctx context.Context, method, path string, body io.Reader, answer any) error {
	response, err := c.do(ctx, method, path, body)
	if err != nil {
		return err
	}
	defer response.Close() //nolint:errcheck // it was read
	if answer == nil {
		return nil
	}
	if err := json.NewDecoder(response).Decode(answer); err != nil {
		return fmt.Errorf("answer of %s: %w", c.path, err)
	}
	return nil
}

// do returns the body of the answer. The caller closes it.
func (c *Client) do(ctx context.Context, method, path string, body io.Reader) (io.ReadCloser, error) {
	response, err := c.ask(ctx, method, path, nil, body)
	if err != nil {
		return nil, err
	}
	return response.Body, nil
}

// ask is do for those who need more of the response than its body, which the caller closes.
func (c *Client) ask(ctx context.Context, method, path string, header http.Header, body io.Reader) (*http.Response, error) {
	request, err := http.NewRequestWithContext(ctx, method, "http://streamshim"+path, body)
	if err != nil {
		return nil, err
	}
	maps.Copy(request.Header, header)
	response, err := c.http.Do(request)
	if err != nil {
		var call *url.Error
		if errors.As(err, &call) {
			err = call.Err // without the URL, whose host is only a placeholder
		}
		if errors.Is(err, fs.ErrPermission) {
			return nil, fmt.Errorf("%w: only root may open streamshim's admin socket", err)
		}
		return nil, fmt.Errorf("%w; is streamshim running, with its admin socket at %s?", err, c.path)
	}
	if response.StatusCode < 300 {
		return response, nil
	}
	defer response.Body.Close() //nolint:errcheck // as above
	known := &Error{Code: response.StatusCode}
	if err := json.NewDecoder(response.Body).Decode(known); err != nil || known.Message == "" {
		known.Message = response.Status
	}
	return nil, known
}
