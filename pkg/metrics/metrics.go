// Package metrics collects streamshim's metrics for Prometheus, and serves them with the health checks on an address of
// their own.
//
// Every label has a fixed set of values. A value from outside that is not in the set is counted as "other", so that no
// client, peer or newer runtime can make the number of series grow. No label names a pod, container, namespace or user;
// the audit log does.
package metrics

import (
	"maps"
	"runtime"
	"slices"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"

	"github.com/streamshim/streamshim/pkg/session"
)

// Config configures the metrics. The functions are called at each scrape. Except WaitingTokens they may be nil, and then
// their metrics are absent.
type Config struct {
	Version string
	// Methods are the full names of the CRI methods that are counted by name.
	Methods []string
	// WaitingTokens returns how many URLs wait for their client.
	WaitingTokens func() int
	// LostAudit and IncompleteRecordings return totals since the start.
	LostAudit, IncompleteRecordings func() int64
	// Buffered returns the bytes of unread data that sessions hold. BuffersRefused returns how many times there was no
	// room for more.
	Buffered, BuffersRefused func() int64
	// SyncOutput and RecordingBuffered return the same for the output that ExecSync calls keep, and for what recordings
	// have to write.
	SyncOutput, SyncOutputRefused              func() int64
	RecordingBuffered, RecordingBuffersRefused func() int64
	Commands                                   func() Commands
	Handovers                                  func() Handovers
}

// Handovers counts hand-overs to another program in the same process. The counts survive a hand-over.
type Handovers struct {
	Done, Failed   int64
	Carried, Ended int64   // sessions
	Pause          float64 // of the last one, in seconds
}

// Commands counts commands that are being started or ended, and those that wait for their turn.
type Commands struct {
	Starting, StartsWaiting       int // of sessions
	ProbesStarting, ProbesWaiting int // of ExecSync
	Ending, EndsWaiting           int // whose processes are being looked for, to end them
}

// Metrics is a session.Observer that collects the metrics. Its methods may be called from many goroutines.
type Metrics struct {
	registry *prometheus.Registry

	started        *prometheus.HistogramVec
	duration       *prometheus.HistogramVec
	linger         *prometheus.HistogramVec
	ended          *prometheus.CounterVec
	refused        *prometheus.CounterVec
	events         map[string]prometheus.Counter
	kills          prometheus.Counter
	starts         prometheus.Counter
	calls          *prometheus.CounterVec
	callDuration   *prometheus.HistogramVec
	execSync       *prometheus.HistogramVec
	execSyncOutput prometheus.Counter
	methods        map[string]string // full name to label

	mu   sync.Mutex
	live map[*session.Session]time.Time // when it began to linger, zero before
	// moved are the bytes that ended sessions have moved.
	moved map[session.Kind]transferred
}

type transferred struct{ received, sent int64 }

// Buckets, in seconds. A start takes tens of milliseconds, a session between milliseconds and hours.
var (
	startBuckets    = []float64{.01, .025, .05, .1, .2, .35, .5, 1, 2.5, 5, 10, 30}
	durationBuckets = []float64{.1, .5, 1, 5, 15, 60, 300, 900, 3600, 4 * 3600, 24 * 3600}
	lingerBuckets   = []float64{.001, .01, .1, 1, 5, 15, 60, 300, 600}
	callBuckets     = []float64{.001, .005, .01, .025, .05, .1, .25, .5, 1, 5, 30, 120}
	execSyncBuckets = []float64{.01, .025, .05, .1, .2, .35, .5, 1, 2.5, 5, 10, 30}
)

var kinds = []session.Kind{session.Exec, session.Attach, session.PortForward}

