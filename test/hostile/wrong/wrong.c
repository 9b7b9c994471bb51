/*
 * A launcher that starts a command in a container as a good one does, except for one mistake: what the attackers
 * of test/hostile must be able to use, or they would not show anything.
 *
 *   wrong MISTAKE PID DIRECTORY CAPABILITIES COMMAND [ARGUMENT...]
 *
 * PID is the container's main process; CAPABILITIES, in hexadecimal, are those of the command. The mistakes are
 * in the table below; "none" makes none, and then every attack must fail.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/capability.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <sched.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/ptrace.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

enum {
	EARLY,       /* is in the container's pid namespace before it has left the host's other ones */
	DUMPABLE,    /* may be looked into by who has no more capabilities */
	DESCRIPTOR,  /* keeps a descriptor of the host's root open */
	INHERITABLE, /* has inheritable capabilities (CVE-2022-29162) */
	BELIEVES,    /* copies filters from a process that runs in the container */
	ATTRIBUTES,  /* writes to the container's /proc (CVE-2025-52881) */
	RUNS_TWICE,  /* takes a process of a certain name for one that has not begun */
	READS_PASSWD, /* opens a file of the container, whatever it is */
	TERMINAL,    /* opens the container's /dev/ptmx, whatever it is */
	KEEPS_ENVIRONMENT, /* hands its own environment on */
	RETRIES,     /* starts the command again when it takes long, and leaves the first one */
	GOES_ON,     /* when it cannot fork, executes the command itself, as it is */
	MISTAKES,
};

static const char *const names[MISTAKES] = {
	"early", "dumpable", "descriptor", "inheritable", "believes", "attributes", "runs-twice", "reads-passwd", "terminal", "keeps-environment",
	"retries", "goes-on",
};

static int mistake = -1;

static _Noreturn void fail(const char *what)
{
	perror(what);
	_exit(125);
}

static void give_up_capabilities(uint64_t caps)
{
	for (int c = 0; c < 64; c++)
		if (!(caps >> c & 1) && prctl(PR_CAPBSET_DROP, c, 0, 0, 0) < 0 && errno != EINVAL)
			fail("bounding set");
	struct __user_cap_header_struct header = { _LINUX_CAPABILITY_VERSION_3, 0 };
	uint64_t inheritable = mistake == INHERITABLE ? caps : 0;
	struct __user_cap_data_struct data[2] = { { caps, caps, inheritable }, { caps >> 32, caps >> 32, inheritable >> 32 } };
	if (syscall(SYS_capset, &header, data) < 0)
		fail("capset");
}

/* The filters of a process, the first only: what an engine that believes the container would copy. */
static int copy_filter(pid_t pid, struct sock_filter *filter)
{
	int status, length = -1;
	if (ptrace(PTRACE_SEIZE, pid, 0, 0) < 0)
		return -1;
	if (ptrace(PTRACE_INTERRUPT, pid, 0, 0) == 0 && waitpid(pid, &status, __WALL) == pid)
		length = ptrace(PTRACE_SECCOMP_GET_FILTER, pid, 0, filter);
	ptrace(PTRACE_DETACH, pid, 0, 0);
	return length;
}

/* The lists of processes of the container's cgroups, open: needed for mistakes about those that are frozen or full. */
static int cgroups[16], cgroup_count;

static void open_cgroups(const char *container)
{
	char path[64], line[4096], procs[8300];
	snprintf(path, sizeof path, "/proc/%s/cgroup", container);
	FILE *list = fopen(path, "re");
	if (list == NULL)
		fail("cgroups");
	while (fgets(line, sizeof line, list) != NULL && cgroup_count < 16) {
		char *controllers = strchr(line, ':'), *folder = controllers != NULL ? strchr(controllers + 1, ':') : NULL;
		if (folder == NULL)
			continue;
		*folder++ = 0;
		folder[strcspn(folder, "\n")] = 0;
		if (strncmp(++controllers, "name=", 5) == 0)
			controllers += 5;
		snprintf(procs, sizeof procs, "/sys/fs/cgroup/%s%s/cgroup.procs", controllers, folder);
		cgroups[cgroup_count] = open(procs, O_WRONLY | O_CLOEXEC);
		cgroup_count += cgroups[cgroup_count] >= 0;
	}
	fclose(list);
}

static void join_cgroups(void)
{
	for (int i = 0; i < cgroup_count; i++)
		if (write(cgroups[i], "0", 1) != 1)
			fail("cgroup.procs");
}

/* Waits for a child for so long; 0 if it still runs then. */
static pid_t wait_a_while(pid_t child, int *status, int milliseconds)
{
	pid_t ended = 0;
	for (int i = 0; i < milliseconds && ended == 0; i++) {
		ended = waitpid(child, status, WNOHANG);
		usleep(1000);
	}
	return ended;
}

