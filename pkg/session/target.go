// Package session keeps account of what is live now: every exec, attach and port-forward session
// with what it belongs to, who asked, and why it ended.
package session

// Target says what a session belongs to. The names come from the CRI labels that the kubelet puts
// on containers and sandboxes (k8s.io/kubelet/pkg/types); they are empty for containers that were
// made by something else, such as crictl.
type Target struct {
	ContainerID   string // full ID; empty for a port-forward
	SandboxID     string // full ID
	ContainerName string
	PodName       string
	PodNamespace  string
	PodUID        string
}