// New returns the metrics, all at zero.
func New(c Config) *Metrics {
	m := &Metrics{
		registry: prometheus.NewRegistry(),
		events:   make(map[string]prometheus.Counter),
		methods:  make(map[string]string),
		live:     make(map[*session.Session]time.Time),
		moved:    make(map[session.Kind]transferred),
	}
	m.started = m.histogram("session_start_seconds", "Time from a client's connection to its process running; for a port-forward to being ready.", startBuckets, "kind")
	m.duration = m.histogram("session_duration_seconds", "Time from a client's connection to the end of its session.", durationBuckets, "kind")
	m.linger = m.histogram("session_linger_seconds", "Time that a finished session waited for its client to read the rest and to close.", lingerBuckets, "kind")
	m.ended = m.counters("sessions_total", "Sessions that have ended.", "kind", "protocol", "result", "reason")
	m.refused = m.counters("sessions_refused_total", "Sessions that a limit or a rule has refused, or that could not be audited or recorded.", "kind", "refusal")
	tokens := m.counters("tokens_total", "One-time URLs: issued to the kubelet; redeemed by their client; expired before that; refused because too many wait; unknown for a request with an invalid token.", "event")
	for _, event := range []string{"issued", "redeemed", "expired", "refused", "unknown"} {
		m.events["token-"+event] = tokens.WithLabelValues(event)
	}
	m.events["drain-cut"] = m.counter("drains_cut_total", "Outputs that a background child held open after the command's end, and that were cut after silence or too long a time.")
	m.events["linger-cut"] = m.counter("lingers_cut_total", "Finished sessions that were ended because their client had stopped reading.")
	m.events["status-held"] = m.counter("statuses_held_total", "Finished commands whose status was held back for a second or more, for a slow client to read the output first.")
	m.events["stream-stalled"] = m.counter("stream_stalls_total", "Streams of port-forwards that were reset because nobody read them and they blocked others.")
	m.events["panicked"] = m.counter("panics_total", "Sessions that were ended because of a fault in streamshim, which is in its log.")
	m.events["peer-dead"] = m.counter("dead_peers_total", "Clients that did not answer any more.")
	m.kills = m.counter("disconnect_kills_total", "Process trees that had to be killed after their client had gone.")
	m.starts = m.counter("command_starts_total", "Commands started by the OCI runtime.")
	m.calls = m.counters("cri_calls_total", "CRI calls, answered here or forwarded, by method and gRPC code.", "method", "code")
	m.callDuration = m.histogram("cri_call_seconds", "Time of CRI calls, answered here or forwarded.", callBuckets, "method")
	m.execSync = m.histogram("execsync_seconds", "Time of ExecSync calls, which are mostly probes, by result.", execSyncBuckets, "result")
	m.execSyncOutput = m.counter("execsync_output_bytes_total", "Output that ExecSync calls returned, in bytes.")
	for _, full := range c.Methods {
		m.methods[full] = methodLabel(full)
	}
	for _, kind := range kinds {
		m.started.WithLabelValues(string(kind))
		m.duration.WithLabelValues(string(kind))
		m.linger.WithLabelValues(string(kind))
	}
	// Prometheus does not see the first increase of a series that did not exist before.
	for _, kind := range append([]session.Kind{session.ExecSync}, kinds...) {
		for _, refusal := range refusals {
			m.refused.WithLabelValues(string(kind), refusal)
		}
	}
	for _, result := range syncResults {
		m.execSync.WithLabelValues(result)
	}
	build := prometheus.NewGauge(prometheus.GaugeOpts{
		Name: "streamshim_build_info", Help: "1, with the version as a label.",
		ConstLabels: prometheus.Labels{"version": c.Version, "go_version": runtime.Version()},
	})
	build.Set(1)
	m.counterFunc("audit_records_lost_total", "Audit records that could not be written.", c.LostAudit)
	m.counterFunc("recordings_incomplete_total", "Recordings that could not be begun, have gaps, or ended before their session.", c.IncompleteRecordings)
	m.counterFunc("buffers_refused_total", "Times that data of a session had to wait, or was skipped, because limits.buffers was reached.", c.BuffersRefused)
	m.counterFunc("execsync_output_refused_total", "ExecSync calls that were ended because limits.sync_output was reached.", c.SyncOutputRefused)
	m.counterFunc("recording_buffers_refused_total", "Times that a recording missed something because limits.recording_buffers was reached.", c.RecordingBuffersRefused)
	m.gaugeFunc("buffered_bytes", "Unread data that sessions hold.", c.Buffered)
	m.gaugeFunc("execsync_buffered_bytes", "Output that running ExecSync calls keep, not counting 64 KiB of each.", c.SyncOutput)
	m.gaugeFunc("recording_buffered_bytes", "Data that waits to be written to recordings, not counting 16 KiB of each.", c.RecordingBuffered)
	if c.Commands != nil {
		m.registry.MustRegister(collector{[]*prometheus.Desc{commandsDesc}, func(found chan<- prometheus.Metric) {
			collectCommands(found, c.Commands())
		}})
	}
	if c.Handovers != nil {
		m.registry.MustRegister(collector{[]*prometheus.Desc{handoversDesc, handedSessionsDesc, handoverPauseDesc}, func(found chan<- prometheus.Metric) {
			collectHandovers(found, c.Handovers())
		}})
	}
	m.registry.MustRegister(build, collector{[]*prometheus.Desc{liveDesc, receivedDesc, sentDesc}, m.collectLive},
		prometheus.NewGaugeFunc(prometheus.GaugeOpts{
			Name: "streamshim_tokens_waiting", Help: "One-time URLs that wait for their client.",
		}, func() float64 { return float64(c.WaitingTokens()) }),
		collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	return m
}

func (m *Metrics) gaugeFunc(name, help string, value func() int64) {
	if value != nil {
		m.registry.MustRegister(prometheus.NewGaugeFunc(prometheus.GaugeOpts{Name: "streamshim_" + name, Help: help},
			func() float64 { return float64(value()) }))
	}
}

// collector calls collect once for each scrape.
type collector struct {
	descriptions []*prometheus.Desc
	collect      func(chan<- prometheus.Metric)
}

// Describe implements prometheus.Collector.
func (c collector) Describe(to chan<- *prometheus.Desc) {
	for _, d := range c.descriptions {
		to <- d
	}
}

// Collect implements prometheus.Collector.
func (c collector) Collect(to chan<- prometheus.Metric) { c.collect(to) }

var commandsDesc = prometheus.NewDesc("streamshim_commands",
	"Commands that are being started, or ended, and those that wait for their turn.", []string{"what", "state"}, nil)

func collectCommands(found chan<- prometheus.Metric, c Commands) {
	for _, one := range []struct {
		what             string
		running, waiting int
	}{
		{"exec-start", c.Starting, c.StartsWaiting},
		{"execsync-start", c.ProbesStarting, c.ProbesWaiting},
		{"end", c.Ending, c.EndsWaiting},
	} {
		found <- prometheus.MustNewConstMetric(commandsDesc, prometheus.GaugeValue, float64(one.running), one.what, "running")
		found <- prometheus.MustNewConstMetric(commandsDesc, prometheus.GaugeValue, float64(one.waiting), one.what, "waiting")
	}
}

var (
	handoversDesc      = prometheus.NewDesc("streamshim_handovers_total", "Hand-overs to the installed program, by result.", []string{"result"}, nil)
	handedSessionsDesc = prometheus.NewDesc("streamshim_handover_sessions_total", "Sessions that hand-overs have carried, and those that have ended because they could not be.", []string{"result"}, nil)
	handoverPauseDesc  = prometheus.NewDesc("streamshim_handover_pause_seconds", "How long sessions were frozen in the last hand-over.", nil, nil)
)

func collectHandovers(found chan<- prometheus.Metric, h Handovers) {
	found <- prometheus.MustNewConstMetric(handoversDesc, prometheus.CounterValue, float64(h.Done), "done")
	found <- prometheus.MustNewConstMetric(handoversDesc, prometheus.CounterValue, float64(h.Failed), "failed")
	found <- prometheus.MustNewConstMetric(handedSessionsDesc, prometheus.CounterValue, float64(h.Carried), "carried")
	found <- prometheus.MustNewConstMetric(handedSessionsDesc, prometheus.CounterValue, float64(h.Ended), "ended")
	found <- prometheus.MustNewConstMetric(handoverPauseDesc, prometheus.GaugeValue, h.Pause)
}

func (m *Metrics) histogram(name, help string, buckets []float64, labels ...string) *prometheus.HistogramVec {
	h := prometheus.NewHistogramVec(prometheus.HistogramOpts{Name: "streamshim_" + name, Help: help, Buckets: buckets}, labels)
	m.registry.MustRegister(h)
	return h
}

func (m *Metrics) counters(name, help string, labels ...string) *prometheus.CounterVec {
	c := prometheus.NewCounterVec(prometheus.CounterOpts{Name: "streamshim_" + name, Help: help}, labels)
	m.registry.MustRegister(c)
	return c
}

func (m *Metrics) counter(name, help string) prometheus.Counter {
	c := prometheus.NewCounter(prometheus.CounterOpts{Name: "streamshim_" + name, Help: help})
	m.registry.MustRegister(c)
	return c
}

// counterFunc registers a counter with another package's value.
func (m *Metrics) counterFunc(name, help string, total func() int64) {
	if total == nil {
		return
	}
	m.registry.MustRegister(prometheus.NewCounterFunc(prometheus.CounterOpts{Name: "streamshim_" + name, Help: help},
		func() float64 { return float64(total()) }))
}

// Began implements session.Observer.
func (m *Metrics) Began(s *session.Session) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.live[s] = time.Time{}
}

