// Package nodeinstall puts streamshim on a node, points the node's kubelet at it, and takes both back.
// It works on the file system it runs in: by hand on the node, or, from a DaemonSet's pod, in the
// namespaces of the node's first process (see EnterHost).
//
// A move of the kubelet, to streamshim or back, counts only when the node is Ready again within a
// time. Otherwise it is undone, and Install does not try the same program and configuration again.
package nodeinstall

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"github.com/streamshim/streamshim/pkg/endpoint"
)

// Services starts and stops services by the names of their units.
type Services interface {
	// Reload reads the units again.
	Reload(ctx context.Context) error
	// Enable lets a service start at boot, Disable does not and stops it.
	Enable(ctx context.Context, unit string) error
	Disable(ctx context.Context, unit string) error
	// Restart starts a service, or starts it again, and returns when it says it is ready.
	Restart(ctx context.Context, unit string) error
	// Active tells whether a service runs.
	Active(ctx context.Context, unit string) bool
}

// Readiness tells whether the cluster takes the node for Ready, by a status that is younger than since:
// after a restart the old one stands for a while. The reason says why not.
type Readiness interface {
	Ready(ctx context.Context, since time.Time) (ready bool, reason string, err error)
}

// Config says what to install where.
type Config struct {
	// Program is read to its end and becomes Prefix/bin/streamshim.
	Program io.Reader
	// Unit is the systemd unit; its ExecStart is made to name the program.
	Unit string
	// Configuration becomes ConfigFile when it is not empty; otherwise that file is left alone.
	Configuration string

	Prefix     string // folder of the program
	UnitDir    string
	ConfigFile string
	StateFile  string // what was done, for Uninstall
	// Packaged is the program of the .deb and the .rpm. Where it is, nothing is installed beside it.
	Packaged string
	// Listen is the address that the kubelet is given.
	Listen string
	// Upstream is the runtime's; when it is empty, the one that the kubelet had is taken.
	Upstream string

	Kubelet   *Kubelet
	Services  Services
	Readiness Readiness
	// ReadyTimeout is how long the node may take to be Ready after the kubelet's restart, before the
	// move is undone. Undoing has as long again.
	ReadyTimeout time.Duration
	Log          *slog.Logger
}

// unit is the service's name.
const unit = "streamshim.service"

// startTimeout bounds a restart of a service, commandTimeout "streamshim check".
const (
	startTimeout   = 2 * time.Minute
	commandTimeout = time.Minute
	pollInterval   = time.Second
)

// ErrGaveUp is in the error of an Install that was not tried, because the same program and
// configuration have failed on this node before.
var ErrGaveUp = errors.New("it has failed on this node before and is not tried again")

// Installer installs and uninstalls. Use one at a time on a node.
type Installer struct{ Config }

// New returns an Installer.
func New(c Config) *Installer { return &Installer{Config: c} }

func (i *Installer) programPath() string { return filepath.Join(i.Prefix, "bin", "streamshim") }

// plan is what is to be on the node.
type plan struct {
	program     []byte
	unit        string
	fingerprint string // of all of it
}

func (i *Installer) plan(upstream string) (plan, error) {
	program, err := io.ReadAll(i.Program)
	if err != nil {
		return plan{}, fmt.Errorf("read the program to install: %w", err)
	}
	const packaged = "ExecStart=/usr/bin/streamshim serve"
	if !strings.Contains(i.Unit, packaged) {
		return plan{}, fmt.Errorf("the unit has no line %q", packaged)
	}
	// The upstream is named, because streamshim may start before the runtime has made its socket.
	text := strings.Replace(i.Unit, packaged, fmt.Sprintf("ExecStart=%s serve --config=%s --listen=%s --upstream=%s",
		i.programPath(), i.ConfigFile, i.Listen, upstream), 1)
	sum := sha256.New()
	for _, part := range []string{string(program), text, i.Configuration} {
		fmt.Fprintf(sum, "%d\n%s", len(part), part)
	}
	return plan{program: program, unit: text, fingerprint: hex.EncodeToString(sum.Sum(nil))}, nil
}

