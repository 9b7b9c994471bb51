package recording

import (
	"container/heap"
	"errors"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"
)

// relistAfter is how long knowledge of a directory is valid before it is listed again, to see what others have
// added or removed. Listing it for each recording would cost as much as there are recordings.
const relistAfter = time.Minute

// directory tracks the recordings in a directory. Its methods are safe for concurrent use.
type directory struct {
	path string
	log  *slog.Logger

	mu        sync.Mutex
	live      map[string]bool      // names of files being written
	liveBytes int64                // bytes written to them so far
	pods      map[string]*podFiles // finished recordings
	known     map[string]*finishedFile
	bytes     int64 // size of finished recordings
	listed    time.Time

	cleaning bool // one clean-up at a time
	again    bool // another one is to follow
	settings Config
}

// finishedFile is a recording that is complete.
type finishedFile struct {
	name     string
	size     int64
	modified time.Time
}

// podFiles are one pod's finished recordings. Above the limits, the pod that has most loses one, so that a pod
// with a thousand short sessions does not displace the recordings of others.
type podFiles struct {
	finished byName // oldest first
	bytes    int64
}

// podOf returns the pod that a recording's name tells, or "" if it tells none.
func podOf(name string) string {
	parts := strings.Split(name, "_") // plain keeps it out of the parts
	if len(parts) < 4 {
		return ""
	}
	return parts[1] + "_" + parts[2]
}

// byName is a heap. Names begin with the time at which the session began.
type byName []*finishedFile

func (h byName) Len() int           { return len(h) }
func (h byName) Less(i, j int) bool { return h[i].name < h[j].name }
func (h byName) Swap(i, j int)      { h[i], h[j] = h[j], h[i] }
func (h *byName) Push(x any)        { *h = append(*h, x.(*finishedFile)) }
func (h *byName) Pop() any {
	last := (*h)[len(*h)-1]
	(*h)[len(*h)-1] = nil
	*h = (*h)[:len(*h)-1]
	return last
}

func newDirectory(path string, log *slog.Logger) *directory {
	return &directory{path: path, log: log, live: make(map[string]bool), pods: make(map[string]*podFiles), known: make(map[string]*finishedFile)}
}

// begin marks a file as being written, which keeps it from being removed.
func (d *directory) begin(name string) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.live[name] = true
}

// grew adjusts the size of the files being written.
func (d *directory) grew(bytes int64) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.liveBytes += bytes
}

// end marks a file as complete.
func (d *directory) end(name string, size int64) {
	d.mu.Lock()
	defer d.mu.Unlock()
	delete(d.live, name)
	d.liveBytes -= size
	if d.known[name] == nil {
		d.addLocked(&finishedFile{name, size, time.Now()})
	}
}

// abandon unmarks a file that does not exist after all.
func (d *directory) abandon(name string, size int64) {
	d.mu.Lock()
	defer d.mu.Unlock()
	delete(d.live, name)
	d.liveBytes -= size
}

func (d *directory) addLocked(file *finishedFile) {
	d.known[file.name] = file
	d.bytes += file.size
	d.pushLocked(file)
}

func (d *directory) pushLocked(file *finishedFile) {
	pod := d.pods[podOf(file.name)]
	if pod == nil {
		pod = &podFiles{}
		d.pods[podOf(file.name)] = pod
	}
	heap.Push(&pod.finished, file)
	pod.bytes += file.size
}

// popLocked removes and returns a pod's oldest recording.
func (d *directory) popLocked(name string) *finishedFile {
	pod := d.pods[name]
	file := heap.Pop(&pod.finished).(*finishedFile)
	pod.bytes -= file.size
	if len(pod.finished) == 0 {
		delete(d.pods, name)
	}
	return file
}

func (d *directory) forgetLocked(file *finishedFile) {
	if d.known[file.name] == file {
		delete(d.known, file.name)
		d.bytes -= file.size
	}
}

