// Package admin lets operators control a running streamshim: an HTTP API over a Unix socket that only root may open, and
// the client for the command line.
//
//	GET  /v1/sessions             all live sessions: SessionList
//	GET  /v1/sessions/{id}        one session: Session
//	POST /v1/sessions/{id}/kill   KillRequest; 204
//	GET  /v1/sessions/{id}/watch  what its terminal shows from now on, as an asciicast v2; see WatchEnd
//	GET  /v1/recordings           the recordings on the node: RecordingList
//	GET  /v1/recordings/{name}    one recording, as an asciicast v2
//	POST /v1/handover             HandoverRequest; 202, and the Handover that has begun
//	GET  /v1/handover             the last hand-over: Handover
//
// An id may be shortened as long as it is unique. An error is an Error with a matching HTTP status. New fields may be
// added within a version. A reader skips those it does not know.
package admin

import (
	"time"

	"github.com/streamshim/streamshim/pkg/session"
)

// SessionList is the answer to GET /v1/sessions, oldest first.
type SessionList struct {
	Sessions []Session `json:"sessions"`
}

// Session is a live session.
type Session struct {
	ID           string        `json:"id"`
	Kind         session.Kind  `json:"kind"`
	Phase        session.Phase `json:"phase"`
	PodNamespace string        `json:"pod_namespace,omitempty"`
	PodName      string        `json:"pod_name,omitempty"`
	PodUID       string        `json:"pod_uid,omitempty"`
	Container    string        `json:"container,omitempty"`
	ContainerID  string        `json:"container_id,omitempty"`
	SandboxID    string        `json:"sandbox_id,omitempty"`
	// Command is as much of the command line as audit.command allows.
	Command []string `json:"command,omitempty"`
	TTY     bool     `json:"tty"`
	// Watchable says that GET .../watch shows something.
	Watchable bool          `json:"watchable"`
	Protocol  string        `json:"protocol"`
	Peer      string        `json:"peer"`
	PID       int           `json:"pid,omitempty"` // on the node; absent if unknown
	User      *session.User `json:"user,omitempty"`
	AuditID   string        `json:"kubernetes_audit_id,omitempty"`
	// AuditIDVerified is false if there is an AuditID, because a client can send one of its own.
	AuditIDVerified *bool     `json:"kubernetes_audit_id_verified,omitempty"`
	Started         time.Time `json:"started"`
	Age             float64   `json:"age_seconds"`
	Idle            float64   `json:"idle_seconds"`
	BytesIn         int64     `json:"bytes_in"`  // from the client
	BytesOut        int64     `json:"bytes_out"` // to the client
}

// WatchEnd says how a watch has ended: the trailer Streamshim-Watch-End of the answer to GET .../watch. A client whose watch ends
// with a hand-over asks again, and gets an answer from the next program.
type WatchEnd string

// The ways.
const (
	WatchSessionEnded WatchEnd = "session-ended"
	WatchHandover     WatchEnd = "handover" // another program takes over, with the session
	WatchShutdown     WatchEnd = "shutdown" // streamshim ends
	WatchLost         WatchEnd = "lost"     // the connection has ended, or streamshim is of a version that does not say
)

// The answer to GET .../watch has in headerBytesOut how many bytes the session's client had got when it began, and in the
// trailers how it has ended and, if not with the session, how many bytes it were then.
const (
	headerBytesOut  = "Streamshim-Bytes-Out"
	trailerWatchEnd = "Streamshim-Watch-End"
	trailerBytesOut = "Streamshim-End-Bytes-Out"
)

// HeaderWatch has the name of a watch in the answer to GET .../watch. Who goes on watching behind a hand-over sends it with the
// next request, so that the terminal's user is not told twice.
const HeaderWatch = "Streamshim-Watch"

// RecordingList is the answer to GET /v1/recordings, newest first.
type RecordingList struct {
	Recordings []Recording `json:"recordings"`
}

// Recording is a recording on the node.
type Recording struct {
	Name         string    `json:"name"`
	PodNamespace string    `json:"pod_namespace"`
	PodName      string    `json:"pod_name"`
	Container    string    `json:"container"`
	SessionID    string    `json:"session_id"`
	Started      time.Time `json:"started"`
	Size         int64     `json:"size"` // bytes; it grows while the session lives
}

// KillRequest says how to end a session.
type KillRequest struct {
	// Signal is the number of a signal for the session's process. 0 ends the session instead: its client is told
	// that an operator ended it, and its process is treated as if the client had gone.
	Signal int `json:"signal,omitempty"`
}

// HandoverRequest asks for a hand-over to the installed program.
type HandoverRequest struct {
	// DryRun stops before the program is executed. Everything continues in the old one.
	DryRun bool `json:"dry_run,omitempty"`
}

// Handover is the progress or result of a hand-over of this process to the installed program.
type Handover struct {
	ID     string        `json:"id"`
	Reason string        `json:"reason"` // who asked: upgrade or reload
	DryRun bool          `json:"dry_run,omitempty"`
	Began  time.Time     `json:"began"`
	Phase  HandoverPhase `json:"phase"`
	From   string        `json:"from"`         // version that ran
	To     string        `json:"to,omitempty"` // version of the installed program, once it is known
	// Carried is how many sessions continued. EndedSessions has a line for each that did not. With DryRun, both say
	// what would happen.
	Carried       int      `json:"carried"`
	EndedSessions []string `json:"ended_sessions,omitempty"`
	// What went over, and for how long sessions stood still. Of a dry run it is an estimate, and Descriptors are those that
	// are open: for a moment most of them are open twice, and DescriptorLimit is the limit of the process.
	State           int     `json:"state_bytes,omitempty"`
	Descriptors     int     `json:"descriptors,omitempty"`
	DescriptorLimit uint64  `json:"descriptor_limit,omitempty"`
	Pause           float64 `json:"pause_seconds,omitempty"`
	// Last is the last hand-over by which this program has taken over, in the answer to a dry run; nil when there was none.
	Last  *Handover `json:"last,omitempty"`
	Error string    `json:"error,omitempty"` // why nothing was done
}

// HandoverPhase is the phase of a hand-over.
type HandoverPhase string

// The phases. The last two are final.
const (
	HandoverRunning HandoverPhase = "running"
	HandoverDone    HandoverPhase = "done"
	HandoverFailed  HandoverPhase = "failed"
)

// Error is the error of a request.
type Error struct {
	Message string `json:"error"`
	Code    int    `json:"-"` // HTTP status
}

func (e *Error) Error() string { return e.Message }