// Resumed implements session.Observer. The times until the session runs and lingers are not measured again.
func (m *Metrics) Resumed(s *session.Session) { m.Began(s) }

// PhaseChanged implements session.Observer.
func (m *Metrics) PhaseChanged(s *session.Session, phase session.Phase) {
	switch phase {
	case session.Running:
		m.started.WithLabelValues(kindLabel(s.Kind)).Observe(time.Since(s.Start).Seconds())
	case session.Lingering:
		m.mu.Lock()
		defer m.mu.Unlock()
		m.live[s] = time.Now()
	}
}

// Ended implements session.Observer.
func (m *Metrics) Ended(s *session.Session, o session.Outcome) {
	received, sent := s.Transferred() // without the lock, which all sessions share: a faulty one may never answer
	m.mu.Lock()
	lingering := m.live[s]
	delete(m.live, s)
	total := m.moved[s.Kind]
	m.moved[s.Kind] = transferred{total.received + received, total.sent + sent}
	m.mu.Unlock()
	kind := kindLabel(s.Kind)
	if !lingering.IsZero() {
		m.linger.WithLabelValues(kind).Observe(time.Since(lingering).Seconds())
	}
	m.duration.WithLabelValues(kind).Observe(time.Since(s.Start).Seconds())
	m.ended.WithLabelValues(kind, protocolLabel(s.Protocol), resultLabel(s.Kind, o), reasonLabel(o.Reason)).Inc()
}

