// Package config defines streamshim's configuration: the TOML file, its defaults and its validation. A mistake
// in the file becomes a message with the line and a hint.
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

// DefaultFile is the file that is read, if it exists, when none is named.
const DefaultFile = "/etc/streamshim/config.toml"

// Config is everything that can be set. The toml names are the file's keys.
//
// The comments here also become docs/configuration.md, deploy/config.toml and a manual page.
type Config struct {
	// Listen is the Unix socket on which CRI is served.
	Listen string `toml:"listen"`
	// Upstream is the runtime's CRI socket. If empty, the usual places are tried.
	Upstream string `toml:"upstream"`
	// StreamAddress is where the streaming server listens. It must be a loopback address. Port 0 takes
	// any free port.
	StreamAddress string `toml:"stream_address"`
	// StateDir is the directory for process files, console sockets and recovery records, which are needed
	// while processes run.
	StateDir string `toml:"state_dir"`
	// LogLevel is debug, info, warn or error.
	LogLevel string `toml:"log_level"`
	// LogFormat is text or json.
	LogFormat string `toml:"log_format"`
	// Admin is the Unix socket of "streamshim sessions". Only root may open it. If empty, there is none.
	Admin string `toml:"admin"`
	// NotifyWatch tells the user of a terminal when an operator watches it with "streamshim sessions
	// watch".
	NotifyWatch bool `toml:"notify_watch"`
	// MetricsAddress is the HOST:PORT at which /metrics, /healthz and /readyz are served. If empty, they
	// are not served. There is no password: whoever can reach it can read the numbers.
	MetricsAddress string `toml:"metrics_address"`
	// Profiling also serves /debug/pprof/ at metrics_address, which must then be a loopback address.
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
	// Deny refuses each session that matches any of these rules.
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
	// OnDisconnect is what happens to a command when its client goes: hangup, kill or keep.
	OnDisconnect string `toml:"on_disconnect"`
	// TermAfter is the time from the hang-up to SIGTERM.
	TermAfter Duration `toml:"term_after"`
	// KillAfter is the time from the hang-up to SIGKILL.
	KillAfter Duration `toml:"kill_after"`
	// InputGrace is for a command without a terminal whose client has closed its connection in order. The
	// command is hung up once it has read none of the remaining input for this long, or this long after it
	// has read all of it. 0 hangs it up at once.
	InputGrace Duration `toml:"input_grace"`
	// StartTimeout is how long the OCI runtime may take to start a command, not counting the wait for its
	// turn.
	StartTimeout Duration `toml:"start_timeout"`
	// DrainIdle is for a command that has ended while a background child holds its output open. The output
	// counts as complete after this much silence. 0 waits for ever, and 10 s for ExecSync.
	DrainIdle Duration `toml:"drain_idle"`
	// DrainMax bounds the same wait while output still flows. For ExecSync it is at most 10 s.
	DrainMax Duration `toml:"drain_max"`
	// Linger is how long a finished session waits, without any progress, for its client to read the rest.
	Linger Duration `toml:"linger"`
	// StatusWait bounds how long the exit status waits for a slow reader behind a client that may translate,
	// such as the kubelet. It counts from the last sign that output was read. 0 does not wait.
	StatusWait Duration `toml:"status_wait"`
	// IdleTimeout ends a session after this long without payload in either direction. 0 is off.
	IdleTimeout Duration `toml:"idle_timeout"`
	// MaxLifetime ends a session this long after its start. 0 is off.
	MaxLifetime Duration `toml:"max_lifetime"`
	// Helpers lists the programs that streamshim provides where a container lacks them. The only one is "tar",
	// for kubectl cp. See docs/engines.md.
	Helpers []string `toml:"helpers"`
}

// Attach is how attach sessions behave.
type Attach struct {
	// InputEnd is what happens when a client's input ends and the container's input stays open: detach or
	// stay. With detach the client is detached once the container has been silent for a second, at most ten
	// seconds later.
	InputEnd string `toml:"input_end"`
	// IdleTimeout ends a session after this long without payload in either direction. 0 is off.
	IdleTimeout Duration `toml:"idle_timeout"`
	// MaxLifetime ends a session this long after its start. 0 is off.
	MaxLifetime Duration `toml:"max_lifetime"`
}

