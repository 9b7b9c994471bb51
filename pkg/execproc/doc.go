// Package execproc starts one process in an existing container and owns it until it ends.
//
// The container's own OCI runtime starts the process, as
//
//	runc --root R --log L --log-format json exec --process P --detach --pid-file F [--console-socket S] ID
//
// The runtime then exits and nothing stands between us and the process. Its streams are pipes whose other ends we
// hold, or a terminal whose master the runtime has sent us. It is our child, because this process is a child
// subreaper. So bytes take one hop, the exit status comes from the kernel, and the process survives a restart of
// the container runtime's daemon.
//
// # Waiting
//
// One reaper waits on pidfds, independently of all I/O. The comment on internal/reaper.Reaper explains how it
// leaves this process's other children alone. Code that shares a process with a Runner must not wait for arbitrary
// children (wait4 with -1), ignore SIGCHLD, or start children of its own with Setsid.
//
// # The process tree
//
// A lost client, a timeout and Kill end the process together with everything that it has started. Linux keeps no
// list of these processes, so they are found in /proc: children by their parent, members of sessions that began
// below the process (the runtime gives the process a session of its own), and processes in the same cgroup that
// hold the far end of one of our pipes or of our terminal. All members are stopped before they are killed, and the
// search is repeated until nothing new appears. Signals go through pidfds to processes whose start time was
// checked, so a reused pid cannot hit a stranger. The container's main process is never signalled.
//
// The search misses a proper daemon: a process whose parents have ended (a double fork), which lives in a session
// whose leader has ended or that no other member is in, and which has closed or redirected all its streams. Such a
// process stays. So does whatever a command left behind when it ended by itself: a normal end kills nothing.
// Orphans inside a container's own pid namespace become children of the container's main process, which must reap
// them.
//
// A process in a paused (frozen) container receives its SIGKILL when the container is resumed.
//
// # After a crash
//
// Each process has a recovery record in Config.StateDir. It is begun before the runtime is run and completed when
// the process is known. If this process is killed, the next Runner with the same directory ends what still runs,
// including whatever came of interrupted starts, unless the policy was to keep it. It recognizes processes by pid,
// start time and boot.
//
// # Hand-over
//
// A program that executes its successor in the same process (docs/decisions/0006-handover.md) calls Quiesce, then
// freezes each session's Process, then the Runner. The successor sets Config.Successor and calls Resume,
// ResumeProcess and EndUnclaimed. Commands stay children of the process throughout. One that ends in between
// remains a zombie until it is resumed, so no exit code is lost. Recovery records are not touched.
//
// The main thread must call execve, which ends all other threads. A command that asked for a signal at its
// parent's death (PR_SET_PDEATHSIG) gets it when the thread dies whose child it is. Commands that a runtime has
// left to us are the main thread's children. A process of streamshim's own that must survive must not have been
// started with PR_SET_PDEATHSIG.
package execproc
