// Package config is streamshim's configuration: its defaults, the TOML file, and the checks that
// turn a mistake into a message with the line and a hint.
package config

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/pelletier/go-toml/v2"

	"github.com/streamshim/streamshim/pkg/endpoint"
)

// DefaultFile is read when no file is named and it exists.
const DefaultFile = "/etc/streamshim/config.toml"

// Config is everything that can be set. The toml names are the file's keys.
type Config struct {
	// Listen is the Unix socket on which CRI is served.
	Listen string `toml:"listen"`
	// Upstream is the runtime's CRI socket; empty means that the usual places are tried.
	Upstream string `toml:"upstream"`
	// StreamAddress is where the streaming server listens, a loopback address; port 0 takes any
	// free one.
	StreamAddress string `toml:"stream_address"`
	// StateDir holds what is needed while processes run: process files, console sockets, records.
	StateDir string `toml:"state_dir"`
	// LogLevel is debug, info, warn or error.
	LogLevel string `toml:"log_level"`
	// LogFormat is text or json.
	LogFormat string `toml:"log_format"`
	// Admin is the Unix socket of "streamshim sessions", which only root may open; empty is none.
	Admin string `toml:"admin"`
	// NotifyWatch tells the user of a terminal when an operator watches it with "streamshim sessions
	// watch".
	NotifyWatch bool `toml:"notify_watch"`
	// MetricsAddress is HOST:PORT, where /metrics, /healthz and /readyz are served; empty is none.
	// There is no password: whoever can reach it can read the numbers.
	MetricsAddress string `toml:"metrics_address"`
	// Profiling also serves /debug/pprof/ there, which must then be a loopback address.
	Profiling bool `toml:"profiling"`

	Runtime     Runtime     `toml:"runtime"`
	Exec        Exec        `toml:"exec"`
	Attach      Attach      `toml:"attach"`
	PortForward PortForward `toml:"portforward"`
	Shutdown    Shutdown    `toml:"shutdown"`
	Audit       Audit       `toml:"audit"`
	Recording   Recording   `toml:"recording"`
	Limits      Limits      `toml:"limits"`
	Traces      Traces      `toml:"traces"`
	// Deny refuses the sessions that any of these rules chooses.
	Deny []Deny `toml:"deny"`

	removed []string // see Removed
}

// Runtime overrides what the upstream says about its OCI runtime.
type Runtime struct {
	Binary string `toml:"binary"` // path of runc or a compatible runtime
	Root   string `toml:"root"`   // its state root, the value of --root
}

// Exec is how commands run in containers.
type Exec struct {
	OnDisconnect string   `toml:"on_disconnect"` // what becomes of a command whose client has gone: hangup, kill or keep
	TermAfter    Duration `toml:"term_after"`    // from the hang-up to SIGTERM
	KillAfter    Duration `toml:"kill_after"`    // from the hang-up to SIGKILL
	InputGrace   Duration `toml:"input_grace"`   // for a command whose client has closed its connection in order: without taking any of the input that came before, and, once it has it all, until the hang-up; 0 is hang up at once
	StartTimeout Duration `toml:"start_timeout"` // for the OCI runtime to start the command, once it is its turn
	DrainIdle    Duration `toml:"drain_idle"`    // silence after which output held by a background child is complete; 0 is for ever, for ExecSync 10 s
	DrainMax     Duration `toml:"drain_max"`     // the same wait while output still flows; for ExecSync at most 10 s
	Linger       Duration `toml:"linger"`        // without progress, for a client to take the rest
	StatusWait   Duration `toml:"status_wait"`   // since the last sign that output was read, for which the exit status is held back from who may translate for a slow reader; 0 is off
	IdleTimeout  Duration `toml:"idle_timeout"`  // without payload in either direction, until a session is ended; 0 is off
	MaxLifetime  Duration `toml:"max_lifetime"`  // of a session; 0 is off
	Helpers      []string `toml:"helpers"`       // what streamshim brings along for containers that do not have it: "tar", for the commands of kubectl cp; see docs/engines.md
}

