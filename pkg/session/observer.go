package session

// Observer is told how sessions go, without a say in it: metrics, traces. Its methods are called
// from many goroutines and must not block.
type Observer interface {
	// Began is told of a session that all guards have admitted.
	Began(*Session)
	// Resumed is told instead of a session that another program has begun and handed over to this one, in the phase
	// that it has come to.
	Resumed(*Session)
	// PhaseChanged is told when a session that began has come to Running, and to Lingering. It is
	// told of each phase once, and of none that was left out: a command that could not be started
	// never runs.
	PhaseChanged(*Session, Phase)
	// Ended is told once of each session that began or was resumed, before End returns.
	Ended(*Session, Outcome)
	// Refused is told of a session that a guard refused, at the CRI call or when it was to begin.
	Refused(Info, error)
}

// Observe adds an observer. It is called before the first session begins.
func (r *Registry) Observe(o Observer) { r.observers = append(r.observers, o) }

func (r *Registry) tellRefused(info Info, reason error) {
	for _, o := range r.observers {
		o.Refused(info, reason)
	}
}