// Install puts streamshim on the node, or another version in the place of the one that is there, sees by
// "streamshim check" that it works, and moves the kubelet. It does nothing, and says so by false, when
// all of that was done before. Once the kubelet is being moved it goes on to the end, well or undone,
// although the context may end.
func (i *Installer) Install(ctx context.Context) (changed bool, err error) {
	if _, err := os.Stat(i.Packaged); err == nil {
		return false, fmt.Errorf("this node has streamshim from a package (%s): upgrade that, or remove it first", i.Packaged)
	}
	state, err := readState(i.StateFile)
	if err != nil {
		return false, err
	}
	current, err := i.Kubelet.Endpoint()
	if err != nil {
		return false, err
	}
	ours := endpoint.Same(current, i.Listen)
	switch {
	case i.Upstream != "":
		state.Upstream = i.Upstream
	case !ours:
		state.Upstream = current
	}
	if state.Upstream == "" {
		return false, errors.New("the kubelet talks to streamshim and nothing says which runtime is behind it: name it with --upstream")
	}
	p, err := i.plan(state.Upstream)
	if err != nil {
		return false, err
	}
	switch {
	case state.Phase == phaseFailed && state.Fingerprint == p.fingerprint:
		return false, fmt.Errorf("%w: %s (another version or configuration is tried; so is this one when %s is removed)", ErrGaveUp, state.Reason, i.StateFile)
	case state.Phase == phaseDone && state.Fingerprint == p.fingerprint && ours && i.Services.Active(ctx, unit):
		return false, nil
	}
	fail := func(err error) (bool, error) {
		state.Phase, state.Fingerprint, state.Reason = phaseFailed, p.fingerprint, err.Error()
		return true, errors.Join(err, state.write(i.StateFile))
	}
	// From here on the node is changed: a pod that is being deleted finishes it.
	ctx = context.WithoutCancel(ctx)
	upgrade := ours || state.Phase == phaseDone
	undoFiles, wroteConfiguration, sameUnit, err := i.putFiles(p)
	handOver := upgrade && sameUnit && i.Services.Active(ctx, unit)
	undo := func(why error) (bool, error) {
		i.Log.Error("streamshim does not work here; what was there is put back", "error", why)
		if upgrade { // the node needs the version that was there
			return fail(errors.Join(why, undoFiles(), i.goBack(ctx, handOver)))
		}
		state.OwnsConfiguration = false
		return fail(errors.Join(why, i.Services.Disable(ctx, unit), undoFiles()))
	}
	if err != nil {
		return undo(err)
	}
	if err := i.start(ctx, state.Upstream, handOver); err != nil {
		return undo(err)
	}
	state.OwnsConfiguration = state.OwnsConfiguration || wroteConfiguration
	state.Phase, state.Fingerprint, state.Kubelet = phaseMoving, p.fingerprint, i.Kubelet.Describe()
	if err := state.write(i.StateFile); err != nil {
		return undo(err)
	}
	if err := i.move(ctx, i.Listen, state.Upstream, !ours); err != nil {
		return undo(err)
	}
	state.Phase, state.Reason = phaseDone, ""
	return true, state.write(i.StateFile)
}

// start starts streamshim and has it checked by the program that was installed, as the node would run it.
func (i *Installer) start(ctx context.Context, upstream string, handOver bool) error {
	if err := errors.Join(i.Services.Reload(ctx), i.Services.Enable(ctx, unit)); err != nil {
		return err
	}
	start := i.restart
	if handOver {
		start = i.replace
	}
	if err := start(ctx, unit); err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, commandTimeout)
	defer cancel()
	out, err := command(ctx, i.programPath(), "check", "--config="+i.ConfigFile, "--listen="+i.Listen, "--upstream="+upstream, "--kubelet-config="+i.Kubelet.File)
	for line := range strings.Lines(string(out)) {
		i.Log.Info("streamshim check", "says", strings.TrimSpace(line))
	}
	if err != nil {
		return fmt.Errorf("streamshim check: %w: %s", err, lastLine(out))
	}
	return nil
}

