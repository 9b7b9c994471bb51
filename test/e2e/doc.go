// Package e2e drives real kubectl through a real API server and kubelet against two nodes side by
// side: on "bare" the kubelet talks to containerd, on "shim" to streamshim in front of the same
// containerd. Every check runs on both. On shim it must pass; on bare it is only reported, so that a
// run makes a table of what streamshim changes.
//
// The tests run when STREAMSHIM_E2E is "shim" (without the bare node), "quick" or "full" (every setting
// of the feature gate, ten minutes of probes), and write the table to the file that
// STREAMSHIM_E2E_REPORT names, if any. make e2e sets both.
//
//	checks_test.go    exec, attach, cp, logs
//	forward_test.go   port-forward
//	nodes_test.go     probes, restarts, kinds of pods
//	e2e_test.go       which checks run where, and in which order
//	target_test.go    what the checks are made of: kubectl, terminals, pods, processes
//	report_test.go    the table
package e2e