// Attach is how attach sessions behave.
type Attach struct {
	InputEnd    string   `toml:"input_end"`    // what a client whose input has ended does, unless that is the end of the container's too: detach, once the container has been silent for a second, at most ten later, or stay
	IdleTimeout Duration `toml:"idle_timeout"` // without payload in either direction, until a session is ended; 0 is off
	MaxLifetime Duration `toml:"max_lifetime"` // of a session; 0 is off
}

// PortForward is how port-forward sessions behave.
type PortForward struct {
	Refused     string   `toml:"refused"`      // what the client of a port where nobody listens gets: reset, or report, which makes kubectl end the whole port-forward
	Stall       Duration `toml:"stall"`        // for one connection to hold up the others; 0 is for ever
	IdleTimeout Duration `toml:"idle_timeout"` // without payload in either direction, until a session is ended; 0 is off
	MaxLifetime Duration `toml:"max_lifetime"` // of a session; 0 is off
}

// Shutdown is how a running streamshim ends.
type Shutdown struct {
	Drain Duration `toml:"drain"` // how long sessions may go on after SIGTERM
}

// Audit is the log of who did what: a JSON line at the start and at the end of each session.
type Audit struct {
	Destination string `toml:"destination"` // off, file, stdout or journald
	File        string `toml:"file"`        // for destination = "file"; made with mode 0600
	MaxSize     int64  `toml:"max_size"`    // bytes after which the file is rotated; 0 is never
	MaxFiles    int    `toml:"max_files"`   // rotated files that are kept, as FILE.1 (the newest), FILE.2, ...
	// Command is how much of command lines is written and shown to operators: none, argv0 or full.
	// Arguments often hold secrets.
	Command  string `toml:"command"`
	ExecSync bool   `toml:"execsync"` // also ExecSync calls, which are mostly probes
	Fsync    string `toml:"fsync"`    // when a file's records are forced to the disk: never, interval (every second) or always
	// OnFailure says what happens to a session whose start cannot be written down, as on a full disk:
	// allow it all the same, or deny it.
	OnFailure string `toml:"on_failure"`
}

// Recording is which sessions are recorded, as asciicast v2 files.
type Recording struct {
	Directory string `toml:"directory"` // made with mode 0700; the files have 0600
	Input     bool   `toml:"input"`     // also what is typed, passwords included
	NonTTY    bool   `toml:"non_tty"`   // also sessions without a terminal
	MaxSize   int64  `toml:"max_size"`  // bytes of one recording
	MaxFiles  int    `toml:"max_files"` // recordings that are kept, the oldest of the pod that has most is removed first; 0 is no limit
	MaxTotal  int64  `toml:"max_total"` // bytes of all recordings together that are kept; 0 is no limit
	// MinAge is how long a recording is kept whatever the limits; while everything is younger and the limits are
	// reached, new sessions are treated as on_failure says. 0 is no such time.
	MinAge Duration `toml:"min_age"`
	// OnFailure says what happens when a session cannot be recorded completely, because of a full
	// disk, its size, or a disk that is too slow: allow it to go on with a gap in the recording, or
	// deny it. With deny everything is written before it is delivered.
	OnFailure string `toml:"on_failure"`
	// Rule chooses the sessions that are recorded: those that any of these rules chooses. Without
	// rules nothing is recorded.
	Rule []Rule `toml:"rule"`
}

// Rule chooses sessions by their pod. What is left out chooses all.
type Rule struct {
	Namespaces []string          `toml:"namespaces"` // any of these; * and ? stand for anything
	PodLabels  map[string]string `toml:"pod_labels"` // all of these; the values may have * and ?
}

// Traces is where OpenTelemetry spans of exec, attach and port-forward go.
type Traces struct {
	Endpoint    string  `toml:"endpoint"`     // HOST:PORT of an OTLP/gRPC receiver; empty is no tracing
	Insecure    bool    `toml:"insecure"`     // without TLS
	SampleRatio float64 `toml:"sample_ratio"` // of the calls whose client sends no trace context; the others do as the client does
}