// replace has the program that was installed take over from the one that runs, with its sessions. One that is too old for
// that, or whose admin socket does not answer, is restarted. After an error it goes on as it was.
func (i *Installer) replace(ctx context.Context, name string) error {
	limited, cancel := context.WithTimeout(ctx, startTimeout)
	defer cancel()
	out, err := command(limited, i.programPath(), "upgrade", "--config="+i.ConfigFile)
	i.Log.Info("streamshim upgrade", "says", lastLine(out))
	var exit *exec.ExitError
	switch {
	case err == nil:
		return nil
	case errors.As(err, &exit) && (exit.ExitCode() == exitUnknown || exit.ExitCode() == exitUnreachable):
		return i.restart(ctx, name)
	}
	return fmt.Errorf("streamshim upgrade: %w: %s", err, lastLine(out))
}

// Exit codes of "streamshim upgrade", after which there is no other way than a restart.
const (
	exitUnknown     = 3
	exitUnreachable = 4
)

// goBack has the program run again whose files were put back. With handOver it may be that it has never ceased to.
func (i *Installer) goBack(ctx context.Context, handOver bool) error {
	if handOver && i.replace(ctx, unit) == nil {
		return nil
	}
	return i.restart(ctx, unit)
}

func (i *Installer) restart(ctx context.Context, name string) error {
	ctx, cancel := context.WithTimeout(ctx, startTimeout)
	defer cancel()
	return i.Services.Restart(ctx, name)
}

// move points the kubelet at an endpoint and waits until the node is Ready; if it is not in time, the
// kubelet goes back to where it was. Without must, the kubelet has the endpoint already and the node is
// only waited for.
func (i *Installer) move(ctx context.Context, to, back string, must bool) error {
	since := time.Now()
	if must {
		i.Log.Info("the kubelet is moved", "to", to, "from", back)
		if err := i.Kubelet.SetEndpoint(to); err != nil {
			return errors.Join(err, i.Kubelet.SetEndpoint(back))
		}
		if err := i.restart(ctx, i.Kubelet.Service); err != nil {
			return i.moveBack(ctx, back, fmt.Errorf("restart the kubelet: %w", err))
		}
	} else {
		since = time.Time{}
	}
	if err := i.waitReady(ctx, since); err != nil {
		return i.moveBack(ctx, back, err)
	}
	i.Log.Info("the node is Ready", "kubelet", to)
	return nil
}

func (i *Installer) moveBack(ctx context.Context, back string, why error) error {
	i.Log.Error("the kubelet goes back", "to", back, "error", why)
	if err := i.Kubelet.SetEndpoint(back); err != nil {
		return errors.Join(why, fmt.Errorf("going back failed, the node needs a hand: %w", err))
	}
	since := time.Now()
	if err := i.restart(ctx, i.Kubelet.Service); err != nil {
		return errors.Join(why, fmt.Errorf("going back failed, the node needs a hand: %w", err))
	}
	if err := i.waitReady(ctx, since); err != nil {
		return errors.Join(why, fmt.Errorf("the kubelet is back at %s, and the node is not Ready all the same: %w", back, err))
	}
	return fmt.Errorf("%w; the kubelet is back at %s and the node is Ready", why, back)
}

func (i *Installer) waitReady(ctx context.Context, since time.Time) error {
	ctx, cancel := context.WithTimeout(ctx, i.ReadyTimeout)
	defer cancel()
	tick := time.NewTicker(pollInterval)
	defer tick.Stop()
	reason := "it has not answered"
	for {
		ready, why, err := i.Readiness.Ready(ctx, since)
		switch {
		case err == nil:
			reason = why
		case ctx.Err() == nil: // not the end of the time itself, which says less than what was before
			reason = err.Error()
		}
		if ready {
			return nil
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return fmt.Errorf("the node is not Ready %v after the kubelet's restart: %s", i.ReadyTimeout, reason)
		}
	}
}

