// Package cri is the gRPC side of streamshim: it serves the Container Runtime Interface on a Unix
// socket in front of a runtime's own (containerd, CRI-O).
//
// Exec, ExecSync, Attach and PortForward are answered here. Every other method of every service,
// known or not, unary or streaming, is forwarded to the upstream as raw bytes with its metadata,
// deadline, cancellation and status, so that a newer kubelet and a newer runtime can talk about
// things this code has never heard of.
//
// What has to be known about a container before a process can be started in it (OCI runtime binary,
// its state root, init pid, process spec) is asked of the upstream once and kept for the container's
// life; see Container. How processes are started and ports are dialled is not this package's
// business: see Engine, which the caller provides.
package cri
