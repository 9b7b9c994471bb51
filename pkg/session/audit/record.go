package audit

import (
	"time"

	"github.com/streamshim/streamshim/pkg/session"
)

// SchemaVersion is written into each record. Fields may be added within a version.
const SchemaVersion = 1

// Event says what a record is about.
type Event string

// The events that records describe.
const (
	Start   Event = "start"   // a session, or an ExecSync, begins
	End     Event = "end"     // it has ended
	Refused Event = "refused" // it was refused
	Lost    Event = "lost"    // earlier records could not be written
	// Handover is written by a program that has taken over from another one, in the same process.
	Handover Event = "handover"
)

// Record is one line of the audit log. docs/audit.md explains the fields to operators.
type Record struct {
	Version int       `json:"version"`
	Time    time.Time `json:"time"` // UTC
	Event   Event     `json:"event"`

	// Session is the same in all records of one session. It is empty for a refused session.
	Session      string       `json:"session,omitempty"`
	Kind         session.Kind `json:"kind,omitempty"`
	PodNamespace string       `json:"pod_namespace,omitempty"`
	PodName      string       `json:"pod_name,omitempty"`
	PodUID       string       `json:"pod_uid,omitempty"`
	Container    string       `json:"container,omitempty"`
	ContainerID  string       `json:"container_id,omitempty"`
	SandboxID    string       `json:"sandbox_id,omitempty"`
	Command      []string     `json:"command,omitempty"`
	CommandCut   bool         `json:"command_cut,omitempty"`
	AuditID      string       `json:"kubernetes_audit_id,omitempty"`
	// AuditIDVerified is false wherever there is an AuditID, because clients can choose their own.
	AuditIDVerified *bool         `json:"kubernetes_audit_id_verified,omitempty"`
	TTY             bool          `json:"tty"`
	User            *session.User `json:"user,omitempty"`
	Protocol        string        `json:"protocol,omitempty"`
	Peer            string        `json:"peer,omitempty"`
	BytesIn         *int64        `json:"bytes_in,omitempty"`         // End: from the client
	BytesOut        *int64        `json:"bytes_out,omitempty"`        // End: to the client
	Duration        *float64      `json:"duration_seconds,omitempty"` // End
	ExitCode        *int          `json:"exit_code,omitempty"`        // End: if a process ran and its status is known
	Helper          string        `json:"helper,omitempty"`           // End: the helper of streamshim's that ran instead of the command
	Reason          string        `json:"reason,omitempty"`           // End and Refused: one word
	Error           string        `json:"error,omitempty"`            // End and Refused
	LostRecords     int64         `json:"lost_records,omitempty"`     // Lost
	Carried         *int          `json:"carried,omitempty"`          // Handover: sessions that continue
	NotCarried      *int          `json:"not_carried,omitempty"`      // Handover: sessions that it ended
	Pause           *float64      `json:"pause_seconds,omitempty"`    // Handover: how long sessions were paused
}

// describe fills in what is constant in a session's life.
func describe(event Event, id string, info session.Info, level session.CommandLevel) *Record {
	r := &Record{
		Version: SchemaVersion, Time: time.Now().UTC(), Event: event, Session: id, Kind: info.Kind,
		PodNamespace: info.Target.PodNamespace, PodName: info.Target.PodName, PodUID: info.Target.PodUID,
		Container: info.Target.ContainerName, ContainerID: info.Target.ContainerID, SandboxID: info.Target.SandboxID,
		AuditID: info.AuditID, TTY: info.TTY, User: info.User, Protocol: info.Protocol, Peer: info.Peer,
	}
	if info.AuditID != "" {
		r.AuditIDVerified = new(bool)
	}
	r.Command, r.CommandCut = level.Visible(info.Command)
	return r
}

// finish adds how the session ended.
func (r *Record) finish(began time.Time, in, out int64, o session.Outcome) {
	duration := time.Since(began).Seconds()
	r.BytesIn, r.BytesOut, r.Duration, r.Reason = &in, &out, &duration, o.Reason
	r.Helper = o.Helper
	if o.ExitCode >= 0 {
		r.ExitCode = &o.ExitCode
	}
	if o.Err != nil {
		r.Error = o.Err.Error()
	}
}

// line returns the record with a newline.
func (r *Record) line() []byte {
	text, err := session.PrintableJSON(r, "")
	if err != nil {
		return nil // cannot happen: the struct has plain types only
	}
	return append(text, '\n')
}
