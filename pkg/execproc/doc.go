// Package execproc runs one process in one existing container and owns it until its end.
//
// A process is started by the container's own OCI runtime, as
//
//	runc --root R --log L --log-format json exec --process P --detach --pid-file F [--console-socket S] ID
//
// and from then on no runtime process stands in between: its streams are pipes whose other ends are
// ours, or a terminal whose master was handed to us, and it is a child of this process, which is a
// child subreaper. So bytes take one hop, the exit status comes from the kernel, and the process
// outlives a restart of the container runtime's daemon.
//
// # Who waits for whom
//
// One reaper in the process waits on pidfds, independent of all I/O; see the comment on internal/reaper.Reaper
// for how it leaves other children of this process alone. Code that shares a process with a Runner
// must not wait for any child (wait4 with -1), ignore SIGCHLD, or start children of its own with
// Setsid.
//
// # The tree of a process
//
// A client that goes away, a timeout and Kill end not just the process but all that it has started.
// Linux keeps no list of that, so it is found in /proc: children by their parent, members of the
// sessions that were begun below the process (the runtime gives the process a session of its own),
// and processes of the same cgroup that hold the process's end of one of our pipes or of our
// terminal. The search goes on until nothing new appears, with all members stopped before they are
// killed, and signals go through pidfds to processes whose start time was checked, so that a reused
// pid hurts no stranger. The container's main process is never signalled.
//
// What it cannot find is a process that did all of: have its parents end (a double fork), begin a
// session of its own whose leader has ended or that nobody else of the tree is in, and close or
// redirect all its streams; in short, a proper daemon. Such a process stays, as does one that a
// command which ended by itself has left behind on purpose: a normal end kills nobody. Orphans inside
// a container's own pid namespace become children of the container's main process, and to reap them
// is its task.
//
// A process in a paused (frozen) container takes its SIGKILL when the container is resumed.
//
// # After a crash
//
// For each process there is a record in Config.StateDir, begun before the runtime is run and completed when
// the process is known. Should this process be killed, the next Runner with the same directory ends what still
// runs, recognized by pid, start time and boot, and what the starts have come to that were under way, unless
// the policy was to keep it.
//
// # Hand-overs
//
// A program that executes its successor in the same process (docs/decisions/0006-handover.md) calls Quiesce, freezes
// each Process that a session has, and then the Runner; the successor, whose Config says so, calls Resume, ResumeProcess
// and EndUnclaimed. All commands stay children of the process. What ends in between is a zombie until it is resumed,
// and so loses no exit code; records on disk stay what they are.
//
// execve must be called by the main thread. It ends all others, and a command that has asked for a signal at its parent's
// death (PR_SET_PDEATHSIG) gets it when the thread dies whose child it is; commands that a runtime leaves are the main
// thread's. Nothing of streamshim's own that is to live may have been started with one.
package execproc
