package direct

import (
	"os"
	"testing"
)

// TestTo refuses whatever is no plain non-blocking file.
func TestTo(t *testing.T) {
	read, write, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer read.Close()
	defer write.Close()
	if To(write) == nil {
		t.Error("a pipe is not written directly")
	}
	if To(struct{ *os.File }{write}) != nil {
		t.Error("a type that embeds a file is written directly")
	}
	write.Fd() // makes it blocking
	if To(write) != nil {
		t.Error("a blocking pipe is written directly")
	}
}