// Uninstall moves the kubelet back to the runtime, waits until the node is Ready, and removes what
// Install has put on the node. Audit log and recordings stay. If the node is not Ready in time, the
// kubelet talks to streamshim again and everything stays. A node without streamshim is no error.
func (i *Installer) Uninstall(ctx context.Context) error {
	state, err := readState(i.StateFile)
	if err != nil {
		return err
	}
	if state.Phase == "" {
		i.Log.Info("nothing is installed here", "state", i.StateFile)
		return nil
	}
	ctx = context.WithoutCancel(ctx)
	current, err := i.Kubelet.Endpoint()
	if err != nil {
		return err
	}
	if endpoint.Same(current, i.Listen) {
		if state.Upstream == "" {
			return errors.New("nothing says which runtime the kubelet is to talk to: name it with --upstream")
		}
		if err := i.move(ctx, state.Upstream, i.Listen, true); err != nil {
			return err
		}
	}
	if err := i.Kubelet.Forget(); err != nil {
		return err
	}
	if err := i.Services.Disable(ctx, unit); err != nil {
		return err
	}
	errs := []error{remove(filepath.Join(i.UnitDir, unit)), remove(i.programPath())}
	if state.OwnsConfiguration {
		errs = append(errs, remove(i.ConfigFile))
	}
	errs = append(errs, i.Services.Reload(ctx))
	if err := errors.Join(errs...); err != nil {
		return err
	}
	_ = os.Remove(filepath.Dir(i.programPath())) // these fail, rightly, unless they are empty
	_ = os.Remove(i.Prefix)
	return remove(i.StateFile)
}

// putFiles writes what the plan says. undo, which is never nil, puts back what was there before;
// wroteConfiguration tells that the configuration file is Install's own, sameUnit that the unit is the one that was there.
func (i *Installer) putFiles(p plan) (undo func() error, wroteConfiguration, sameUnit bool, err error) {
	var undos []func() error
	undo = func() error {
		var errs []error
		for n := len(undos) - 1; n >= 0; n-- {
			errs = append(errs, undos[n]())
		}
		return errors.Join(append(errs, i.Services.Reload(context.Background()))...)
	}
	configuration := i.Configuration
	if _, err := os.Stat(i.ConfigFile); configuration == "" && errors.Is(err, os.ErrNotExist) {
		configuration = "# Written by \"streamshim node install\". All keys have their defaults.\n"
	}
	type file struct {
		path string
		mode os.FileMode
		data []byte
	}
	files := []file{
		{i.programPath(), 0o755, p.program},
		{filepath.Join(i.UnitDir, unit), 0o644, []byte(p.unit)},
	}
	if configuration != "" {
		files = append(files, file{i.ConfigFile, 0o600, []byte(configuration)})
	}
	for _, f := range files {
		old, err := os.ReadFile(f.path)
		switch {
		case errors.Is(err, os.ErrNotExist):
			undos = append(undos, func() error { return remove(f.path) })
		case err != nil:
			return undo, false, false, err
		case bytes.Equal(old, f.data):
			sameUnit = sameUnit || filepath.Base(f.path) == unit
			continue
		default:
			undos = append(undos, func() error { return writeFile(f.path, old, f.mode) })
		}
		if err := writeFile(f.path, f.data, f.mode); err != nil {
			return undo, false, false, err
		}
	}
	return undo, configuration != "", sameUnit, nil
}

// writeFile replaces a file in one step: a running program cannot be written to, and a node that loses
// its power has one version or the other.
func writeFile(path string, data []byte, mode os.FileMode) error {
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return err
	}
	file, err := os.CreateTemp(filepath.Dir(path), "."+filepath.Base(path)+"-")
	if err != nil {
		return err
	}
	defer os.Remove(file.Name()) //nolint:errcheck // it has been renamed
	_, err = file.Write(data)
	err = errors.Join(err, file.Chmod(mode), file.Sync(), file.Close())
	if err != nil {
		return fmt.Errorf("write %s: %w", path, err)
	}
	return os.Rename(file.Name(), path)
}

func remove(path string) error {
	if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	return nil
}

func lastLine(text []byte) string {
	lines := strings.Split(strings.TrimSpace(string(text)), "\n")
	return lines[len(lines)-1]
}
