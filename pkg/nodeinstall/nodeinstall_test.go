package nodeinstall

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/streamshim/streamshim/deploy"
)

// services records what is asked of it.
type services struct {
	asked  []string
	active bool
	fails  string // the call that fails
}

func (s *services) call(what string) error {
	s.asked = append(s.asked, what)
	if what == s.fails {
		return errors.New("failed as told")
	}
	return nil
}
func (s *services) Reload(context.Context) error                { return s.call("reload") }
func (s *services) Enable(_ context.Context, unit string) error { return s.call("enable " + unit) }
func (s *services) Disable(_ context.Context, unit string) error {
	s.active = false
	return s.call("disable " + unit)
}
func (s *services) Active(_ context.Context, unit string) bool {
	return unit == "streamshim.service" && s.active
}
func (s *services) Restart(_ context.Context, unit string) error {
	if unit == "streamshim.service" {
		s.active = true
	}
	return s.call("restart " + unit)
}

// node is Ready as long as its kubelet talks to one of these.
type node struct {
	kubelet *Kubelet
	good    []string
}

func (n *node) Ready(context.Context, time.Time) (bool, string, error) {
	current, err := n.kubelet.Endpoint()
	return slices.Contains(n.good, current), "runtime is down", err
}

type fixture struct {
	Config
	services *services
	node     *node
	root     string
}

// program answers "streamshim check", well or badly, and "streamshim upgrade" with success.
func program(check string) string { return upgradable(check, 0) }

// upgradable answers "streamshim upgrade" with an exit code.
func upgradable(check string, code int) string {
	return fmt.Sprintf("#!/bin/sh\ncase \"$*\" in upgrade\\ *) exit %d ;; *--upstream=unix:///run/containerd/*) ;; *) exit 2 ;; esac\n%s\n", code, check)
}

func newFixture(t *testing.T) *fixture {
	t.Helper()
	root := t.TempDir()
	kubelet := &Kubelet{Kind: Plain, Service: "kubelet.service", File: filepath.Join(root, "kubelet.yaml")}
	write(t, kubelet.File, "containerRuntimeEndpoint: "+containerd+"\n")
	f := &fixture{root: root, services: &services{}, node: &node{kubelet: kubelet, good: []string{containerd, shim}}}
	f.Config = Config{
		Unit: deploy.Unit, Prefix: filepath.Join(root, "opt"), UnitDir: filepath.Join(root, "units"),
		ConfigFile: filepath.Join(root, "etc/config.toml"), StateFile: filepath.Join(root, "lib/install.json"),
		Packaged: filepath.Join(root, "usr/bin/streamshim"), Listen: shim, Kubelet: kubelet, Services: f.services, Readiness: f.node,
		ReadyTimeout: 50 * time.Millisecond, Log: slog.New(slog.DiscardHandler),
	}
	return f
}

func (f *fixture) install(t *testing.T, text string) (bool, error) {
	t.Helper()
	f.services.asked = nil
	f.Program = strings.NewReader(text)
	return New(f.Config).Install(t.Context())
}

func (f *fixture) endpoint(t *testing.T) string {
	t.Helper()
	e, err := f.Kubelet.Endpoint()
	if err != nil {
		t.Fatal(err)
	}
	return e
}

func (f *fixture) left() []string {
	var left []string
	for _, path := range []string{"opt/bin/streamshim", "units/streamshim.service", "etc/config.toml"} {
		if _, err := os.Stat(filepath.Join(f.root, path)); err == nil {
			left = append(left, path)
		}
	}
	return left
}

func TestInstallAndUninstall(t *testing.T) {
	f := newFixture(t)
	if changed, err := f.install(t, program("")); err != nil || !changed {
		t.Fatalf("%v, %v", changed, err)
	}
	if got := f.endpoint(t); got != shim {
		t.Errorf("the kubelet has %q", got)
	}
	want := []string{"reload", "enable streamshim.service", "restart streamshim.service", "restart kubelet.service"}
	if !slices.Equal(f.services.asked, want) {
		t.Errorf("asked for %v, expected %v", f.services.asked, want)
	}
	if text := read(t, filepath.Join(f.root, "units/streamshim.service")); !strings.Contains(text, "ExecStart="+f.root+"/opt/bin/streamshim serve") || !strings.Contains(text, "--upstream="+containerd) {
		t.Error(text)
	}
	if changed, err := f.install(t, program("")); err != nil || changed || f.services.asked != nil {
		t.Errorf("once more: %v, %v, asked for %v", changed, err, f.services.asked)
	}
	if changed, err := f.install(t, program("# newer")); err != nil || !changed || !slices.Equal(f.services.asked, []string{"reload", "enable streamshim.service"}) {
		t.Errorf("an upgrade, which restarts nothing: %v, %v, asked for %v", changed, err, f.services.asked)
	}
	// kubeadm upgrade writes the file again.
	write(t, f.Kubelet.File, "containerRuntimeEndpoint: "+containerd+"\n")
	if changed, err := f.install(t, program("# newer")); err != nil || !changed || f.endpoint(t) != shim {
		t.Errorf("after somebody has moved the kubelet: %v, %v", changed, err)
	}
	if err := New(f.Config).Uninstall(t.Context()); err != nil {
		t.Fatal(err)
	}
	if got := f.endpoint(t); got != containerd || f.left() != nil || f.services.active {
		t.Errorf("the kubelet has %q, left are %v", got, f.left())
	}
	if err := New(f.Config).Uninstall(t.Context()); err != nil {
		t.Errorf("where nothing is: %v", err)
	}
}

