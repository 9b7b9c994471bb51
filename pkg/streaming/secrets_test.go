package streaming

import (
	"bytes"
	"encoding/base64"
	"io"
	"log/slog"
	"net"
	"path"
	"strings"
	"testing"

	"k8s.io/client-go/tools/remotecommand"

	"github.com/streamshim/streamshim/pkg/session"
)

// TestNothingSecretIsLogged checks that the log has no token, argument, variable or byte of a stream, at any level, and
// that a token has 256 bits.
func TestNothingSecretIsLogged(t *testing.T) {
	forEachTransport(t, func(t *testing.T, transport string) {
		var logged syncBuffer
		log := slog.New(slog.NewTextHandler(&logged, &slog.HandlerOptions{Level: slog.LevelDebug - 10}))
		config := ordinary(Config{})
		config.Log, config.Sessions = log, session.NewRegistry(log)
		listener, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		s := newTestServer(t, config, listener.Addr())
		go func() { s.served <- s.Serve(listener) }()
		t.Cleanup(s.stop)

		var out bytes.Buffer
		options := remotecommand.StreamOptions{Stdin: strings.NewReader("typed-secret\n"), Stdout: &out, Stderr: io.Discard}
		u := s.execURL(&hostExecutor{t: t}, options, "sh", "-c", "cat; echo shown-secret; exit 7", "argument-secret")
		token := path.Base(u.Path)
		if bits, err := base64.RawURLEncoding.DecodeString(token); err != nil || len(bits) != 32 {
			t.Errorf("a token of %d bytes: %v", len(bits), err)
		}
		if err := stream(t.Context(), t, transport, u, options); exitCode(t, err) != 7 || !strings.Contains(out.String(), "shown-secret") {
			t.Fatalf("%v, %q", err, &out)
		}
		if err := stream(t.Context(), t, transport, u, options); err == nil { // used up: refusals are logged, too
			t.Error("a token was good twice")
		}
		missing := s.execURL(&hostExecutor{t: t, startErr: startError{127, "argument-secret: not found"}}, options, "argument-secret")
		stream(t.Context(), t, transport, missing, options) //nolint:errcheck // it fails
		if logged.String() == "" {
			t.Error("nothing was logged at all")
		}
		for _, secret := range []string{token, path.Base(missing.Path), "typed-secret", "shown-secret", "argument-secret"} {
			if strings.Contains(logged.String(), secret) {
				t.Errorf("%q is in the log:\n%s", secret, &logged)
			}
		}
	})
}
