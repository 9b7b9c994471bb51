package helper

import (
	"archive/tar"
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/user"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

type unixStat = syscall.Stat_t

// extract unpacks an archive into the working folder, or t.folder. A member that cannot be made is reported, and the
// rest is made. As root the owners and modes are the archive's, otherwise they are the user's and the umask's, as
// with tar; times are not restored (-m).
func extract(t task, from io.Reader, r *report) error {
	if t.folder != "" {
		if err := os.Chdir(t.folder); err != nil {
			return plain(t.folder, err)
		}
	}
	x := &extractor{report: r, umask: fs.FileMode(unix.Umask(0)), owners: !t.ownRights && os.Geteuid() == 0, links: map[string]*tar.Header{}}
	if x.owners {
		x.keep = ^fs.FileMode(0)
	} else {
		x.keep = ^x.umask
	}
	archive := tar.NewReader(from)
	for {
		header, err := archive.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			x.finish()
			return fmt.Errorf("the archive cannot be read: %w", err)
		}
		if header.Typeflag == tar.TypeXGlobalHeader {
			continue
		}
		x.member(header, archive)
	}
	x.finish()
	_, err := io.Copy(io.Discard, from) // what follows the archive's end
	return err
}

type extractor struct {
	report *report
	umask  fs.FileMode
	keep   fs.FileMode // the mode bits that are taken from the archive
	owners bool
	// links are symbolic links, made last: no member may be written through a link that came with the archive.
	links  map[string]*tar.Header
	folder []*tar.Header // made with all rights for the owner, until all is in them

	users, groups map[string]int
}

func (x *extractor) member(header *tar.Header, content io.Reader) {
	name, err := inside(header.Name)
	if err == nil {
		delete(x.links, name) // the last member of a name counts
		err = x.make(name, header, content)
	}
	x.report.note(plain(header.Name, err))
}

// inside is the name of a member below the working folder.
func inside(name string) (string, error) {
	if slices.Contains(strings.Split(name, "/"), "..") {
		return "", errors.New("member name contains '..', skipping it")
	}
	return filepath.Clean("./" + name), nil
}

func (x *extractor) make(name string, header *tar.Header, content io.Reader) error {
	if err := os.MkdirAll(filepath.Dir(name), 0o777&^x.umask); err != nil {
		return err
	}
	switch header.Typeflag {
	case tar.TypeReg:
		return x.file(name, header, content)
	case tar.TypeDir:
		header.Name = name
		x.folder = append(x.folder, header)
		return x.makeFolder(name)
	case tar.TypeSymlink:
		x.links[name] = header
		return nil
	case tar.TypeLink:
		target, err := inside(header.Linkname)
		if err != nil {
			return err
		}
		if pending, ok := x.links[target]; ok { // another name of a symbolic link
			x.links[name] = pending
			return nil
		}
		if target == name {
			return nil
		}
		return instead(name, func() error { return os.Link(target, name) })
	case tar.TypeFifo, tar.TypeChar, tar.TypeBlock:
		kind := map[byte]uint32{tar.TypeFifo: unix.S_IFIFO, tar.TypeChar: unix.S_IFCHR, tar.TypeBlock: unix.S_IFBLK}[header.Typeflag]
		device := unix.Mkdev(uint32(header.Devmajor), uint32(header.Devminor)) //nolint:gosec // the kernel refuses what is none
		mode := uint32((header.FileInfo().Mode().Perm()) & x.keep)
		err := instead(name, func() error { return unix.Mknod(name, kind|mode, int(device)) }) //nolint:gosec // as above
		if err == nil && x.owners {
			err = os.Lchown(name, x.user(header), x.group(header))
		}
		return err
	}
	return fmt.Errorf("members of type %q are not known, skipping it", header.Typeflag)
}

// instead makes something in place of what has the name.
func instead(name string, what func() error) error {
	err := what()
	if errors.Is(err, fs.ErrExist) {
		if err := os.Remove(name); err != nil {
			return err
		}
		err = what()
	}
	return err
}

func (x *extractor) makeFolder(name string) error {
	if info, err := os.Stat(name); err == nil && info.IsDir() {
		return nil
	}
	return instead(name, func() error { return os.Mkdir(name, 0o700) })
}

// file makes a new file, so that whoever has the old one open or linked keeps it.
func (x *extractor) file(name string, header *tar.Header, content io.Reader) (err error) {
	var file *os.File
	err = instead(name, func() (err error) {
		file, err = os.OpenFile(name, os.O_WRONLY|os.O_CREATE|os.O_EXCL|unix.O_NOFOLLOW, 0o600)
		return err
	})
	if err != nil {
		return err
	}
	defer func() {
		if closeErr := file.Close(); err == nil {
			err = closeErr
		}
	}()
	if err := writeSparse(file, content, header.Size); err != nil {
		return err
	}
	return x.rights(file, header)
}