// Limits bound what sessions may use. 0 is no limit.
type Limits struct {
	Sessions             int   `toml:"sessions"`               // on this node
	SessionsPerPod       int   `toml:"sessions_per_pod"`       // in one pod
	SessionsPerContainer int   `toml:"sessions_per_container"` // in one container
	ConcurrentStarts     int   `toml:"concurrent_starts"`      // commands of sessions that start at the same time, of one pod a quarter of it; they have what ExecSync leaves of it, but at least one; attach and what the runtime itself starts do not count
	ConcurrentProbes     int   `toml:"concurrent_probes"`      // commands of ExecSync that start at the same time, of one pod a quarter of it; -1 is 32 for each CPU, at least 64
	Bandwidth            int64 `toml:"bandwidth"`              // bytes a second of one session, in each direction
	Buffers              int64 `toml:"buffers"`                // bytes of unread data of all sessions together; beyond them clients are slowed down, and attached clients miss output; -1 is a sixteenth of the memory, of the machine or of streamshim's cgroup, 64 MiB to 1 GiB
	SyncOutput           int64 `toml:"sync_output"`            // bytes of output that all ExecSync calls together keep, beside 64 KiB of each; a call for which there is no room is ended with an error; -1 is a 32nd of the memory, 64 MiB to 512 MiB
	RecordingBuffers     int64 `toml:"recording_buffers"`      // bytes of all recordings together that wait to be written, beside 16 KiB of each; what has no room is missing in its recording, or ends its session where recording.on_failure is deny; -1 is a 32nd of the memory, 64 MiB to 512 MiB
	SpareDescriptors     int   `toml:"spare_descriptors"`      // open files that are kept for probes and running sessions: new sessions and forwarded connections are refused when no more are left; -1 is an eighth of those that streamshim may open
	ConcurrentEnds       int   `toml:"concurrent_ends"`        // commands that are ended whose processes are looked for at the same time, those of ExecSync first; -1 is 100 for each CPU
}

// Deny is a rule that refuses sessions. What is left out chooses all, except that execsync must be
// named in kinds.
type Deny struct {
	Namespaces []string          `toml:"namespaces"` // as in recording.rule
	PodLabels  map[string]string `toml:"pod_labels"` // as in recording.rule
	Kinds      []string          `toml:"kinds"`      // any of exec, attach, portforward and execsync
	TTY        *bool             `toml:"tty"`        // only sessions with, or only sessions without a terminal
	Message    string            `toml:"message"`    // for the user; a plain one when empty
}

// Duration is a time.Duration written as "1m30s".
type Duration time.Duration

// UnmarshalText reads a duration as time.ParseDuration does.
func (d *Duration) UnmarshalText(text []byte) error {
	parsed, err := time.ParseDuration(string(text))
	if err != nil {
		return fmt.Errorf("%q is not a duration such as \"30s\" or \"1h30m\"", text)
	}
	if parsed < 0 {
		return fmt.Errorf("%q is negative", text)
	}
	*d = Duration(parsed)
	return nil
}

// MarshalText writes the duration as UnmarshalText reads it.
func (d Duration) MarshalText() ([]byte, error) { return []byte(time.Duration(d).String()), nil }