// Refused implements session.Observer.
func (m *Metrics) Refused(info session.Info, reason error) {
	m.refused.WithLabelValues(kindLabel(info.Kind), refusalLabel(reason)).Inc()
}

// Event counts an event of pkg/streaming. Unknown events are ignored.
func (m *Metrics) Event(event string) {
	if c := m.events[event]; c != nil {
		c.Inc()
	}
}

// Killed counts a process tree that had to be killed after its client had gone.
func (m *Metrics) Killed() { m.kills.Inc() }

// Started counts a command that was started.
func (m *Metrics) Started() { m.starts.Inc() }

// Call counts a CRI call, under "other" if its method is not in Config.Methods.
func (m *Metrics) Call(fullMethod, code string, duration time.Duration) {
	method, ok := m.methods[fullMethod]
	if !ok {
		method = other
	}
	m.calls.WithLabelValues(method, codeLabel(code)).Inc()
	m.callDuration.WithLabelValues(method).Observe(duration.Seconds())
}

// ExecSync counts an ExecSync that has ended, and the bytes of output it returned.
func (m *Metrics) ExecSync(o session.Outcome, output int64, duration time.Duration) {
	m.execSync.WithLabelValues(syncResult(o)).Observe(duration.Seconds())
	m.execSyncOutput.Add(float64(output))
}

var (
	liveDesc     = prometheus.NewDesc("streamshim_sessions_live", "Live sessions.", []string{"kind"}, nil)
	receivedDesc = prometheus.NewDesc("streamshim_received_bytes_total", "Payload received from clients, of live and of ended sessions.", []string{"kind"}, nil)
	sentDesc     = prometheus.NewDesc("streamshim_sent_bytes_total", "Payload sent to clients, of live and of ended sessions.", []string{"kind"}, nil)
)

func (m *Metrics) collectLive(to chan<- prometheus.Metric) {
	live := make(map[session.Kind]int)
	m.mu.Lock() // so that a session that ends now is counted once, either as live or as ended
	moved, sessions := maps.Clone(m.moved), slices.Collect(maps.Keys(m.live))
	m.mu.Unlock()
	for _, s := range sessions { // without the lock, as in Ended
		live[s.Kind]++
		received, sent := s.Transferred()
		total := moved[s.Kind]
		moved[s.Kind] = transferred{total.received + received, total.sent + sent}
	}
	for _, kind := range kinds {
		to <- prometheus.MustNewConstMetric(liveDesc, prometheus.GaugeValue, float64(live[kind]), string(kind))
		to <- prometheus.MustNewConstMetric(receivedDesc, prometheus.CounterValue, float64(moved[kind].received), string(kind))
		to <- prometheus.MustNewConstMetric(sentDesc, prometheus.CounterValue, float64(moved[kind].sent), string(kind))
	}
}
