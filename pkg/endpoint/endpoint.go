// Package endpoint parses addresses of Unix sockets, as the kubelet and crictl write them, and listens on them.
package endpoint

import (
	"fmt"
	"strings"
)

// maxPath is the longest path of a Unix socket, in bytes: sockaddr_un.sun_path holds 108 with its NUL
// (unix(7)).
const maxPath = 107

// Path returns the path in unix:///path, unix:/path or /path. The error says how to write an address.
func Path(address string) (string, error) {
	path := strings.TrimPrefix(strings.TrimPrefix(address, "unix:"), "//")
	if !strings.HasPrefix(path, "/") {
		return "", fmt.Errorf("%q is not a Unix socket: write unix:///path/to/socket", address)
	}
	if len(path) > maxPath {
		return "", fmt.Errorf("the socket's path has %d characters and may have %d", len(path), maxPath)
	}
	return path, nil
}

// Same reports whether two addresses are valid and name one socket, however they are written.
func Same(a, b string) bool {
	left, err := Path(a)
	if err != nil {
		return false
	}
	right, err := Path(b)
	return err == nil && left == right
}