// Default is the configuration of an empty file.
func Default() Config {
	return Config{
		Listen:        "unix:///run/streamshim/streamshim.sock",
		StreamAddress: "127.0.0.1:0",
		StateDir:      "/run/streamshim",
		LogLevel:      "info",
		LogFormat:     "text",
		Admin:         "unix:///run/streamshim/admin.sock",
		Exec: Exec{
			OnDisconnect: "hangup",
			TermAfter:    Duration(5 * time.Second),
			KillAfter:    Duration(10 * time.Second),
			InputGrace:   Duration(30 * time.Second),
			StartTimeout: Duration(30 * time.Second),
			DrainIdle:    Duration(2 * time.Second),
			DrainMax:     Duration(10 * time.Minute),
			Linger:       Duration(10 * time.Minute),
			StatusWait:   Duration(time.Minute),
			IdleTimeout:  Duration(4 * time.Hour),
			Helpers:      []string{},
		},
		Attach:      Attach{InputEnd: "detach", IdleTimeout: Duration(4 * time.Hour)},
		PortForward: PortForward{Refused: "reset", Stall: Duration(30 * time.Second), IdleTimeout: Duration(4 * time.Hour)},
		Shutdown:    Shutdown{Drain: Duration(10 * time.Second)},
		Audit: Audit{
			Destination: "off", File: "/var/log/streamshim/audit.log", MaxSize: 100 << 20, MaxFiles: 10,
			Command: "argv0", Fsync: "interval", OnFailure: "allow",
		},
		Recording: Recording{
			Directory: "/var/log/streamshim/recordings", MaxSize: 100 << 20, MaxFiles: 1000, MaxTotal: 1 << 30,
			OnFailure: "allow",
		},
		Limits: Limits{
			Sessions: 4096, SessionsPerPod: 1024, ConcurrentStarts: 32, ConcurrentProbes: -1,
			Buffers: -1, SyncOutput: -1, RecordingBuffers: -1, SpareDescriptors: -1, ConcurrentEnds: -1,
		},
		Traces: Traces{SampleRatio: 1},
	}
}

// What nobody needs to set.
const (
	// SyncOutput is how many bytes of output an ExecSync returns, so that its answer stays below the 16 MiB
	// that the kubelet's client takes (CVE-2022-1708).
	SyncOutput = 15 << 20
	// AttachBuffer is how many bytes are kept for an attached client that reads too slowly. Limits.Buffers
	// bounds all of them together.
	AttachBuffer = 1 << 20
	// RecordingBuffer is how many bytes of one session may wait to be written to its recording.
	RecordingBuffer = 1 << 20
	// WaitingStarts is how many commands may wait for their turn to start, of one pod a quarter of it.
	WaitingStarts = 1024
)

// removed are keys that were removed, and what holds instead. A file that still has one is read all the same,
// so that an update does not stop a node; Removed tells of it.
var removed = map[string]string{
	"exec.engine": "commands are started by the container's OCI runtime alone, because a container could escape " +
		"through the native engine (docs/engines.md)",
	"exec.sync_output":      "an ExecSync returns up to 15 MiB of output, as the kubelet's client takes no more",
	"attach.buffer":         "1 MiB is kept for each attached client; limits.buffers bounds all of them together",
	"recording.buffer":      "1 MiB of each session may wait to be written",
	"limits.waiting_starts": "1024 commands may wait for their turn to start, of one pod 256",
}

// Removed tells of each key in the file that was removed, as "key was removed: what holds instead", sorted.
func (c *Config) Removed() []string { return c.removed }

// Read puts the file's settings into c. Unknown keys and values of the wrong type are refused, with
// their line.
//
// What has precedence over the file, such as flags, is set by override, which may be nil. It is called before
// the values are checked, so that it can mend what the file has wrong.
func (c *Config) Read(file string, override func(*Config)) error {
	text, err := readLimited(file)
	if err != nil {
		return fmt.Errorf("read the configuration: %w", err)
	}
	if err := c.decode(text); err != nil {
		return fmt.Errorf("%s:%w", file, err)
	}
	inFile := c.validate()
	if override != nil {
		override(c)
	}
	problem := c.validate()
	if problem == nil {
		return nil
	}
	if inFile != nil && *problem == *inFile {
		return fmt.Errorf("%s:%d: %w", file, lineOf(text, problem.key), problem)
	}
	return problem
}

// parse is Read of a text; its errors begin with the line.
func (c *Config) parse(text []byte) error {
	if err := c.decode(text); err != nil {
		return err
	}
	if problem := c.validate(); problem != nil {
		return fmt.Errorf("%d: %w", lineOf(text, problem.key), problem)
	}
	return nil
}

// maxFile and readTime bound the configuration file, in bytes, and how long it may take to come, from a FIFO whose
// writer writes nothing.
const (
	maxFile  = 1 << 20
	readTime = 10 * time.Second
)

