// Package hostile attacks commands on their way into containers, from inside of real containers, with every
// engine that can be configured and beside "runc exec". README.md says how to read what it prints.
package hostile

import (
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/streamshim/streamshim/test/internal/node"
)

var (
	count   = flag.Int("hostile.count", 2, "how many commands each attack meets, with each engine")
	alone   = flag.Bool("hostile.alone", false, "make each attack alone, not those together that do not disturb each other")
	only    = flag.String("hostile.attacks", "", "make only these attacks, separated by commas")
	kept    = flag.String("hostile.sums", "", "a file that keeps how many commands each attack has met, over several runs")
	configs = flag.String("hostile.configurations", "", "use only these configurations, separated by commas")
)

// insideVariable says what this process is: the init of the pid namespace, or that which runs the tests.
const insideVariable = "STREAMSHIM_HOSTILE_INSIDE"

// folderVariable names the folder for everything that the tests make.
const folderVariable = "STREAMSHIM_HOSTILE_FOLDER"

// TestMain runs the tests in a pid namespace of their own: with hostPID an attacker sees all processes of
// what is its host, and those of other people are none of its business. So that the nodes among the tests are in
// nobody's way either, in a network namespace of their own too. Nothing survives the tests.
func TestMain(m *testing.M) {
	flag.Parse()
	switch os.Getenv(insideVariable) {
	case "init":
		os.Exit(initProcess())
	case "tests":
		os.Exit(inside(m))
	}
	if node.Ready("") != nil { // each test says so, or fails
		os.Exit(m.Run())
	}
	runtime.LockOSThread() // whose end would be the end of the child
	os.Exit(isolated())
}

// isolated runs this program again, in namespaces of its own.
func isolated() int {
	folder, err := os.MkdirTemp("", "hostile")
	if err != nil {
		fmt.Fprintln(os.Stderr, "hostile:", err)
		return 1
	}
	defer os.RemoveAll(folder)
	again := exec.Command("/proc/self/exe", os.Args[1:]...)
	again.Env = append(os.Environ(), insideVariable+"=init", folderVariable+"="+folder)
	again.Stdin, again.Stdout, again.Stderr = os.Stdin, os.Stdout, os.Stderr
	again.SysProcAttr = &unix.SysProcAttr{Cloneflags: unix.CLONE_NEWPID | unix.CLONE_NEWNS | unix.CLONE_NEWNET, Pdeathsig: unix.SIGKILL}
	err = again.Run()
	var exit *exec.ExitError
	if errors.As(err, &exit) && exit.ExitCode() > 0 {
		return exit.ExitCode()
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "hostile:", err)
		return 1
	}
	return 0
}

// base is the folder of everything that the tests make, and hostFile the file that no container may read.
var base, hostFile, attackerProgram, wrongProgram string

const hostSecret = "streamshim-host-secret"

// initProcess runs the tests in another process, and reaps what nobody else does: a zombie would keep its
// container's main process from ending.
func initProcess() int {
	if os.Getpid() != 1 {
		fmt.Fprintln(os.Stderr, "hostile: "+insideVariable+" is for the tests themselves")
		return 1
	}
	err := errors.Join(
		unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""),
		unix.Mount("proc", "/proc", "proc", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, ""),
	)
	if err == nil {
		err = raiseLoopback()
	}
	if err == nil {
		err = os.Setenv(insideVariable, "tests")
	}
	var tests int
	if err == nil {
		tests, err = syscall.ForkExec("/proc/self/exe", os.Args, &syscall.ProcAttr{Env: os.Environ(), Files: []uintptr{0, 1, 2}})
	}
	for err == nil {
		var status unix.WaitStatus
		var pid int
		if pid, err = unix.Wait4(-1, &status, unix.WALL, nil); err == unix.EINTR {
			err = nil
		}
		if pid == tests && (status.Exited() || status.Signaled()) {
			return status.ExitStatus()
		}
	}
	fmt.Fprintln(os.Stderr, "hostile:", err)
	return 1
}

func inside(m *testing.M) int {
	base = os.Getenv(folderVariable)
	if err := prepare(); err != nil {
		fmt.Fprintln(os.Stderr, "hostile:", err)
		return 1
	}
	code := m.Run()
	printTable(os.Stdout)
	if err := printSums(os.Stdout, *kept); err != nil {
		fmt.Fprintln(os.Stderr, "hostile:", err)
		return 1
	}
	return code
}

func prepare() error {
	if err := os.Chmod(base, 0o755); err != nil { // for containers with a user namespace
		return err
	}
	hostFile = filepath.Join(base, "secret")
	if err := os.WriteFile(hostFile, []byte(hostSecret+"\n"), 0o600); err != nil {
		return err
	}
	// What a launcher might hand on or show: an environment with something of the host in it.
	if err := os.Setenv("STREAMSHIM_HOSTILE_SECRET", hostSecret); err != nil {
		return err
	}
	// A descriptor that is not closed by execve, as a process may have inherited one from whoever started it.
	if _, err := unix.Open(base, unix.O_RDONLY|unix.O_DIRECTORY, 0); err != nil {
		return err
	}
	attackerProgram, wrongProgram = filepath.Join(base, "attacker"), filepath.Join(base, "wrong")
	for program, source := range map[string]string{attackerProgram: "attacker/attacker.c", wrongProgram: "wrong/wrong.c"} {
		// At one address each time, which the attacker relies on.
		compile := exec.Command("cc", "-O2", "-Wall", "-Wextra", "-Werror", "-Wno-format-truncation", "-static", "-no-pie", "-o", program, source)
		if out, err := compile.CombinedOutput(); err != nil {
			return fmt.Errorf("compile %s: %w: %s", source, err, out)
		}
	}
	return nil
}

func raiseLoopback() error {
	socket, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(socket)
	request, err := unix.NewIfreq("lo")
	if err != nil {
		return err
	}
	request.SetUint16(unix.IFF_UP | unix.IFF_RUNNING)
	return unix.IoctlIfreq(socket, unix.SIOCSIFFLAGS, request)
}
