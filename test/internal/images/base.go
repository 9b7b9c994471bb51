package images

import (
	"debug/elf"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
)

const (
	passwdFile = "root:x:0:0:root:/root:/bin/sh\n" +
		"daemon:x:1:1:daemon:/usr/sbin:/bin/false\n" +
		"www-data:x:33:33:www-data:/var/www:/bin/false\n" +
		"nobody:x:65534:65534:nobody:/home:/bin/false\n"
	groupFile = "root:x:0:\ndaemon:x:1:\nusers:x:100:\nwww-data:x:33:\nnogroup:x:65534:\n"
)

// baseFiles is the layer below nearly every image: a busybox system with one entry for each applet, and the actor as the
// commands that critest or the benchmarks call and Debian's busybox lacks.
func baseFiles(busybox string, actor []byte) ([]file, error) {
	binary, err := os.ReadFile(busybox)
	if err != nil {
		return nil, err
	}
	libraries, err := sharedLibraries(busybox)
	if err != nil {
		return nil, err
	}
	list, err := exec.Command(busybox, "--list").Output()
	if err != nil {
		return nil, fmt.Errorf("list the applets: %w", err)
	}
	files := []file{
		folder("bin"), folder("dev"), folder("etc"), folder("home"), folder("proc"), folder("root"),
		folder("sys"), folder("usr"), folder("usr/bin"), folder("usr/sbin"), folder("var"), folder("var/run"),
		{path: "tmp", mode: fs.ModeDir | fs.ModeSticky | 0o777},
		text("etc/passwd", passwdFile), text("etc/group", groupFile),
	}
	files = append(files, libraries...)
	files = append(files, program("bin/busybox", binary))
	applets := strings.Fields(string(list))
	slices.Sort(applets)
	applets = slices.Compact(applets)
	for _, applet := range applets {
		if applet == "busybox" {
			continue
		}
		// Hard links as in the real image. With symbolic links the MaskedPaths spec, which mounts over /bin/ls, would hide
		// busybox itself.
		files = append(files, file{path: "bin/" + applet, mode: 0o755, hardLink: "bin/busybox"})
	}
	files = append(files, program("usr/bin/actor", actor))
	for _, command := range []string{"ipcs", "pgrep", "hog"} {
		if !slices.Contains(applets, command) {
			files = append(files, file{path: "bin/" + command, mode: 0o755, hardLink: "usr/bin/actor"})
		}
	}
	return files, nil
}

// sharedLibraries returns the ELF interpreter and the libraries of a dynamic program, from this machine, with their
// folders. It returns nothing for a static program.
func sharedLibraries(binary string) ([]file, error) {
	interpreter, err := interpreterOf(binary)
	if err != nil || interpreter == "" {
		return nil, err
	}
	list, err := exec.Command(interpreter, "--list", binary).Output()
	if err != nil {
		return nil, fmt.Errorf("list the libraries: %w", err)
	}
	paths := []string{interpreter}
	for _, match := range regexp.MustCompile(`=> (/\S+)`).FindAllSubmatch(list, -1) {
		paths = append(paths, string(match[1]))
	}
	slices.Sort(paths)
	var folders []string
	var libraries []file
	for _, path := range slices.Compact(paths) {
		data, err := os.ReadFile(path)
		if err != nil {
			return nil, err
		}
		name := strings.TrimPrefix(path, "/")
		libraries = append(libraries, program(name, data))
		for parent := filepath.Dir(name); parent != "."; parent = filepath.Dir(parent) {
			folders = append(folders, parent)
		}
	}
	slices.Sort(folders) // a parent sorts before what it contains
	var files []file
	for _, path := range slices.Compact(folders) {
		files = append(files, folder(path))
	}
	return append(files, libraries...), nil
}

// interpreterOf returns the path of the dynamic loader that an ELF program names, or "".
func interpreterOf(binary string) (string, error) {
	f, err := elf.Open(binary)
	if err != nil {
		return "", err
	}
	defer func() { _ = f.Close() }() // was only read from
	for _, segment := range f.Progs {
		if segment.Type != elf.PT_INTERP {
			continue
		}
		path := make([]byte, min(segment.Filesz, 4096))
		if _, err := segment.ReadAt(path, 0); err != nil && !errors.Is(err, io.EOF) {
			return "", fmt.Errorf("read the ELF interpreter of %s: %w", binary, err)
		}
		return strings.TrimRight(string(path), "\x00"), nil
	}
	return "", nil
}