// PortForward is how port-forward sessions behave.
type PortForward struct {
	// Refused is what a client gets when nobody listens on the port: reset or report. With report kubectl
	// ends the whole port-forward.
	Refused string `toml:"refused"`
	// Stall is how long one connection may block the others before it is reset. 0 is for ever.
	Stall Duration `toml:"stall"`
	// IdleTimeout ends a session after this long without payload in either direction. 0 is off.
	IdleTimeout Duration `toml:"idle_timeout"`
	// MaxLifetime ends a session this long after its start. 0 is off.
	MaxLifetime Duration `toml:"max_lifetime"`
}

// Shutdown is how a running streamshim ends.
type Shutdown struct {
	Drain Duration `toml:"drain"` // how long sessions may go on after SIGTERM
}

// Audit is the log of who did what: a JSON line at the start and at the end of each session.
type Audit struct {
	Destination string `toml:"destination"` // off, file, stdout or journald
	File        string `toml:"file"`        // the file for destination = "file"; it is created with mode 0600
	MaxSize     int64  `toml:"max_size"`    // the size in bytes at which the file is rotated; 0 is never
	MaxFiles    int    `toml:"max_files"`   // how many rotated files are kept, as FILE.1 (the newest), FILE.2, ...
	// Command is how much of a command line is logged and shown to operators: none, argv0 or full.
	// Arguments often hold secrets.
	Command  string `toml:"command"`
	ExecSync bool   `toml:"execsync"` // log ExecSync calls too; most are probes
	Fsync    string `toml:"fsync"`    // when a file's records are forced to the disk: never, interval (every second) or always
	// OnFailure is what happens to a session whose start cannot be logged, as on a full disk: allow or deny.
	OnFailure string `toml:"on_failure"`
}

// Recording is which sessions are recorded, as asciicast v2 files.
type Recording struct {
	Directory string `toml:"directory"` // where recordings are kept; it is created with mode 0700, the files with 0600
	Input     bool   `toml:"input"`     // record input too, passwords included
	NonTTY    bool   `toml:"non_tty"`   // record sessions without a terminal too
	MaxSize   int64  `toml:"max_size"`  // the size limit of one recording, in bytes
	// MaxFiles is how many recordings are kept. Beyond it, the oldest recording of the pod that has most is
	// removed. 0 is no limit.
	MaxFiles int `toml:"max_files"`
	// MaxTotal is how many bytes of recordings are kept. 0 is no limit.
	MaxTotal int64 `toml:"max_total"`
	// MinAge is how long a recording is kept whatever the limits. When the limits are reached and every
	// recording is younger, new sessions are treated as on_failure says. 0 is off.
	MinAge Duration `toml:"min_age"`
	// OnFailure is what happens to a session that cannot be recorded completely, because of a full disk, a
	// slow disk, or max_size: allow or deny. With allow it goes on, with a gap in its recording. With deny it
	// ends, and everything is written to the recording before it is delivered.
	OnFailure string `toml:"on_failure"`
	// Rule selects the sessions to record: those that match any of these rules. Without rules nothing is
	// recorded.
	Rule []Rule `toml:"rule"`
}

// Rule matches sessions by their pod. A key that is left out matches every session.
type Rule struct {
	Namespaces []string          `toml:"namespaces"` // any of these namespaces; * and ? are wildcards
	PodLabels  map[string]string `toml:"pod_labels"` // all of these labels; * and ? are wildcards in the values
}

// Traces is where OpenTelemetry spans of exec, attach and port-forward go.
type Traces struct {
	Endpoint string `toml:"endpoint"` // HOST:PORT of an OTLP/gRPC receiver; if empty, nothing is traced
	Insecure bool   `toml:"insecure"` // connect without TLS
	// SampleRatio is the share of calls that are traced, from 0 to 1, among those whose client sends no trace
	// context. Other calls are traced if their client traces them.
	SampleRatio float64 `toml:"sample_ratio"`
}

