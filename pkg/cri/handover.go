package cri

import (
	"context"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/streamshim/streamshim/pkg/workload"
)

// Quiesce brings the server to a point where no call is in progress and new connections wait in the listener's
// queue: for Resume, or for another program that has the same socket. Until then it serves calls with only brief
// pauses. Calls that outlast ctx end as Unavailable, as watches do at once. It fails if the listener cannot be
// paused; the server then keeps serving.
func (s *Server) Quiesce(ctx context.Context) error { return s.server.Quiesce(ctx) }

// Resume serves again after Quiesce.
func (s *Server) Resume() { s.server.Resume() }

// isWatch reports whether a method's calls never end by themselves.
func isWatch(method string) bool {
	return method == runtimeapi.RuntimeService_GetContainerEvents_FullMethodName
}

// State is what the next program need not find out again.
type State struct {
	Containers []workload.Container // facts of running containers, each checked again on use
}

// State returns the facts known about containers.
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

// Adopt takes over the facts of another server.
func (s *Server) Adopt(state State) {
	for _, container := range state.Containers {
		s.resolver.containers.put(container)
	}
}
