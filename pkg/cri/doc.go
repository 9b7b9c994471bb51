// Package cri is the gRPC side of streamshim. It serves the Container Runtime Interface on a Unix socket in front
// of a runtime's own (containerd, CRI-O).
//
// Exec, ExecSync, Attach and PortForward are answered here. Every other method of every service, known or not,
// unary or streaming, is forwarded to the upstream as raw bytes with its metadata, deadline, cancellation and
// status. So a newer kubelet and a newer runtime can use features that this code does not know.
//
// What must be known about a container before a process can be started in it (OCI runtime binary, its state root,
// init pid, process spec) is requested from the upstream once and kept for the container's life; see
// workload.Container. Starting processes and dialling ports is not this package's job; see Runner and
// StreamServer, which the caller provides.
package cri
