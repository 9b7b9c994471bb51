package handover

import (
	"io"
	"net"
	"os"
	"testing"

	"golang.org/x/sys/unix"
)

func flags(t *testing.T, d Descriptor) int {
	t.Helper()
	flags, err := unix.FcntlInt(uintptr(d), unix.F_GETFD, 0)
	if err != nil {
		t.Fatal(err)
	}
	return flags
}

func TestFilesAreInheritedOnlyWhenAsked(t *testing.T) {
	read, write, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	files := NewFiles()
	kept, err := files.Keep(read)
	if err != nil {
		t.Fatal(err)
	}
	read.Close()
	if flags(t, kept)&unix.FD_CLOEXEC == 0 {
		t.Error("a kept file is given to children")
	}
	descriptors, err := files.Inherit()
	if err != nil || len(descriptors) != 1 || flags(t, kept)&unix.FD_CLOEXEC != 0 {
		t.Errorf("inherit: %v, %v, flags %d", descriptors, err, flags(t, kept))
	}
	if err := files.Disinherit(); err != nil || flags(t, kept)&unix.FD_CLOEXEC == 0 {
		t.Errorf("disinherit: %v, flags %d", err, flags(t, kept))
	}
	if descriptors, err = files.Inherit(); err != nil {
		t.Fatal(err)
	}
	next, err := Inherited(descriptors)
	if err != nil || flags(t, kept)&unix.FD_CLOEXEC == 0 {
		t.Fatalf("inherited: %v, flags %d", err, flags(t, kept))
	}
	file, err := next.Take(kept, "pipe")
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	if _, err := next.Take(kept, "pipe"); err == nil {
		t.Error("a file was taken twice")
	}
	next.Close()
	write.WriteString("x")
	write.Close()
	if got, err := io.ReadAll(file); string(got) != "x" || err != nil {
		t.Errorf("read %q, %v", got, err)
	}
}

func TestFilesOfConnections(t *testing.T) {
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	files := NewFiles()
	defer files.Close()
	kept, err := files.Keep(listener.(*net.TCPListener))
	if err != nil {
		t.Fatal(err)
	}
	listener.Close()
	again, err := files.TakeListener(kept)
	if err != nil {
		t.Fatal(err)
	}
	defer again.Close()
	dialed, err := net.Dial("tcp", again.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	if kept, err = files.Keep(dialed.(*net.TCPConn)); err != nil {
		t.Fatal(err)
	}
	dialed.Close()
	conn, err := files.TakeConn(kept)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	peer, err := again.Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer peer.Close()
	conn.Write([]byte("x"))
	if n, err := peer.Read(make([]byte, 1)); n != 1 || err != nil {
		t.Errorf("read %d, %v", n, err)
	}
}

// What was not handed over is an error and not somebody else's file.
func TestForeignDescriptor(t *testing.T) {
	if _, err := Inherited([]Descriptor{1 << 20}); err == nil {
		t.Error("a descriptor that is not open was inherited")
	}
	files := NewFiles()
	if _, err := files.Take(1, "standard output"); err == nil {
		t.Error("a file was taken that was not kept")
	}
}
