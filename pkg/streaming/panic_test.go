package streaming

import (
	"context"
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"sync/atomic"
	"testing"

	"k8s.io/client-go/tools/remotecommand"

	"github.com/streamshim/streamshim/pkg/streaming/event"
	"github.com/streamshim/streamshim/pkg/workload"
)

// faulty is a process with a fault in one of its methods.
type faulty struct {
	*hostProcess
	in string
}

func (f *faulty) fault(method string) {
	if f.in == method {
		panic("a fault of the test in " + method)
	}
}

type faultyReader struct {
	io.ReadCloser
	fault func()
}

func (r faultyReader) Read([]byte) (int, error) { r.fault(); return 0, io.EOF }

type faultyWriter struct {
	io.WriteCloser
	fault func()
}

func (w faultyWriter) Write([]byte) (int, error) { w.fault(); return 0, io.EOF }

func (f *faulty) Stdout() io.ReadCloser {
	if f.in != "Read" {
		return f.hostProcess.Stdout()
	}
	return faultyReader{f.hostProcess.Stdout(), func() { f.fault("Read") }}
}

func (f *faulty) Stdin() io.WriteCloser {
	if f.in != "Write" {
		return f.hostProcess.Stdin()
	}
	return faultyWriter{f.hostProcess.Stdin(), func() { f.fault("Write") }}
}

func (f *faulty) PID() int                   { return 1 }
func (f *faulty) ExitCode() int              { f.fault("ExitCode"); return f.hostProcess.ExitCode() }
func (f *faulty) StandIn() string            { f.fault("StandIn"); return "" }
func (f *faulty) Resize(workload.Size) error { f.fault("Resize"); return nil }

// A panic in a goroutine of one session ends that session, and tells its client. Everything else goes on.
func TestPanicEndsOneSession(t *testing.T) {
	runTogether(t, func(t *testing.T) {
		forEachTransport(t, func(t *testing.T, transport string) {
			for _, in := range []string{"Start", "StandIn", "Read", "Write", "Resize", "ExitCode"} {
				t.Run(in, func(t *testing.T) {
					t.Parallel()
					var panics atomic.Int32
					s := startServer(t, Config{Observe: func(e event.Event) {
						if e == event.Panicked {
							panics.Add(1)
						}
					}})
					executor := &hostExecutor{t: t}
					input, typed := io.Pipe()
					defer typed.Close()
					var echoed syncBuffer
					neighbour := remotecommand.StreamOptions{Stdin: input, Stdout: &echoed}
					neighbourURL, neighbourEnded := s.execURL(executor, neighbour, "cat"), make(chan error, 1)
					go func() { neighbourEnded <- stream(t.Context(), t, transport, neighbourURL, neighbour) }()
					eventually(t, "the neighbour's start", func() bool { return executor.count() == 1 })

					command := []string{"sh", "-c", "read line; exit 0"}
					options := remotecommand.StreamOptions{Stdin: strings.NewReader("line\n"), Stdout: io.Discard, Tty: in == "Resize"}
					if options.Tty {
						queue := make(sizes, 1)
						queue <- remotecommand.TerminalSize{Width: 1, Height: 1}
						defer close(queue)
						options.TerminalSizeQueue = queue
					}
					u := s.execURL(executorFunc(func(c workload.Command) (remoteProcess, error) {
						if in == "Start" {
							panic("a fault of the test in Start")
						}
						p, err := executor.Start(context.Background(), c)
						if err != nil {
							return nil, err
						}
						return &faulty{p.(*hostProcess), in}, nil
					}), options, command...)
					if err := stream(t.Context(), t, transport, u, options); err == nil || !strings.Contains(err.Error(), "Internal error") {
						t.Errorf("the client got %v", err)
					}
					eventually(t, "the end of one session", func() bool { return len(s.config.Sessions.List()) == 1 })
					if in != "Start" {
						receive(t, executor.last().disconnected, "the process to be told")
					}
					if panics.Load() == 0 {
						t.Error("nobody was told of the panic")
					}
					fmt.Fprintln(typed, "still here")
					eventually(t, "the neighbour's echo", func() bool { return strings.Contains(echoed.String(), "still here") })
					typed.Close()
					if err := receive(t, neighbourEnded, "the neighbour's end"); err != nil {
						t.Errorf("the neighbour ended with %v", err)
					}
				})
			}
		})
	})
}

// Goroutines of sessions and connections are started by package rescue alone. Those that belong to no session say so.
func TestGoroutinesAreRescued(t *testing.T) {
	group := regexp.MustCompile(`(?m)^\s*(\w+)\s+sync\.WaitGroup`)
	for _, root := range []string{".", "../portforward"} {
		err := filepath.WalkDir(root, func(path string, entry fs.DirEntry, err error) error {
			if err != nil || entry.IsDir() || !strings.HasSuffix(path, ".go") || strings.HasSuffix(path, "_test.go") {
				return err
			}
			text, err := os.ReadFile(path)
			if err != nil {
				return err
			}
			for _, name := range group.FindAllStringSubmatch(string(text), -1) {
				if strings.Contains(string(text), name[1]+".Go(") {
					t.Errorf("%s: goroutines of %s, a sync.WaitGroup", path, name[1])
				}
			}
			files := token.NewFileSet()
			file, err := parser.ParseFile(files, path, text, 0)
			if err != nil {
				return err
			}
			ast.Inspect(file, func(n ast.Node) bool {
				if statement, ok := n.(*ast.GoStmt); ok {
					t.Errorf("%v: a goroutine without rescue.Go", files.Position(statement.Pos()))
				}
				return true
			})
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
	}
}
