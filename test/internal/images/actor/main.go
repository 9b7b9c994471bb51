// Command actor is one static program that plays every part the test images need besides busybox.
// The name that it is started by chooses the part:
//
//	pause  reaps children, ends with 0 on SIGTERM or SIGINT
//	lab    serves HTTP on :80 and answers each line on stdin with "you said: <line>"
//	nginx  takes the title of an nginx master process, writes /var/run/nginx.pid, serves HTTP on
//	       $LISTEN (:80)
//	httpd  prints a start-up line that contains "httpd", serves HTTP on $LISTEN (:80)
//	nnp    prints its effective user ID; installed set-uid root, for the no_new_privs specs
//	pgrep  prints the IDs of processes whose name contains the last argument; 1 if there is none
//	ipcs   prints the System V shared memory segments of its IPC namespace
//	hog    opens as many descriptors of its output as it may, and stays
package main

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/signal"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"
)

// nginxTitle is what nginx's master process shows as its command line.
const nginxTitle = "nginx: master process"

func main() {
	if err := play(partOf(os.Args[0]), os.Args[1:]); err != nil {
		if !errors.Is(err, errNoMatch) {
			fmt.Fprintf(os.Stderr, "%s: %v\n", os.Args[0], err)
		}
		os.Exit(1)
	}
}

// partOf returns the part that argument zero names.
func partOf(name string) string {
	if strings.HasPrefix(name, nginxTitle) {
		return nginxTitle
	}
	return filepath.Base(name)
}

func play(part string, arguments []string) error {
	switch part {
	case "pause":
		return pause()
	case "lab":
		return lab()
	case "nginx":
		// A process can set its command line only by executing itself again.
		title := nginxTitle + " nginx " + strings.Join(arguments, " ")
		return syscall.Exec("/proc/self/exe", []string{title}, os.Environ()) //nolint:gosec // runs only itself
	case nginxTitle:
		if err := writeProcessID("/var/run/nginx.pid"); err != nil {
			return err
		}
		return serve(listenAddress(), "<html><head><title>Welcome to nginx!</title></head><body>Welcome to nginx!</body></html>\n")
	case "httpd":
		fmt.Fprintln(os.Stderr, "[core:notice] AH00094: Command line: 'httpd -D FOREGROUND'")
		return serve(listenAddress(), "<html><body><h1>It works!</h1></body></html>\n")
	case "nnp":
		fmt.Printf("Effective uid: %d\n", os.Geteuid())
		return nil
	case "pgrep":
		if len(arguments) == 0 {
			return errors.New("usage: pgrep PATTERN")
		}
		return printProcesses(os.Stdout, arguments[len(arguments)-1])
	case "ipcs":
		return printSharedMemory(os.Stdout)
	case "hog":
		return hog()
	default:
		return errors.New("this program must be started as pause, lab, nginx, httpd, nnp, pgrep, ipcs or hog")
	}
}

// hog ends only by a signal.
func hog() error {
	for {
		if _, err := syscall.Dup(1); err != nil {
			break // the limit of descriptors is reached
		}
	}
	return syscall.Pause() // time.Sleep would need a descriptor
}

func pause() error {
	signals := make(chan os.Signal, 16)
	signal.Notify(signals, syscall.SIGTERM, syscall.SIGINT, syscall.SIGCHLD)
	for s := range signals {
		if s != syscall.SIGCHLD {
			return nil
		}
		reapChildren()
	}
	return nil
}

// reapChildren waits for all children that have ended. One SIGCHLD may announce several of them.
func reapChildren() {
	for {
		if pid, err := syscall.Wait4(-1, nil, syscall.WNOHANG, nil); pid <= 0 || err != nil {
			return
		}
	}
}

// lab is the main process of the lab's pod. It continues to serve when its stdin ends.
func lab() error {
	go func() {
		lines := bufio.NewScanner(os.Stdin)
		for lines.Scan() {
			fmt.Println("you said:", lines.Text())
		}
	}()
	return serve(":80", "hello from the pod\n")
}

func listenAddress() string {
	if address := os.Getenv("LISTEN"); address != "" {
		return address
	}
	return ":80"
}

func writeProcessID(path string) error {
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return err
	}
	return os.WriteFile(path, fmt.Appendln(nil, os.Getpid()), 0o644)
}

// serve answers every request with the page and logs it, until a signal asks it to end.
func serve(address, page string) error {
	listener, err := net.Listen("tcp", address)
	if err != nil {
		return err
	}
	signals := make(chan os.Signal, 1)
	signal.Notify(signals, syscall.SIGTERM, syscall.SIGINT, syscall.SIGQUIT)
	server := &http.Server{ReadHeaderTimeout: 30 * time.Second, Handler: handler(page)}
	go func() {
		<-signals
		_ = server.Close() // makes Serve return
	}()
	if err := server.Serve(listener); !errors.Is(err, http.ErrServerClosed) {
		return err
	}
	return nil
}

func handler(page string) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Type", "text/html")
		_, _ = io.WriteString(w, page) // a client that has left needs no page
		fmt.Printf("%s - - %q 200\n", r.RemoteAddr, r.Method+" "+r.URL.Path)
	})
}

// errNoMatch makes pgrep end with 1 and no message.
var errNoMatch = errors.New("no process matches")

func printProcesses(w io.Writer, pattern string) error {
	names, err := filepath.Glob("/proc/[0-9]*/comm")
	if err != nil {
		return err
	}
	found := false
	for _, path := range names {
		pid := filepath.Base(filepath.Dir(path))
		name, err := os.ReadFile(path)
		if err != nil || pid == fmt.Sprint(os.Getpid()) || !strings.Contains(string(name), pattern) {
			continue // it has ended meanwhile, or is this process, or does not match
		}
		found = true
		if _, err := fmt.Fprintln(w, pid); err != nil {
			return err
		}
	}
	if !found {
		return errNoMatch
	}
	return nil
}

func printSharedMemory(w io.Writer) error {
	table, err := os.ReadFile("/proc/sysvipc/shm")
	if err != nil {
		return err
	}
	out := []string{"------ Shared Memory Segments --------", "key shmid perms bytes"}
	for _, line := range slices.Collect(strings.Lines(string(table)))[1:] { // the first line is a heading
		if fields := strings.Fields(line); len(fields) > 3 {
			out = append(out, strings.Join(fields[:4], " "))
		}
	}
	_, err = fmt.Fprintln(w, strings.Join(out, "\n"))
	return err
}
