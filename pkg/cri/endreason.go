package cri

import (
	"context"
	"fmt"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/streamshim/streamshim/pkg/workload"
)

const (
	// endReasonRetry is the pause before asking the upstream again, which learns of a container's end a little
	// later than we do.
	endReasonRetry = 50 * time.Millisecond
	// endReasonSilence is how long to wait for an upstream that does not answer, as when it restarts: the session
	// should end within a second.
	endReasonSilence = 700 * time.Millisecond
	// containerGone is the reason if none is known.
	containerGone = "container is no longer running"
	// oomKilledReason is the reason that both containerd and CRI-O give.
	oomKilledReason = "OOMKilled"
	// Exit codes of a process killed by SIGKILL and SIGTERM.
	exitCodeKilled, exitCodeTerminated = 128 + 9, 128 + 15
)

// EndReason says in a few words why a container is gone, such as "container was OOM-killed". It asks repeatedly
// until the upstream has noticed the end, stops answering, or ctx is done.
func (u *Upstream) EndReason(ctx context.Context, target workload.Target) string {
	retry := time.NewTicker(endReasonRetry)
	defer retry.Stop()
	answered := time.Now()
	for {
		asking, cancel := context.WithDeadline(ctx, answered.Add(endReasonSilence))
		response, err := u.runtime.ContainerStatus(asking, &runtimeapi.ContainerStatusRequest{ContainerId: target.ContainerID})
		cancel()
		switch found := response.GetStatus(); {
		case status.Code(err) == codes.NotFound:
			return "container was removed"
		case err != nil && time.Since(answered) >= endReasonSilence:
			return containerGone
		case err != nil:
		case found.GetState() == runtimeapi.ContainerState_CONTAINER_EXITED:
			return u.exitReason(ctx, target, found)
		default:
			answered = time.Now()
		}
		select {
		case <-retry.C:
		case <-ctx.Done():
			return containerGone
		}
	}
}

func (u *Upstream) exitReason(ctx context.Context, target workload.Target, exited *runtimeapi.ContainerStatus) string {
	if exited.GetReason() == oomKilledReason {
		return "container was OOM-killed"
	}
	code := exited.GetExitCode()
	if (code == exitCodeKilled || code == exitCodeTerminated) && u.sandboxStopped(ctx, target.SandboxID) {
		return "pod sandbox was stopped"
	}
	return fmt.Sprintf("container exited with code %d", code)
}

func (u *Upstream) sandboxStopped(ctx context.Context, id string) bool {
	if id == "" {
		return false
	}
	response, err := u.runtime.PodSandboxStatus(ctx, &runtimeapi.PodSandboxStatusRequest{PodSandboxId: id})
	if err != nil {
		return status.Code(err) == codes.NotFound
	}
	return response.GetStatus().GetState() == runtimeapi.PodSandboxState_SANDBOX_NOTREADY
}
