package cri

import (
	"context"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/streamshim/streamshim/pkg/workload"
)

// Quiesce brings the server to a point where no call is under way and whoever connects waits in the listener's
// queue: for Resume, or for another program that has the same socket. Until then calls are served as ever, but for short
// moments. Calls that outlast the context end as Unavailable, as watches do at once. The error is that the listener
// cannot be paused; then the server serves on.
func (s *Server) Quiesce(ctx context.Context) error { return s.server.Quiesce(ctx) }

// Resume serves again after Quiesce.
func (s *Server) Resume() { s.server.Resume() }

// isWatch tells of a method that it never ends by itself.
func isWatch(method string) bool {
	return method == runtimeapi.RuntimeService_GetContainerEvents_FullMethodName
}

// State is what the next program need not find out again.
type State struct {
	Containers []workload.Container // what is known of running ones; each is looked at again when it is used
}

// State returns what is known of containers.
func (s *Server) State() State {
	c := s.resolver.containers
	c.mu.Lock()
	defer c.mu.Unlock()
	var state State
	for _, container := range c.byID {
		state.Containers = append(state.Containers, container)
	}
	return state
}

// Adopt takes over what another server has known.
func (s *Server) Adopt(state State) {
	for _, container := range state.Containers {
		s.resolver.containers.put(container)
	}
}