int main(int argc, char **argv)
{
	if (argc == 2 && strcmp(argv[1], "reference") == 0) /* see BELIEVES */
		return usleep(20000);
	if (argc < 6)
		return 125;
	for (int i = 0; i < MISTAKES; i++)
		if (strcmp(argv[1], names[i]) == 0)
			mistake = i;
	if (syscall(SYS_close_range, 3, ~0U, 0) < 0)
		fail("close_range");
	int pidfd = syscall(SYS_pidfd_open, atoi(argv[2]), 0);
	if (pidfd < 0)
		fail("pidfd_open");
	const char *directory = argv[3];
	uint64_t caps = strtoull(argv[4], NULL, 16);
	char **command = argv + 5;
	char *inside[] = { "INSIDE=1", NULL };
	int all = CLONE_NEWNS | CLONE_NEWNET | CLONE_NEWIPC | CLONE_NEWUTS | CLONE_NEWPID;

	if (mistake != DUMPABLE && prctl(PR_SET_DUMPABLE, 0, 0, 0, 0) < 0)
		fail("dumpable");
	int proc = open("/proc", O_PATH | O_DIRECTORY | O_CLOEXEC); /* of this process's own pid namespace */
	int self = open("/proc/self/exe", O_RDONLY | O_CLOEXEC);
	if (mistake == DESCRIPTOR || mistake == DUMPABLE) {
		int root = open("/", O_PATH | O_DIRECTORY | O_CLOEXEC);
		if (root < 0 || dup3(root, 7, mistake == DUMPABLE ? O_CLOEXEC : 0) < 0)
			fail("descriptor");
	}
	if (mistake == GOES_ON || mistake == RETRIES)
		open_cgroups(argv[2]);
	if (mistake == GOES_ON)
		join_cgroups();
	if (setns(pidfd, mistake == EARLY ? CLONE_NEWPID : all) < 0)
		fail("setns");

	struct sock_filter filter[BPF_MAXINSNS];
	int length = -1;
	if (mistake == BELIEVES) {
		pid_t reference = fork();
		if (reference == 0) {
			give_up_capabilities(caps);
			char *probe[] = { "reference", "reference", NULL };
			fexecve(self, probe, inside);
			fail("fexecve");
		}
		usleep(10000); /* it has begun by now */
		length = copy_filter(reference, filter);
		waitpid(reference, NULL, 0);
	}
	for (int again = 1, retried = 0; again;) {
		again = 0;
		pid_t child = fork();
		if (child < 0 && mistake == GOES_ON)
			execve(command[0], command, inside);
		if (child < 0)
			fail("fork");
		if (child > 0) {
			siginfo_t end;
			int status;
			if (mistake == RETRIES) {
				again = !retried && wait_a_while(child, &status, 60) == 0;
				retried = 1;
				if (again)
					continue;
				while (wait(&status) > 0)
					;
				return WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
			}
			if (waitid(P_PID, child, &end, WEXITED | WNOWAIT) < 0)
				fail("wait");
			if (mistake == RUNS_TWICE) {
				char path[64], name[64] = "";
				snprintf(path, sizeof path, "%d/comm", child);
				int comm = openat(proc, path, O_RDONLY | O_CLOEXEC);
				if (comm >= 0 && read(comm, name, sizeof name - 1) > 0)
					again = strcmp(name, "enter:[2:INIT]\n") == 0 || strcmp(name, "runc:[2:INIT]\n") == 0;
			}
			if (waitpid(child, &status, 0) < 0)
				fail("wait");
			if (!again)
				return WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
			mistake = -1;
			continue;
		}
		prctl(PR_SET_NAME, "wrong", 0, 0, 0);
		if (mistake == RETRIES) {
			usleep(30000);
			join_cgroups();
		}
		if (mistake == EARLY) {
			usleep(2000);
			if (setns(pidfd, all & ~CLONE_NEWPID) < 0)
				fail("setns");
		}
		close(pidfd);
		if (mistake == READS_PASSWD)
			close(open("/etc/passwd", O_RDONLY));
		if (mistake == TERMINAL) {
			int terminal = open("/dev/ptmx", O_RDWR | O_NOCTTY);
			if (terminal < 0 || dup2(terminal, 0) < 0)
				fail("/dev/ptmx");
			close(terminal);
		}
		if (mistake == ATTRIBUTES) {
			int attribute = open("/proc/thread-self/attr/exec", O_WRONLY | O_CLOEXEC);
			if (attribute < 0 || write(attribute, "exec profile", 12) != 12)
				fail("attribute");
		}
		if (length > 0) {
			struct sock_fprog program = { length, filter };
			if (syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER, 0, &program) < 0)
				fail("seccomp");
		}
		if (chdir(directory) < 0)
			fail("directory");
		char path[4096];
		if (mistake != DESCRIPTOR && (syscall(SYS_getcwd, path, sizeof path) < 0 || path[0] != '/')) {
			fprintf(stderr, "the directory is outside of the container\n");
			_exit(125);
		}
		give_up_capabilities(caps);
		if (mistake == DUMPABLE)
			usleep(3000);
		extern char **environ;
		execve(command[0], command, mistake == KEEPS_ENVIRONMENT ? environ : inside);
		fail("execve");
	}
}