// What does not work is undone, and not tried again.
func TestFailures(t *testing.T) {
	for name, test := range map[string]struct {
		program string
		fails   string
		good    []string
		moved   bool
	}{
		"the check fails":       {program: program("exit 1"), good: []string{containerd}},
		"it does not start":     {program: program(""), fails: "restart streamshim.service", good: []string{containerd}},
		"the node is not Ready": {program: program(""), good: []string{containerd}, moved: true},
		"it cannot be enabled":  {program: program(""), fails: "enable streamshim.service", good: []string{containerd}},
	} {
		t.Run(name, func(t *testing.T) {
			f := newFixture(t)
			f.services.fails, f.node.good = test.fails, test.good
			_, err := f.install(t, test.program)
			if err == nil || errors.Is(err, ErrGaveUp) {
				t.Fatal(err)
			}
			if got := f.endpoint(t); got != containerd || f.left() != nil || f.services.active {
				t.Errorf("the kubelet has %q, left are %v: %v", got, f.left(), err)
			}
			if moved := slices.Contains(f.services.asked, "restart kubelet.service"); moved != test.moved {
				t.Errorf("asked for %v", f.services.asked)
			}
			f.services.fails, f.node.good = "", []string{containerd, shim}
			if _, err := f.install(t, test.program); !errors.Is(err, ErrGaveUp) || f.services.asked != nil {
				t.Errorf("the same again: %v, asked for %v", err, f.services.asked)
			}
			if changed, err := f.install(t, program("# another")); err != nil || !changed {
				t.Errorf("another version: %v, %v", changed, err)
			}
		})
	}
}

// An upgrade that does not work leaves the version that was there, and the kubelet where it is.
func TestUpgradeThatFails(t *testing.T) {
	f := newFixture(t)
	if _, err := f.install(t, program("")); err != nil {
		t.Fatal(err)
	}
	if _, err := f.install(t, program("exit 1")); err == nil {
		t.Fatal("an upgrade that fails its check was taken")
	}
	if got := read(t, filepath.Join(f.root, "opt/bin/streamshim")); got != program("") || f.endpoint(t) != shim || !f.services.active {
		t.Errorf("%q, %q", got, f.endpoint(t))
	}
}

// A version that cannot be replaced while it runs is restarted; one that refuses the new one goes on.
func TestUpgradeByHandOver(t *testing.T) {
	for code, test := range map[int]struct{ restarts, fails bool }{
		0: {}, exitUnknown: {restarts: true}, exitUnreachable: {restarts: true}, 1: {fails: true},
	} {
		f := newFixture(t)
		if _, err := f.install(t, program("")); err != nil {
			t.Fatal(err)
		}
		_, err := f.install(t, upgradable("", code))
		if (err != nil) != test.fails || slices.Contains(f.services.asked, "restart streamshim.service") != test.restarts {
			t.Errorf("exit code %d: %v, asked for %v", code, err, f.services.asked)
		}
		if got := read(t, filepath.Join(f.root, "opt/bin/streamshim")); test.fails && got != program("") {
			t.Errorf("exit code %d: the old program is not back", code)
		}
	}
	f := newFixture(t)
	if _, err := f.install(t, program("")); err != nil {
		t.Fatal(err)
	}
	f.Config.Unit = strings.Replace(f.Config.Unit, "TimeoutStopSec=45", "TimeoutStopSec=50", 1)
	if _, err := f.install(t, program("# newer")); err != nil || !slices.Contains(f.services.asked, "restart streamshim.service") {
		t.Errorf("another unit: %v, asked for %v", err, f.services.asked)
	}
}

// A node that is lost by the way back has streamshim again.
func TestUninstallThatFails(t *testing.T) {
	f := newFixture(t)
	if _, err := f.install(t, program("")); err != nil {
		t.Fatal(err)
	}
	f.node.good = []string{shim}
	if err := New(f.Config).Uninstall(t.Context()); err == nil || f.endpoint(t) != shim || len(f.left()) != 3 {
		t.Errorf("%v, %q, %v", err, f.endpoint(t), f.left())
	}
}

func TestPackagedNode(t *testing.T) {
	f := newFixture(t)
	write(t, f.Packaged, "")
	if _, err := f.install(t, program("")); err == nil || !strings.Contains(err.Error(), "package") {
		t.Error(err)
	}
}
