package session

// Observer is notified about sessions but cannot affect them: metrics, traces. Its methods are called from many
// goroutines and must not block.
type Observer interface {
	// Began reports a session that all guards have admitted.
	Began(*Session)
	// Resumed replaces Began for a session that another program began and handed over to this one, in the phase
	// that it has reached.
	Resumed(*Session)
	// PhaseChanged reports that a session has reached Running or Lingering. It is called at most once per phase,
	// and not for phases that are skipped: a command that could not be started never runs.
	PhaseChanged(*Session, Phase)
	// Ended is called once for each session that began or was resumed, before End returns.
	Ended(*Session, Outcome)
	// Refused reports a session that a guard refused, at the CRI call or when it was to begin.
	Refused(Info, error)
}

// Observe adds an observer. Call it before the first session begins.
func (r *Registry) Observe(o Observer) { r.observers = append(r.observers, o) }

func (r *Registry) tellRefused(info Info, reason error) {
	for _, o := range r.observers {
		o.Refused(info, reason)
	}
}
