package helper

import (
	"archive/tar"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
)

const xattrRecord = "SCHILY.xattr." // as GNU tar and libarchive write them

// create writes an archive of what lies at path. A file that cannot be read is reported and left out.
func create(path string, to io.Writer, r *report) error {
	a := &archiver{out: tar.NewWriter(to), report: r, linked: map[inode]string{}}
	path = filepath.Clean(path)
	top := memberName(path)
	err := filepath.WalkDir(path, func(at string, entry fs.DirEntry, err error) error {
		if err != nil {
			r.note(plain(at, err))
			return nil // with what can be read
		}
		name := top
		if below, err := filepath.Rel(path, at); err == nil && below != "." {
			name += "/" + below
		}
		return a.add(at, name, entry)
	})
	if err != nil {
		return err // the archive itself cannot be written
	}
	return a.out.Close()
}

// memberName is the path without what would lead out of the folder that it is unpacked in, as tar cuts it.
func memberName(path string) string {
	if at := strings.LastIndex("/"+path+"/", "/../"); at >= 0 {
		path = path[min(at+len("../"), len(path)):]
	}
	path = strings.TrimLeft(path, "/")
	if path == "" {
		return "."
	}
	return path
}

type inode struct{ dev, ino uint64 }

type archiver struct {
	out    *tar.Writer
	report *report
	linked map[inode]string // the names of files with more than one
}

// add returns only errors of the archive.
func (a *archiver) add(at, name string, entry fs.DirEntry) error {
	info, err := entry.Info()
	if err != nil {
		a.report.note(plain(at, err))
		return nil
	}
	if info.Mode()&fs.ModeSocket != 0 {
		fmt.Fprintf(a.report.to, "tar: %v\n", about(at, errors.New("socket ignored")))
		return nil
	}
	target := ""
	if info.Mode()&fs.ModeSymlink != 0 {
		if target, err = os.Readlink(at); err != nil {
			a.report.note(plain(at, err))
			return nil
		}
	}
	header, err := tar.FileInfoHeader(info, target)
	if err != nil {
		a.report.note(about(at, err))
		return nil
	}
	header.Name = name
	if info.IsDir() {
		header.Name += "/"
	}
	if stat, ok := info.Sys().(*unixStat); ok && stat.Nlink > 1 && !info.IsDir() {
		id := inode{uint64(stat.Dev), stat.Ino} //nolint:unconvert // int32 on other machines
		if first, ok := a.linked[id]; ok {
			header.Typeflag, header.Linkname, header.Size = tar.TypeLink, first, 0
			return a.out.WriteHeader(header)
		}
		a.linked[id] = name
	}
	if !info.Mode().IsRegular() {
		header.PAXRecords = attributes(at)
		return a.out.WriteHeader(header)
	}
	return a.addFile(at, header, info)
}

// addFile writes as many bytes as the header says, whatever becomes of the file meanwhile.
func (a *archiver) addFile(at string, header *tar.Header, info fs.FileInfo) error {
	// Another file may have taken the name: a FIFO must not be waited for, a link not be followed.
	file, err := os.OpenFile(at, os.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
	if err != nil {
		a.report.note(plain(at, err))
		return nil
	}
	defer file.Close() //nolint:errcheck // only read
	if opened, err := file.Stat(); err != nil || !os.SameFile(opened, info) {
		a.report.note(about(at, errors.New("file changed before we read it")))
		return nil
	}
	header.PAXRecords = attributes(at)
	if err := a.out.WriteHeader(header); err != nil {
		return err
	}
	n, err := io.Copy(a.out, io.LimitReader(file, header.Size))
	if n < header.Size {
		if err == nil {
			err = errors.New("file shrank, padding with zeros")
		}
		a.report.note(plain(at, err))
		_, err = io.CopyN(a.out, zeros{}, header.Size-n)
	}
	return err
}

type zeros struct{}

func (zeros) Read(p []byte) (int, error) {
	clear(p)
	return len(p), nil
}

// maxAttributes bounds the extended attributes of one file, in bytes; the kernel's own bound for their names.
const maxAttributes = 64 << 10

// attributes are the extended attributes that a copy should have: the user's, and capabilities.
func attributes(path string) map[string]string {
	names := make([]byte, maxAttributes)
	n, err := unix.Llistxattr(path, names)
	if err != nil {
		return nil // a file system without them
	}
	var records map[string]string
	value := make([]byte, maxAttributes)
	for name := range strings.SplitSeq(strings.TrimRight(string(names[:n]), "\x00"), "\x00") {
		if !keptAttribute(name) {
			continue
		}
		if size, err := unix.Lgetxattr(path, name, value); err == nil {
			if records == nil {
				records = map[string]string{}
			}
			records[xattrRecord+name] = string(value[:size])
		}
	}
	return records
}

func keptAttribute(name string) bool {
	return strings.HasPrefix(name, "user.") && !strings.Contains(name, "=") || name == "security.capability"
}

// plain is an error about a file without the path twice.
func plain(name string, err error) error {
	var path *fs.PathError
	if errors.As(err, &path) {
		err = path.Err
	}
	var link *os.LinkError
	if errors.As(err, &link) {
		err = link.Err
	}
	return about(name, err)
}
