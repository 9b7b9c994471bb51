// Package vm runs a whole Debian node with systemd as a virtual machine (build.sh makes it) and in it what a run
// brings along on a second disk. It emulates the processor where KVM does not work, which takes minutes, so nothing here has short limits.
package vm

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"time"
)

// Machine is a virtual machine that is off.
type Machine struct {
	// Arch is amd64 or arm64.
	Arch string
	// Folder has what build.sh made: disk.qcow2, vmlinuz and initrd. Nothing in it is written to.
	Folder string
	// Payload is the folder that becomes the second disk, read-only at /mnt/run. Its program "run" is started when the machine
	// is up; when it ends the machine is switched off.
	Payload string
	// Work is a folder for the second disk and the console's log, console.log.
	Work string
}

// Run boots the machine and copies what the payload's program says to the writer, line by line. It returns when the machine is
// off, or kills it when the context ends. What the program came to is the program's to say.
func (m Machine) Run(ctx context.Context, lines func(string)) error {
	second := filepath.Join(m.Work, "payload.img")
	size, err := exec.Command("du", "-sm", m.Payload).Output()
	if err != nil {
		return fmt.Errorf("measure the payload: %w", err)
	}
	var megabytes int
	if _, err := fmt.Sscan(string(size), &megabytes); err != nil {
		return err
	}
	if out, err := exec.Command("mke2fs", "-q", "-F", "-t", "ext4", "-d", m.Payload, second, fmt.Sprintf("%dM", megabytes+megabytes/8+32)).CombinedOutput(); err != nil {
		return fmt.Errorf("make the second disk: %w: %s", err, out)
	}
	program, processor, err := m.processor(ctx)
	if err != nil {
		return err
	}
	arguments := append(processor,
		"-m", "3072", "-smp", "2", "-nodefaults", "-display", "none", "-no-reboot",
		"-kernel", filepath.Join(m.Folder, "vmlinuz"), "-initrd", filepath.Join(m.Folder, "initrd"),
		"-append", "console="+map[string]string{"amd64": "ttyS0", "arm64": "ttyAMA0"}[m.Arch]+" root=/dev/vda rw net.ifnames=0"+
			// systemd's own 90 s are not enough for an emulated machine on a host that others use, too.
			" systemd.default_timeout_start_sec=3600",
		"-drive", "if=virtio,format=qcow2,snapshot=on,cache=unsafe,file="+filepath.Join(m.Folder, "disk.qcow2"),
		"-drive", "if=virtio,format=raw,readonly=on,file="+second,
		"-device", "virtio-rng-pci", "-device", "virtio-serial-pci",
		"-chardev", "stdio,id=run,signal=off", "-device", "virtserialport,chardev=run,name=run",
		"-serial", "file:"+filepath.Join(m.Work, "console.log"),
	)
	command := exec.CommandContext(ctx, program, arguments...)
	// Its standard input is open and silent: at its end qemu would close the port.
	silent, err := command.StdinPipe()
	if err != nil {
		return err
	}
	defer func() { _ = silent.Close() }() // Wait closes it, too
	var complaints strings.Builder
	command.Stderr = &complaints
	out, err := command.StdoutPipe()
	if err != nil {
		return err
	}
	if err := command.Start(); err != nil {
		return fmt.Errorf("start the machine: %w", err)
	}
	reader := bufio.NewReader(out)
	for {
		line, err := reader.ReadString('\n')
		if line = strings.TrimRight(line, "\r\n"); line != "" {
			lines(line)
		}
		if err != nil {
			break
		}
	}
	if err := command.Wait(); err != nil {
		return fmt.Errorf("the machine: %w (%w): %s", err, context.Cause(ctx), complaints.String())
	}
	return nil
}

// processor returns the program that is the machine, and the arguments that say how: by KVM where that works.
func (m Machine) processor(ctx context.Context) (string, []string, error) {
	program, kind, model := "qemu-system-x86_64", "q35", "Haswell-v4"
	if m.Arch == "arm64" {
		program, kind, model = "qemu-system-aarch64", "virt", "cortex-a72"
	}
	path, err := exec.LookPath(program)
	if err != nil {
		return "", nil, err
	}
	if m.Arch == runtime.GOARCH && m.kvmWorks(ctx, path, kind) {
		return path, []string{"-M", kind, "-accel", "kvm", "-cpu", "host"}, nil
	}
	return path, []string{"-M", kind, "-accel", "tcg,thread=multi", "-cpu", model}, nil
}

// kvmWorks tries it: there are machines that have /dev/kvm on which nothing ever runs. A kernel without a root file system
// panics, and is then told to reboot, which ends qemu.
func (m Machine) kvmWorks(ctx context.Context, program, kind string) bool {
	if device, err := os.OpenFile("/dev/kvm", os.O_RDWR, 0); err != nil || device.Close() != nil {
		return false
	}
	ctx, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	command := exec.CommandContext(ctx, program, "-M", kind, "-accel", "kvm", "-cpu", "host", "-m", "256",
		"-nodefaults", "-display", "none", "-no-reboot", "-kernel", filepath.Join(m.Folder, "vmlinuz"), "-append", "panic=-1")
	command.Stdout, command.Stderr = io.Discard, io.Discard
	return command.Run() == nil
}

// errNoResult is what a run that ended without saying how has come to.
var errNoResult = errors.New("the machine was switched off before its tests had ended; see its console.log")
