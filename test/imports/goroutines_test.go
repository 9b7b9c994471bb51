package imports

import (
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
)

// rescued are the folders whose goroutines work for sessions, connections and commands.
var rescued = []string{"pkg/streaming", "pkg/portforward", "pkg/execproc", "pkg/session", "pkg/admin", "pkg/cri"}

// ofAll are folders below whose goroutines serve all sessions or calls alike, and run none of them.
var ofAll = []string{"pkg/cri/internal/quiet"}

// harmless are what a function may call that runs in a goroutine of its own without package rescue: what ends a wait, and has no
// code of ours behind it that could panic.
var harmless = []string{
	"cancel", "endDials", // contexts
	"Stop",                                              // of a session: its context
	"Close", "SetDeadline", "SetWriteDeadline", "Reset", // connections and files
	"close", "Lock", "Unlock", "Broadcast",
	"AfterFunc", // which is looked at by itself
}

// Goroutines that work for sessions are started by package rescue alone, so that a panic in one ends its session and not the
// process. Those of all sessions say so by rescue.Die. The functions of timers and contexts run in goroutines, too.
func TestGoroutinesAreRescued(t *testing.T) {
	group := regexp.MustCompile(`(?m)^\s*(?:var )?(\w+)\s+(?:new\()?sync\.WaitGroup`)
	found := 0
	for _, root := range rescued {
		err := filepath.WalkDir(filepath.Join("../..", root), func(path string, entry fs.DirEntry, err error) error {
			if err == nil && entry.IsDir() && (strings.HasSuffix(path, "test") || slices.Contains(ofAll, strings.TrimPrefix(path, "../../"))) {
				return filepath.SkipDir // what tests share, or all
			}
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
				switch n := n.(type) {
				case *ast.GoStmt:
					t.Errorf("%v: a goroutine without rescue.Go", files.Position(n.Pos()))
				case *ast.CallExpr:
					if name := calledPackage(n); name == "time.AfterFunc" || name == "context.AfterFunc" {
						found++
						if what := unrescued(n.Args[1]); what != "" {
							t.Errorf("%v: a goroutine that calls %s without rescue.Call", files.Position(n.Pos()), what)
						}
					}
				}
				return true
			})
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	if found == 0 {
		t.Error("no function of a timer was found: the test looks at something else")
	}
}

// calledPackage is what a call calls, as "package.Function".
func calledPackage(call *ast.CallExpr) string {
	selector, ok := call.Fun.(*ast.SelectorExpr)
	if !ok {
		return ""
	}
	of, ok := selector.X.(*ast.Ident)
	if !ok {
		return ""
	}
	return of.Name + "." + selector.Sel.Name
}

// unrescued is what a function calls that is neither harmless nor called by package rescue; empty for nothing.
func unrescued(function ast.Expr) string {
	literal, ok := function.(*ast.FuncLit)
	if !ok {
		if name := lastName(function); !slices.Contains(harmless, name) {
			return name
		}
		return ""
	}
	for _, statement := range literal.Body.List {
		var called ast.Expr
		switch s := statement.(type) {
		case *ast.ExprStmt:
			called = s.X
		case *ast.DeferStmt:
			called = s.Call
		}
		call, ok := called.(*ast.CallExpr)
		if !ok {
			return "more than a few functions"
		}
		if name := lastName(call.Fun); !strings.HasPrefix(calledPackage(call), "rescue.") && !slices.Contains(harmless, name) {
			return name
		}
	}
	return ""
}

// lastName is the name of a function or method.
func lastName(of ast.Expr) string {
	switch e := of.(type) {
	case *ast.Ident:
		return e.Name
	case *ast.SelectorExpr:
		return e.Sel.Name
	}
	return "something"
}
