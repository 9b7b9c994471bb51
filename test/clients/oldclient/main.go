// Command oldclient is a client of Kubernetes 1.20, in a module of its own:
//
//	oldclient exec METHOD URL               sends "input" and prints what came back
//	oldclient portforward METHOD URL PORT   talks to the port three times
package main

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/ioutil"
	"net"
	"net/http"
	"net/url"
	"os"
	"strings"

	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/portforward"
	"k8s.io/client-go/tools/remotecommand"
	"k8s.io/client-go/transport/spdy"
	"k8s.io/client-go/util/exec"
)

func main() {
	if err := run(os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

func run(args []string) error {
	if len(args) < 3 {
		return errors.New("usage: oldclient exec METHOD URL | portforward METHOD URL PORT")
	}
	u, err := url.Parse(args[2])
	if err != nil {
		return err
	}
	config := &rest.Config{Host: u.Host}
	if args[0] == "exec" {
		return runExec(config, args[1], u)
	}
	return runPortForward(config, args[1], u, args[3])
}

func runExec(config *rest.Config, method string, u *url.URL) error {
	executor, err := remotecommand.NewSPDYExecutor(config, method, u)
	if err != nil {
		return err
	}
	var stdout, stderr bytes.Buffer
	err = executor.Stream(remotecommand.StreamOptions{Stdin: strings.NewReader("input"), Stdout: &stdout, Stderr: &stderr})
	code := 0
	if exit, ok := err.(exec.CodeExitError); ok {
		code = exit.Code
	} else if err != nil {
		return err
	}
	fmt.Printf("stdout %q stderr %q exit code %d\n", &stdout, &stderr, code)
	return nil
}

func runPortForward(config *rest.Config, method string, u *url.URL, port string) error {
	roundTripper, upgrader, err := spdy.RoundTripperFor(config)
	if err != nil {
		return err
	}
	dialer := spdy.NewDialer(upgrader, &http.Client{Transport: roundTripper}, method, u)
	stop, ready := make(chan struct{}), make(chan struct{})
	forwarder, err := portforward.New(dialer, []string{"0:" + port}, stop, ready, ioutil.Discard, os.Stderr)
	if err != nil {
		return err
	}
	ended := make(chan error, 1)
	go func() { ended <- forwarder.ForwardPorts() }()
	select {
	case <-ready:
	case err := <-ended:
		return err
	}
	ports, err := forwarder.GetPorts()
	if err != nil {
		return err
	}
	for i := 0; i < 3; i++ {
		conn, err := net.Dial("tcp", fmt.Sprintf("127.0.0.1:%d", ports[0].Local))
		if err != nil {
			return err
		}
		if _, err := io.WriteString(conn, "abc"); err != nil {
			return err
		}
		answer, err := ioutil.ReadAll(conn)
		conn.Close()
		if err != nil {
			return err
		}
		fmt.Printf("%s\n", answer)
	}
	close(stop)
	return <-ended
}