// Limits bound what sessions may use. 0 is no limit.
type Limits struct {
	Sessions             int `toml:"sessions"`               // sessions on this node
	SessionsPerPod       int `toml:"sessions_per_pod"`       // sessions in one pod
	SessionsPerContainer int `toml:"sessions_per_container"` // sessions in one container
	// ConcurrentStarts bounds the commands of sessions that start at the same time, less the starts of ExecSync,
	// but at least one. One pod may have a quarter of it. Attach does not count, nor does what the runtime
	// itself starts.
	ConcurrentStarts int `toml:"concurrent_starts"`
	// ConcurrentProbes bounds the ExecSync commands that start at the same time. One pod may have a quarter
	// of it. -1 is 32 for each CPU, at least 64.
	ConcurrentProbes int `toml:"concurrent_probes"`
	// Bandwidth bounds the bytes a second of one session, in each direction.
	Bandwidth int64 `toml:"bandwidth"`
	// Buffers bounds the bytes of unread data of all sessions together. Beyond it, clients are slowed down and
	// attached clients miss output. -1 is a sixteenth of the memory of the machine or of streamshim's cgroup,
	// from 64 MiB to 1 GiB.
	Buffers int64 `toml:"buffers"`
	// SyncOutput bounds the bytes of output that all ExecSync calls together keep, not counting 64 KiB of each
	// call. A call that finds no room ends with an error. -1 is a 32nd of the memory, from 64 MiB to 512 MiB.
	SyncOutput int64 `toml:"sync_output"`
	// RecordingBuffers bounds the bytes that wait to be written to recordings, not counting 16 KiB of each
	// recording. Data that finds no room is missing from its recording, or ends its session if
	// recording.on_failure is deny. -1 is a 32nd of the memory, from 64 MiB to 512 MiB.
	RecordingBuffers int64 `toml:"recording_buffers"`
	// SpareDescriptors is how many open files are reserved for probes and running sessions. When no more are
	// left, new sessions and forwarded connections are refused. -1 is an eighth of the files that streamshim
	// may open.
	SpareDescriptors int `toml:"spare_descriptors"`
	// ConcurrentEnds bounds the commands being ended whose processes are looked for at the same time. Those of
	// ExecSync come first. -1 is 100 for each CPU.
	ConcurrentEnds int `toml:"concurrent_ends"`
}