func readLimited(path string) ([]byte, error) {
	// Of a FIFO that nobody writes to, opening alone would wait for ever.
	file, err := os.OpenFile(path, os.O_RDONLY|syscall.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	defer file.Close()                             //nolint:errcheck // only read
	file.SetReadDeadline(time.Now().Add(readTime)) //nolint:errcheck // a file on a disk has none, and needs none
	text, err := io.ReadAll(io.LimitReader(file, maxFile+1))
	if err != nil {
		return nil, err
	}
	if len(text) > maxFile {
		return nil, fmt.Errorf("%s is larger than %d bytes, which no configuration is", path, maxFile)
	}
	return text, nil
}

// decode returns errors that begin with the line, for "file:line: message".
func (c *Config) decode(text []byte) error {
	if problem := durationsWithoutUnit(text); problem != nil {
		return fmt.Errorf("%d: %w", lineOf(text, problem.key), problem)
	}
	decoder := toml.NewDecoder(bytes.NewReader(text)).DisallowUnknownFields()
	err := decoder.Decode(c)
	var unknown *toml.StrictMissingError
	if errors.As(err, &unknown) {
		for _, e := range unknown.Errors { // what is known was decoded
			key := strings.Join(e.Key(), ".")
			instead, was := removed[key]
			if !was {
				line, _ := e.Position()
				return fmt.Errorf("%d: unknown key %q%s", line, key, suggestion(key))
			}
			c.removed = append(c.removed, fmt.Sprintf("%s was removed: %s", key, instead))
		}
		slices.Sort(c.removed)
		return nil
	}
	var bad *toml.DecodeError
	if errors.As(err, &bad) {
		line, _ := bad.Position()
		key := ""
		if k := strings.Join(bad.Key(), "."); k != "" {
			key = k + ": "
		}
		return fmt.Errorf("%d: %s%s", line, key, plainWords(strings.TrimPrefix(bad.Error(), "toml: ")))
	}
	if err != nil {
		return fmt.Errorf("1: %w", err)
	}
	return nil
}

// durationsWithoutUnit finds a duration that is no string. The TOML library takes a plain number for
// nanoseconds: "idle_timeout = 30" would end every session at once.
func durationsWithoutUnit(text []byte) *ValueError {
	var written map[string]any
	if toml.Unmarshal(text, &written) != nil {
		return nil //nolint:nilerr // what is wrong is found again, with its line
	}
	var keys []string
	collectKeys("", Default(), &keys)
	defaults := tree(Default())
	for _, key := range keys {
		def, _ := lookUp(defaults, key).(string)
		if _, err := time.ParseDuration(def); err != nil {
			continue // the key is no duration
		}
		value := lookUp(written, key)
		if _, ok := value.(string); !ok && value != nil && value != int64(0) { // 0 needs no unit
			return &ValueError{key, fmt.Sprintf("%v is not a duration such as \"30s\" or \"1h30m\"", value)}
		}
	}
	return nil
}

// wrongType is what the TOML library says of a value of the wrong type.
var wrongType = regexp.MustCompile(`^cannot decode TOML (.+) into struct field \S+ of type (\S+)$`)

// plainWords says it without Go's types.
func plainWords(message string) string {
	match := wrongType.FindStringSubmatch(message)
	if match == nil {
		return message
	}
	want, ok := map[string]string{
		"string": "string", "bool": "true or false", "int": "integer", "int64": "integer", "float64": "number",
		"config.Duration": `duration such as "30s"`, "[]string": "list of strings", "map[string]string": "table of strings",
	}[match[2]]
	if !ok {
		want = "table"
	}
	return fmt.Sprintf("this is of type %s, expected: %s", match[1], want)
}

// ValueError is a setting whose value cannot be used.
type ValueError struct {
	key     string // as in the file, with dots
	problem string
}

func (e *ValueError) Error() string { return e.key + ": " + e.problem }

// Validate checks the values themselves.
func (c *Config) Validate() error {
	if problem := c.validate(); problem != nil {
		return problem
	}
	return nil
}

func (c *Config) validate() *ValueError {
	choice := func(key, value string, choices ...string) *ValueError {
		if slices.Contains(choices, value) {
			return nil
		}
		return &ValueError{key, fmt.Sprintf("%q is none of %s%s", value, strings.Join(choices, ", "), nearest(value, choices))}
	}
	socket := func(key, value string) *ValueError {
		if _, err := endpoint.Path(value); err != nil {
			return &ValueError{key, err.Error()}
		}
		return nil
	}
	checks := []*ValueError{
		socket("listen", c.Listen),
		choice("log_level", c.LogLevel, "debug", "info", "warn", "error"),
		choice("log_format", c.LogFormat, "text", "json"),
		choice("exec.on_disconnect", c.Exec.OnDisconnect, "hangup", "kill", "keep"),
		choice("attach.input_end", c.Attach.InputEnd, "detach", "stay"),
		choice("portforward.refused", c.PortForward.Refused, "reset", "report"),
		loopback("stream_address", c.StreamAddress),
	}
	if c.Admin != "" {
		checks = append(checks, socket("admin", c.Admin))
		if endpoint.Same(c.Admin, c.Listen) {
			checks = append(checks, &ValueError{"admin", "is the socket on which CRI is served; choose another path"})
		}
	}
	checks = append(checks, c.validateOperation(choice)...)
	checks = append(checks, c.validateTelemetry()...)
	if c.Upstream != "" {
		checks = append(checks, socket("upstream", c.Upstream))
		if endpoint.Same(c.Upstream, c.Listen) {
			checks = append(checks, &ValueError{"upstream", "is the socket that streamshim itself serves; name the runtime's"})
		}
	}
	if !strings.HasPrefix(c.StateDir, "/") {
		checks = append(checks, &ValueError{"state_dir", "must be an absolute path"})
	}
	for _, name := range c.Exec.Helpers {
		checks = append(checks, choice("exec.helpers", name, "tar"))
	}
	for _, wait := range []struct {
		key   string
		value Duration
		hint  string
	}{
		{"exec.term_after", c.Exec.TermAfter, `; on_disconnect = "kill" kills at once`},
		{"exec.kill_after", c.Exec.KillAfter, `; on_disconnect = "kill" kills at once`},
		{"exec.start_timeout", c.Exec.StartTimeout, ""},
		{"exec.drain_max", c.Exec.DrainMax, ""},
		{"exec.linger", c.Exec.Linger, ""},
	} {
		if wait.value == 0 {
			checks = append(checks, &ValueError{wait.key, "must be more than 0" + wait.hint})
		}
	}
	if c.Exec.KillAfter < c.Exec.TermAfter {
		checks = append(checks, &ValueError{"exec.kill_after", fmt.Sprintf("%v is before exec.term_after (%v); both count from the hang-up",
			time.Duration(c.Exec.KillAfter), time.Duration(c.Exec.TermAfter))})
	}
	for _, problem := range checks {
		if problem != nil {
			return problem
		}
	}
	return nil
}

// loopback refuses addresses that other machines could reach: the token in the URL is the only
// credential (containerd#2483, cri-dockerd#106).
func loopback(key, address string) *ValueError {
	host, port, err := net.SplitHostPort(address)
	if err != nil {
		return &ValueError{key, fmt.Sprintf("%q is not HOST:PORT, as in 127.0.0.1:0", address)}
	}
	if problem := portNumber(key, port, 0); problem != nil {
		return problem
	}
	if ip := net.ParseIP(host); ip == nil || !ip.IsLoopback() {
		return &ValueError{key, fmt.Sprintf("%q is not a loopback address such as 127.0.0.1 or [::1]: whoever can reach the "+
			"streaming server and learns a token has a shell", host)}
	}
	return nil
}

// portNumber refuses what is no port of TCP. The names of /etc/services are none either: which there are differs
// from node to node.
func portNumber(key, port string, least int) *ValueError {
	if n, err := strconv.ParseUint(port, 10, 16); err != nil || int(n) < least {
		return &ValueError{key, fmt.Sprintf("%q is not a port, a number from %d to 65535", port, least)}
	}
	return nil
}

// Level is the log level as slog has it.
func (c *Config) Level() slog.Level {
	var level slog.Level
	if err := level.UnmarshalText([]byte(c.LogLevel)); err != nil {
		return slog.LevelInfo // Validate has seen it
	}
	return level
}

// lineOf is the line that sets a key, or 1 when no line does. A key of the third table of an array
// is written as "deny[2].kinds".
func lineOf(text []byte, key string) int {
	table, name := "", key
	if i := strings.LastIndex(key, "."); i >= 0 {
		table, name = key[:i], key[i+1:]
	}
	current, header := "", 1
	seen := make(map[string]int) // tables of each array
	for i, line := range strings.Split(string(text), "\n") {
		line = strings.TrimSpace(line)
		if array, ok := strings.CutPrefix(line, "[["); ok {
			array = strings.TrimSpace(strings.SplitN(array, "]", 2)[0])
			current = fmt.Sprintf("%s[%d]", array, seen[array])
			seen[array]++
			if current == table {
				header = i + 1 // when none of the table's own lines sets the key
			}
			continue
		}
		if table, ok := strings.CutPrefix(line, "["); ok {
			current = strings.TrimSpace(strings.SplitN(table, "]", 2)[0])
			continue
		}
		left, _, ok := strings.Cut(line, "=")
		left = strings.TrimSpace(left)
		if ok && ((current == table && left == name) || (current == "" && left == key)) {
			return i + 1
		}
	}
	return header
}

// suggestion is a hint at the key that was probably meant.
func suggestion(key string) string {
	var known []string
	example := Default()
	example.Deny, example.Recording.Rule = []Deny{{TTY: new(bool)}}, []Rule{{}} // tables of which there may be none
	collectKeys("", example, &known)
	for _, k := range slices.Clone(known) {
		if i := strings.LastIndex(k, "."); i >= 0 && !slices.Contains(known, k[:i]) {
			known = append(known, k[:i]) // the table
		}
	}
	return nearest(key, known)
}

func collectKeys(prefix string, value any, keys *[]string) {
	collectTreeKeys(prefix, tree(value), keys)
	slices.Sort(*keys)
}

func collectTreeKeys(prefix string, tree map[string]any, keys *[]string) {
	for name, v := range tree {
		if sub, ok := v.(map[string]any); ok {
			collectTreeKeys(prefix+name+".", sub, keys)
			continue
		}
		if array, ok := v.([]any); ok && len(array) > 0 {
			if table, ok := array[0].(map[string]any); ok {
				collectTreeKeys(prefix+name+".", table, keys)
				continue
			}
		}
		*keys = append(*keys, prefix+name)
	}
}

// nearest says which of the choices the value resembles, if one does.
func nearest(value string, choices []string) string {
	best, distance := "", min(4, len(value)/2+1) // as many changes are no resemblance
	last := value[strings.LastIndex(value, ".")+1:]
	for _, choice := range choices {
		d := editDistance(value, choice)
		if choice[strings.LastIndex(choice, ".")+1:] == last {
			d = min(d, 1) // the right name in the wrong table
		}
		if d < distance {
			best, distance = choice, d
		}
	}
	if best == "" {
		return ""
	}
	return fmt.Sprintf("; did you mean %q?", best)
}

// editDistance is the Levenshtein distance of two short strings.
func editDistance(a, b string) int {
	row := make([]int, len(b)+1)
	for j := range row {
		row[j] = j
	}
	for i := 1; i <= len(a); i++ {
		diagonal := row[0]
		row[0] = i
		for j := 1; j <= len(b); j++ {
			change := diagonal
			if a[i-1] != b[j-1] {
				change++
			}
			diagonal = row[j]
			row[j] = min(change, row[j]+1, row[j-1]+1)
		}
	}
	return row[len(b)]
}