// writeSparse leaves blocks of zeros out, which may be what was a hole before.
func writeSparse(file *os.File, content io.Reader, size int64) error {
	block, none := make([]byte, 64<<10), make([]byte, 64<<10)
	for left := size; left > 0; {
		part := block[:min(left, int64(len(block)))]
		if _, err := io.ReadFull(content, part); err != nil {
			return fmt.Errorf("the archive ends too early: %w", err)
		}
		left -= int64(len(part))
		var err error
		if bytes.Equal(part, none[:len(part)]) {
			_, err = file.Seek(int64(len(part)), io.SeekCurrent)
		} else {
			_, err = file.Write(part)
		}
		if err != nil {
			return err
		}
	}
	return file.Truncate(size) // where it ends with a hole
}

// finish makes the symbolic links and gives the folders their rights, the innermost first.
func (x *extractor) finish() {
	for name, header := range x.links {
		err := instead(name, func() error { return os.Symlink(header.Linkname, name) })
		if err == nil && x.owners {
			err = os.Lchown(name, x.user(header), x.group(header))
		}
		x.report.note(plain(name, err))
	}
	for _, header := range slices.Backward(x.folder) {
		x.report.note(plain(header.Name, x.folderRights(header)))
	}
}

// folderRights does not follow a link that stood for a folder before, or that somebody has put in its place.
func (x *extractor) folderRights(header *tar.Header) error {
	folder, err := os.OpenFile(header.Name, os.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW, 0)
	if errors.Is(err, unix.ENOTDIR) || errors.Is(err, unix.ELOOP) {
		return nil
	}
	if err != nil {
		return err
	}
	defer folder.Close() //nolint:errcheck // nothing was written
	return x.rights(folder, header)
}

// rights gives what was made its owner, mode and extended attributes, in this order: a new owner takes
// setuid bits and capabilities away. It needs no name, which may lead somewhere else by now.
func (x *extractor) rights(file *os.File, header *tar.Header) error {
	if x.owners {
		if err := file.Chown(x.user(header), x.group(header)); err != nil {
			return fmt.Errorf("cannot change the owner: %w", plainCause(err))
		}
	}
	mode := header.FileInfo().Mode()
	bits := mode.Perm() & x.keep
	if x.owners {
		bits |= mode & (fs.ModeSetuid | fs.ModeSetgid | fs.ModeSticky)
	}
	if err := file.Chmod(bits); err != nil {
		return fmt.Errorf("cannot change the mode: %w", plainCause(err))
	}
	for record, value := range header.PAXRecords {
		attribute, ok := strings.CutPrefix(record, xattrRecord)
		if !ok || !keptAttribute(attribute) {
			continue
		}
		if err := unix.Fsetxattr(int(file.Fd()), attribute, []byte(value), 0); err != nil {
			fmt.Fprintf(x.report.to, "tar: %v\n", about(header.Name, fmt.Errorf("the attribute %s is lost: %w", attribute, err)))
		}
	}
	return nil
}

func plainCause(err error) error {
	var path *fs.PathError
	if errors.As(err, &path) {
		return path.Err
	}
	return err
}

// user is the owner by name where the container knows the name, otherwise by number, as tar has it.
func (x *extractor) user(header *tar.Header) int {
	return lookUp(&x.users, header.Uname, header.Uid, func(name string) (string, error) {
		found, err := user.Lookup(name)
		if err != nil {
			return "", err
		}
		return found.Uid, nil
	})
}

func (x *extractor) group(header *tar.Header) int {
	return lookUp(&x.groups, header.Gname, header.Gid, func(name string) (string, error) {
		found, err := user.LookupGroup(name)
		if err != nil {
			return "", err
		}
		return found.Gid, nil
	})
}

// maxNames is how many names of owners are remembered.
const maxNames = 1024

func lookUp(known *map[string]int, name string, number int, find func(string) (string, error)) int {
	if name == "" {
		return number
	}
	id, ok := (*known)[name]
	if !ok {
		id = -1
		if text, err := find(name); err == nil {
			if n, err := strconv.Atoi(text); err == nil {
				id = n
			}
		}
		if *known == nil || len(*known) >= maxNames {
			*known = map[string]int{}
		}
		(*known)[name] = id
	}
	if id < 0 {
		return number
	}
	return id
}
