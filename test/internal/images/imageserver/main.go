// Command imageserver builds the test images and serves them until it is told to end.
//
//	imageserver -busybox PATH -actor PATH [-listen ADDRESS | -listen-fd 3]
//
// With -listen-fd it takes over a listening socket from its parent, which thereby knows the address
// and can connect before the images are built.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/signal"
	"syscall"
	"time"

	"github.com/streamshim/streamshim/test/internal/images"
)

func main() {
	if err := run(); err != nil {
		fmt.Fprintln(os.Stderr, "imageserver:", err)
		os.Exit(1)
	}
}

func run() error {
	var inputs images.Inputs
	flag.StringVar(&inputs.Busybox, "busybox", "", "path of a busybox binary (Debian's dynamic one)")
	flag.StringVar(&inputs.Actor, "actor", "", "path of the program built from test/internal/images/actor")
	address := flag.String("listen", "127.0.0.1:0", "address to listen on")
	descriptor := flag.Uint("listen-fd", 0, "take over this inherited listening socket instead")
	flag.Parse()

	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, syscall.SIGINT)
	defer stop()
	listener, err := listen(*address, uintptr(*descriptor))
	if err != nil {
		return err
	}
	registry, err := images.Build(inputs)
	if err != nil {
		return err
	}
	for _, image := range registry.Images() {
		fmt.Println(image.Digest, image.References)
	}
	fmt.Println("serving on", listener.Addr())

	server := &http.Server{Handler: registry, ReadHeaderTimeout: 10 * time.Second}
	ended := make(chan error, 1)
	go func() { ended <- server.Serve(listener) }()
	select {
	case err := <-ended:
		return err
	case <-ctx.Done():
		if err := server.Close(); err != nil && !errors.Is(err, net.ErrClosed) {
			return err
		}
		if err := <-ended; !errors.Is(err, http.ErrServerClosed) {
			return err
		}
		return nil
	}
}

func listen(address string, descriptor uintptr) (net.Listener, error) {
	if descriptor == 0 {
		return net.Listen("tcp", address)
	}
	inherited := os.NewFile(descriptor, "inherited listener")
	listener, err := net.FileListener(inherited)
	return listener, errors.Join(err, inherited.Close())
}