// Deny matches sessions by their pod, kind and terminal. A key that is left out matches every session, except
// that execsync must be named in kinds.
type Deny struct {
	Namespaces []string          `toml:"namespaces"` // as in recording.rule
	PodLabels  map[string]string `toml:"pod_labels"` // as in recording.rule
	Kinds      []string          `toml:"kinds"`      // any of exec, attach, portforward and execsync
	TTY        *bool             `toml:"tty"`        // true matches sessions with a terminal, false those without
	Message    string            `toml:"message"`    // what the user is told; if empty, a general message
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

// Default returns the configuration of an empty file.
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

// Limits that nobody needs to set.
const (
	// SyncOutput bounds the bytes of output that an ExecSync returns, so that its answer stays below the 16 MiB
	// that the kubelet's client accepts (CVE-2022-1708).
	SyncOutput = 15 << 20
	// AttachBuffer bounds the bytes that are kept for an attached client that reads too slowly. Limits.Buffers
	// bounds all of them together.
	AttachBuffer = 1 << 20
	// RecordingBuffer bounds the bytes of one session that wait to be written to its recording.
	RecordingBuffer = 1 << 20
	// WaitingStarts bounds the commands that wait for their turn to start. One pod may have a quarter of it.
	WaitingStarts = 1024
)

// removed maps each key that was removed to what holds instead. A file that still has one is accepted, so that
// an update does not stop a node. Removed reports it.
var removed = map[string]string{
	"exec.engine": "only the container's OCI runtime starts commands, because a container could escape " +
		"through the native engine (docs/engines.md)",
	"exec.sync_output":      "an ExecSync returns up to 15 MiB of output, because the kubelet's client accepts no more",
	"attach.buffer":         "1 MiB is kept for each attached client; limits.buffers bounds all of them together",
	"recording.buffer":      "1 MiB of each session may wait to be written",
	"limits.waiting_starts": "1024 commands may wait for their turn to start, 256 of one pod",
}

// Removed returns a line for each key in the file that was removed, "KEY was removed: what holds instead", sorted.
func (c *Config) Removed() []string { return c.removed }

// Read reads the file's settings into c and validates the result. Unknown keys and values of the wrong type are
// errors that name their line.
//
// If override is not nil, Read calls it before it validates, to set what takes precedence over the file, such as
// flags. A flag can so replace a wrong value in the file.
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

const (
	maxFile  = 1 << 20          // bytes
	readTime = 10 * time.Second // for a FIFO whose writer writes nothing
)

func readLimited(path string) ([]byte, error) {
	// Without O_NONBLOCK, opening a FIFO that has no writer would wait for ever.
	file, err := os.OpenFile(path, os.O_RDONLY|syscall.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	defer file.Close()                             //nolint:errcheck // only read
	file.SetReadDeadline(time.Now().Add(readTime)) //nolint:errcheck // a file on a disk has no deadline, and needs none
	text, err := io.ReadAll(io.LimitReader(file, maxFile+1))
	if err != nil {
		return nil, err
	}
	if len(text) > maxFile {
		return nil, fmt.Errorf("%s is larger than %d bytes, which no configuration is", path, maxFile)
	}
	return text, nil
}

// decode reads the text into c. Its errors begin with the line, for "file:line: message".
func (c *Config) decode(text []byte) error {
	if problem := durationsWithoutUnit(text); problem != nil {
		return fmt.Errorf("%d: %w", lineOf(text, problem.key), problem)
	}
	decoder := toml.NewDecoder(bytes.NewReader(text)).DisallowUnknownFields()
	err := decoder.Decode(c)
	var unknown *toml.StrictMissingError
	if errors.As(err, &unknown) {
		for _, e := range unknown.Errors { // the known keys were decoded
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

// durationsWithoutUnit finds a duration that is not a string. The TOML library reads a plain number as
// nanoseconds: "idle_timeout = 30" would end every session at once.
func durationsWithoutUnit(text []byte) *ValueError {
	var written map[string]any
	if toml.Unmarshal(text, &written) != nil {
		return nil //nolint:nilerr // the decoder finds the error again, with its line
	}
	var keys []string
	collectKeys("", Default(), &keys)
	defaults := tree(Default())
	for _, key := range keys {
		def, _ := lookUp(defaults, key).(string)
		if _, err := time.ParseDuration(def); err != nil {
			continue // not a duration
		}
		value := lookUp(written, key)
		if _, ok := value.(string); !ok && value != nil && value != int64(0) { // 0 needs no unit
			return &ValueError{key, fmt.Sprintf("%v is not a duration such as \"30s\" or \"1h30m\"", value)}
		}
	}
	return nil
}

// wrongType matches the TOML library's message for a value of the wrong type.
var wrongType = regexp.MustCompile(`^cannot decode TOML (.+) into struct field \S+ of type (\S+)$`)

// plainWords rewrites such a message without Go's types.
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

// ValueError describes a setting with an invalid value.
type ValueError struct {
	key     string // as in the file, with dots
	problem string
}

func (e *ValueError) Error() string { return e.key + ": " + e.problem }

// Validate reports the first invalid value, as a *ValueError.
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

// loopback rejects addresses that other machines could reach: the token in the URL is the only
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

// portNumber rejects anything but a TCP port number. It rejects the names of /etc/services too, because they differ
// from node to node.
func portNumber(key, port string, least int) *ValueError {
	if n, err := strconv.ParseUint(port, 10, 16); err != nil || int(n) < least {
		return &ValueError{key, fmt.Sprintf("%q is not a port, a number from %d to 65535", port, least)}
	}
	return nil
}

// Level returns the log level for slog.
func (c *Config) Level() slog.Level {
	var level slog.Level
	if err := level.UnmarshalText([]byte(c.LogLevel)); err != nil {
		return slog.LevelInfo // Validate rejects this
	}
	return level
}

// lineOf returns the line that sets a key, or 1 if no line does. A key of the third table of an array is
// written as "deny[2].kinds".
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

// suggestion returns a hint at the key that was probably meant.
func suggestion(key string) string {
	var known []string
	example := Default()
	example.Deny, example.Recording.Rule = []Deny{{TTY: new(bool)}}, []Rule{{}} // empty by default
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

// nearest returns a hint at the choice that resembles the value, or "".
func nearest(value string, choices []string) string {
	best, distance := "", min(4, len(value)/2+1) // so many edits are no resemblance
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

// editDistance returns the Levenshtein distance of two short strings.
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