// retain removes the oldest recordings until the rest is within the limits. It keeps those being written, and
// everything that is not a recording. If another call is already at work, retain returns at once and that call
// looks once more.
func (d *directory) retain(config Config) {
	if config.MaxFiles == 0 && config.MaxTotal == 0 {
		return
	}
	if !d.beginCleaning(config) {
		return
	}
	done := false
	defer func() {
		if !done { // a panic: the next call is to clean up
			d.mu.Lock()
			defer d.mu.Unlock()
			d.cleaning = false
		}
	}()
	for !done {
		d.clean(config)
		config, done = d.cleaned()
	}
}

// beginCleaning reports whether the caller is to clean up. If another call is at work, it is made to look once more.
func (d *directory) beginCleaning(config Config) bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.settings = config
	if d.cleaning {
		d.again = true
		return false
	}
	d.cleaning = true
	return true
}

// cleaned reports whether a clean-up was the last one, and otherwise the settings of the next one.
func (d *directory) cleaned() (next Config, done bool) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.cleaning = d.again
	d.again = false
	return d.settings, !d.cleaning
}

// clean does one clean-up. It lists and removes files without the lock, which recordings would wait for.
func (d *directory) clean(config Config) {
	if time.Since(d.listed) >= relistAfter {
		if err := d.list(); err != nil {
			d.log.Warn("old recordings cannot be removed", "directory", d.path, "error", err)
			return
		}
	}
	var stuck []*finishedFile
	for {
		file := d.next(config)
		if file == nil {
			break
		}
		err := os.Remove(filepath.Join(d.path, file.name))
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			d.log.Warn("an old recording cannot be removed", "file", filepath.Join(d.path, file.name), "error", err)
			stuck = append(stuck, file)
			continue
		}
		d.mu.Lock()
		d.forgetLocked(file)
		d.mu.Unlock()
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	for _, file := range stuck {
		d.pushLocked(file)
	}
}

// next returns the file to remove next if there are too many: the oldest one of the pod that has most of what
// exceeds its limit, if it is old enough.
func (d *directory) next(config Config) *finishedFile {
	d.mu.Lock()
	defer d.mu.Unlock()
	tooMany := config.MaxFiles > 0 && len(d.live)+len(d.known) > config.MaxFiles
	tooMuch := config.MaxTotal > 0 && d.liveBytes+d.bytes > config.MaxTotal
	if !tooMany && !tooMuch {
		return nil
	}
	most, found := "", false
	for name, pod := range d.pods {
		if time.Since(pod.finished[0].modified) < config.MinAge {
			continue
		}
		if !found || d.pods[most].lessThan(pod, tooMuch) {
			most, found = name, true
		}
	}
	if !found {
		return nil
	}
	return d.popLocked(most)
}

// lessThan compares what two pods have, and its age if they have the same.
func (p *podFiles) lessThan(other *podFiles, inBytes bool) bool {
	mine, others := int64(len(p.finished)), int64(len(other.finished))
	if inBytes {
		mine, others = p.bytes, other.bytes
	}
	if mine != others {
		return mine < others
	}
	return p.finished[0].name > other.finished[0].name
}

// full reports whether there is neither room for another recording nor anything that may be removed for it.
func (d *directory) full(config Config) bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	return config.MaxFiles > 0 && len(d.live)+len(d.known) > config.MaxFiles ||
		config.MaxTotal > 0 && d.liveBytes+d.bytes > config.MaxTotal
}

// list updates the record from the directory. A file that ends meanwhile may be listed or not; what end says about
// it takes precedence.
func (d *directory) list() error {
	start := time.Now()
	entries, err := os.ReadDir(d.path)
	if err != nil {
		return err
	}
	var found []*finishedFile
	for _, entry := range entries {
		if !strings.HasSuffix(entry.Name(), Suffix) {
			continue
		}
		if info, err := entry.Info(); err == nil && info.Mode().IsRegular() {
			found = append(found, &finishedFile{entry.Name(), info.Size(), info.ModTime()})
		}
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	before := d.known
	d.known, d.pods, d.bytes = make(map[string]*finishedFile, len(found)), make(map[string]*podFiles), 0
	for _, file := range before {
		if !file.modified.Before(start) {
			d.addLocked(file)
		}
	}
	for _, file := range found {
		if !d.live[file.name] && d.known[file.name] == nil {
			d.addLocked(file)
		}
	}
	d.listed = start
	return nil
}
