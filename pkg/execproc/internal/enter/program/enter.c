/*
 * streamshim-enter starts one command in an existing container. It is what runs between the fork in
 * streamshim and the command's own execve, and does there what runc's setns init does, in the same
 * order (opencontainers/runc, libcontainer/setns_init_linux.go and nsenter/nsexec.c), but without a Go
 * runtime, a JSON document or a seccomp compiler: the caller has worked all of that out.
 *
 * It decides nothing. What it is told stands in the request, whose layout is that of package enter
 * (request.go). Anything that does not go as told ends it before the command runs, with a record that
 * says which step failed; the caller then has the command started by the container's own runtime.
 *
 * It is executed out of a sealed memfd, so that nothing in the container can write to the program
 * through /proc/PID/exe (CVE-2019-5736), is not dumpable before it joins anything, so that nothing in the
 * container without CAP_SYS_PTRACE on the host's user namespace can look into it, and holds no
 * descriptor of the host when the command is executed (CVE-2024-21626).
 *
 * Called as "streamshim-enter probe" it is instead the command that package execproc runs to
 * compare what the two ways of starting a process come to: see probe().
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/capability.h>
#include <linux/filter.h>
#include <linux/keyctl.h>
#include <linux/sched.h>
#include <sched.h>
#include <linux/seccomp.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#ifndef PR_CAP_AMBIENT
#define PR_CAP_AMBIENT 47
#define PR_CAP_AMBIENT_RAISE 2
#define PR_CAP_AMBIENT_CLEAR_ALL 4
#endif

/* Descriptors, as the caller passes them. The container sees none of them. */
enum { REQUEST_FD = 3, RESULT_FD = 4, CONTAINER_FD = 5, PROGRAM_FD = 6, CGROUP_FD = 7 };

enum { MAGIC = 0x65747373, VERSION = 1 };

enum {
	NO_NEW_PRIVILEGES = 1 << 0,
	SESSION_KEYRING = 1 << 1,  /* join the one that is named */
	SET_UMASK = 1 << 2,
	SET_OOM_SCORE = 1 << 3,
	FIND_HOME = 1 << 4,        /* add HOME from the container's /etc/passwd */
	SET_CAPABILITIES = 1 << 5,
	EXECUTE_DESCRIPTOR = 1 << 6, /* PROGRAM_FD, not the first argument */
	BEGIN_IN_CGROUP = 1 << 7,  /* CGROUP_FD, the directory of a version 2 cgroup */
};

/* The fixed part of a request. Behind it, in this order, each part aligned to 8 bytes: limits, filters
 * (each a struct filter_header and its instructions), groups, strings. */
struct request {
	uint32_t magic, version, size, flags;
	uint32_t namespaces; /* CLONE_NEW* to be joined */
	uint32_t uid, gid, umask;
	int32_t oom_score;
	uint32_t last_capability;
	uint64_t bounding, effective, permitted, inheritable, ambient;
	uint32_t limits, filters, groups, cgroups, args, env; /* how many of each */
};

struct limit {
	uint32_t resource, unused;
	uint64_t soft, hard;
};

struct filter_header {
	uint32_t flags, instructions;
};

/* What the caller is told. Shorter than PIPE_BUF, so that records never mix. */
struct record {
	uint32_t kind; /* 1: value is the command's pid; 2: value is an errno, step says of what */
	int32_t value;
	char step[24];
};

static _Noreturn void fail(const char *step)
{
	struct record r = { .kind = 2, .value = errno };
	strncpy(r.step, step, sizeof r.step - 1);
	/* Nobody is left to tell if this fails; the caller takes the missing pid for a failure as well. */
	if (write(RESULT_FD, &r, sizeof r) < 0)
		_exit(2);
	_exit(1);
}

/* The request as it is read: a cursor over the mapping. */
static char *next, *end;

static void *take(size_t size)
{
	next = (char *)(((uintptr_t)next + 7) & ~(uintptr_t)7);
	if (next > end || size > (size_t)(end - next)) {
		errno = EBADMSG;
		fail("read request");
	}
	void *taken = next;
	next += size;
	return taken;
}

static char *take_string(void)
{
	char *found = next, *nul = memchr(next, 0, end - next);
	if (nul == NULL) {
		errno = EBADMSG;
		fail("read request");
	}
	next = nul + 1;
	return found;
}

static const struct request *read_request(void)
{
	struct stat stat;
	if (fstat(REQUEST_FD, &stat) < 0)
		fail("stat request");
	if (stat.st_size < (off_t)sizeof(struct request)) {
		errno = EBADMSG;
		fail("read request");
	}
	next = mmap(NULL, stat.st_size, PROT_READ | PROT_WRITE, MAP_PRIVATE, REQUEST_FD, 0);
	if (next == MAP_FAILED)
		fail("map request");
	end = next + stat.st_size;
	const struct request *r = take(sizeof *r);
	if (r->magic != MAGIC || r->version != VERSION || r->size != stat.st_size) {
		errno = EBADMSG;
		fail("read request");
	}
	close(REQUEST_FD);
	return r;
}

static void write_file(const char *path, const char *text, const char *step)
{
	int fd = open(path, O_WRONLY | O_CLOEXEC);
	if (fd < 0)
		fail(step);
	ssize_t length = strlen(text);
	if (write(fd, text, length) != length)
		fail(step);
	close(fd);
}

static void join(int flags, const char *step)
{
	if (flags != 0 && setns(CONTAINER_FD, flags) < 0)
		fail(step);
}

static void install_filters(const struct request *r, struct filter_header *const *filters)
{
	for (uint32_t i = 0; i < r->filters; i++) {
		struct sock_fprog program = { filters[i]->instructions, (struct sock_filter *)(filters[i] + 1) };
		if (syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER, filters[i]->flags, &program) != 0)
			fail("install seccomp filter");
	}
}

static void drop_bounding(const struct request *r)
{
	for (uint32_t c = 0; c <= r->last_capability; c++)
		if (!(r->bounding >> c & 1) && prctl(PR_CAPBSET_DROP, c, 0, 0, 0) < 0)
			fail("drop from bounding set");
}

static void set_capabilities(const struct request *r)
{
	struct __user_cap_header_struct header = { _LINUX_CAPABILITY_VERSION_3, 0 };
	struct __user_cap_data_struct data[2] = {
		{ r->effective, r->permitted, r->inheritable },
		{ r->effective >> 32, r->permitted >> 32, r->inheritable >> 32 },
	};
	if (syscall(SYS_capset, &header, data) < 0)
		fail("set capabilities");
	if (prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0) < 0)
		fail("clear ambient set");
	for (uint32_t c = 0; c <= r->last_capability; c++)
		if (r->ambient >> c & 1)
			prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_RAISE, c, 0, 0); /* runc goes on too */
}

/* Which user a line of passwd(5) is about: 0 where it does not say, as runc's parser has it. */
static long user_of(char *fields)
{
	for (int i = 0; i < 2; i++) {
		fields = strchr(fields, ':');
		if (fields == NULL)
			return 0;
		fields++;
	}
	char *rest;
	long uid = strtol(fields, &rest, 10);
	return rest != fields && (*rest == ':' || *rest == 0) ? uid : 0;
}

/* HOME of the user by the container's /etc/passwd, "/" when it is not there. */
static const char *find_home(uint32_t uid)
{
	static char line[64 << 10], home[sizeof line + 5];
	FILE *file = fopen("/etc/passwd", "re");
	strcpy(home, "HOME=/");
	if (file == NULL) {
		if (errno != ENOENT) {
			fail("open /etc/passwd");
		}
		return home;
	}
	while (fgets(line, sizeof line, file) != NULL) {
		size_t length = strlen(line);
		if (length == sizeof line - 1) {
			errno = E2BIG;
			fail("read /etc/passwd");
		}
		while (length > 0 && strchr(" \t\r\n\v\f", line[length - 1]) != NULL)
			line[--length] = 0;
		char *start = line + strspn(line, " \t\r\v\f");
		if (*start == 0 || user_of(start) != (long)uid)
			continue;
		char *field = start;
		for (int i = 0; field != NULL && i < 5; i++) {
			field = strchr(field, ':');
			if (field != NULL)
				field++;
		}
		if (field == NULL)
			field = "";
		else if (strchr(field, ':') != NULL)
			*strchr(field, ':') = 0;
		strcpy(home + 5, field);
		break;
	}
	if (ferror(file))
		fail("read /etc/passwd");
	fclose(file);
	return home;
}

/* A working directory outside of the container's root begins with "(unreachable)" (CVE-2024-21626). */
static void verify_directory(void)
{
	char path[4096];
	if (syscall(SYS_getcwd, path, sizeof path) < 0)
		fail("verify directory");
	if (path[0] != '/') {
		errno = ENOENT;
		fail("verify directory");
	}
}

static void execute(char **args, char **env)
{
	if (strchr(args[0], '/') != NULL) {
		execve(args[0], args, env);
		fail("execute command");
	}
	char *path = NULL;
	for (char **e = env; *e != NULL; e++)
		if (strncmp(*e, "PATH=", 5) == 0)
			path = *e + 5;
	static char file[8192];
	while (path != NULL && *path != 0) {
		size_t length = strcspn(path, ":");
		if (path[0] != '/' || length + strlen(args[0]) + 2 > sizeof file) {
			errno = EINVAL; /* where to look is then a matter of taste */
			fail("search command");
		}
		memcpy(file, path, length);
		file[length] = '/';
		strcpy(file + length + 1, args[0]);
		execve(file, args, env);
		if (errno != ENOENT && errno != ENOTDIR && errno != EACCES)
			fail("execute command");
		path += length;
		path += *path == ':';
	}
	errno = ENOENT;
	fail("search command");
}

/*
 * The command that is started both ways and compared. It stays until its stdin ends, so that it can be
 * looked at, and says on stdout what cannot be seen from outside: its session keyring, where asked,
 * which is where nothing forbids the question. "type;uid;gid;permissions;name", keyctl(2).
 */
static int probe(int keyring)
{
	char text[256] = "ready ";
	size_t length = strlen(text);
	if (keyring) {
		long described = syscall(SYS_keyctl, KEYCTL_DESCRIBE, KEY_SPEC_SESSION_KEYRING, text + length, sizeof text - length - 1);
		length += described > 0 && described < (long)(sizeof text - length) ? described - 1 : 0;
	}
	text[length++] = '\n';
	if (write(1, text, length) < 0)
		return 1;
	while (read(0, text, sizeof text) > 0)
		;
	return 0;
}

int main(int argc, char **argv)
{
	if (argc > 1 && strncmp(argv[1], "probe", 5) == 0)
		return probe(strcmp(argv[1], "probe-keyring") == 0);
	/* The caller is a Go program, whose children get default signals and an empty mask. But it may itself
	 * have inherited descriptors that are not closed by exec. */
	for (int fd = REQUEST_FD; fd <= CGROUP_FD; fd++)
		fcntl(fd, F_SETFD, FD_CLOEXEC);
	if (syscall(SYS_close_range, CGROUP_FD + 1, ~0U, 0) < 0)
		fail("close descriptors");
	const struct request *r = read_request();
	const struct limit *limits = take(r->limits * sizeof *limits);
	struct filter_header **filters = calloc(r->filters + 1, sizeof *filters);
	for (uint32_t i = 0; filters != NULL && i < r->filters; i++) {
		filters[i] = take(sizeof **filters);
		take(filters[i]->instructions * sizeof(struct sock_filter));
	}
	const gid_t *groups = take(r->groups * sizeof *groups);
	take(0);
	const char *directory = take_string(), *keyring = take_string(), *apparmor = take_string();

	/* The host's side of it, while we are still there. */
	if (r->flags & SET_OOM_SCORE) {
		char score[16];
		snprintf(score, sizeof score, "%d", r->oom_score);
		write_file("/proc/self/oom_score_adj", score, "set oom_score_adj");
	}
	if (prctl(PR_SET_DUMPABLE, 0, 0, 0, 0) < 0)
		fail("become undumpable");
	const char *cgroups = next;
	for (uint32_t i = 0; i < r->cgroups; i++)
		take_string();
	const char *cgroups_end = next;
	char **args = calloc(r->args + 1, sizeof *args), **env = calloc(r->env + 2, sizeof *env);
	if (filters == NULL || args == NULL || env == NULL)
		fail("allocate");
	for (uint32_t i = 0; i < r->args; i++)
		args[i] = take_string();
	for (uint32_t i = 0; i < r->env; i++)
		env[i] = take_string();
	if (r->args == 0) {
		errno = EBADMSG;
		fail("read request");
	}

	/* A pid namespace is joined by the next child. CLONE_PARENT: the command is to be streamshim's
	 * child, not ours. This process stays out of the container's cgroups: in one that is being paused it
	 * could not end. */
	join(r->namespaces & CLONE_NEWPID, "join pid namespace");
	struct clone_args fork = { .flags = CLONE_PARENT }; /* whose exit signal is ours */
	if (r->flags & BEGIN_IN_CGROUP) {
		fork.flags |= CLONE_INTO_CGROUP;
		fork.cgroup = CGROUP_FD;
	}
	int go[2];
	if (pipe2(go, O_CLOEXEC) < 0)
		fail("make pipe");
	pid_t child = syscall(SYS_clone3, &fork, sizeof fork);
	if (child < 0)
		fail("fork");
	if (child > 0) {
		struct record started = { .kind = 1, .value = child };
		_exit(write(RESULT_FD, &started, sizeof started) == sizeof started && write(go[1], "g", 1) == 1 ? 0 : 3);
	}

	/* Not a step before the caller can know of this process: it might not want it any more. */
	char told;
	close(go[1]);
	if (read(go[0], &told, 1) != 1)
		_exit(4);
	/* Nothing of the host may be open when paths are resolved in the container, the command's own among them:
	 * /proc/self/fd/N/../.. of a folder leads out of it, and close-on-exec comes after that (CVE-2024-21626).
	 * What stays is the result pipe and, until the namespaces are joined, the container's pidfd. */
	close(go[0]);
	close(CGROUP_FD);
	if (!(r->flags & EXECUTE_DESCRIPTOR))
		close(PROGRAM_FD);

	/* By this name streamshim knows a process that ended before it became the command. */
	prctl(PR_SET_NAME, "enter:[2:INIT]", 0, 0, 0);
	if (setsid() < 0)
		fail("begin session");
	/* Version 1 cgroups, by their tasks file: a process that moves just its own thread need not wait for
	 * all other forks and exits on the machine, as with cgroup.procs. */
	for (const char *path = cgroups; path != cgroups_end; path += strlen(path) + 1)
		write_file(path, "0", "join cgroup");
	/* All CPUs that there may ever be; the kernel takes those of the cpuset. runc, too, goes on if it fails. */
	static unsigned char all[64 * 1024 / 8];
	memset(all, 0xff, sizeof all);
	syscall(SYS_sched_setaffinity, 0, sizeof all, all);
	int profile = -1;
	if (apparmor[0] != 0) { /* of the host's /proc: the container's may be anything */
		profile = open("/proc/thread-self/attr/apparmor/exec", O_WRONLY | O_CLOEXEC);
		if (profile < 0)
			profile = open("/proc/thread-self/attr/exec", O_WRONLY | O_CLOEXEC);
		if (profile < 0)
			fail("open AppArmor attribute");
	}
	/* Before the user namespace, in which raising a limit is not allowed any more. */
	for (uint32_t i = 0; i < r->limits; i++) {
		struct rlimit limit = { limits[i].soft, limits[i].hard };
		if (setrlimit(limits[i].resource, &limit) < 0)
			fail("set limit");
	}
	join(r->namespaces & ~(CLONE_NEWPID | CLONE_NEWUSER), "join namespaces");
	join(r->namespaces & CLONE_NEWUSER, "join user namespace");
	close(CONTAINER_FD);
	if (syscall(SYS_setresuid, 0, 0, 0) < 0 || syscall(SYS_setresgid, 0, 0, 0) < 0 || syscall(SYS_setgroups, 0, NULL) < 0)
		fail("become root");

	if (r->flags & SESSION_KEYRING && syscall(SYS_keyctl, KEYCTL_JOIN_SESSION_KEYRING, keyring) < 0)
		fail("join session keyring");
	if (r->flags & NO_NEW_PRIVILEGES && prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) < 0)
		fail("set no_new_privs");
	if (r->flags & SET_UMASK)
		umask(r->umask);
	/* Without no_new_privs a filter takes CAP_SYS_ADMIN, which is given up below; with it, the later the
	 * better, as the filter may forbid what comes next. */
	if (!(r->flags & NO_NEW_PRIVILEGES))
		install_filters(r, filters);

	/* First as root, then as the user: either may be the one who may. */
	int entered = chdir(directory) == 0;
	if (!entered && errno != EACCES && errno != EPERM)
		fail("change directory");
	if (r->flags & FIND_HOME)
		env[r->env] = (char *)find_home(r->uid);
	if (r->flags & SET_CAPABILITIES)
		drop_bounding(r);
	if (prctl(PR_SET_KEEPCAPS, 1, 0, 0, 0) < 0)
		fail("keep capabilities");
	if (syscall(SYS_setgroups, (size_t)r->groups, groups) < 0)
		fail("set groups");
	if (syscall(SYS_setgid, r->gid) < 0)
		fail("set gid");
	if (syscall(SYS_setuid, r->uid) < 0)
		fail("set uid");
	if (!entered && chdir(directory) < 0)
		fail("change directory");
	verify_directory();
	if (prctl(PR_SET_KEEPCAPS, 0, 0, 0, 0) < 0)
		fail("keep no capabilities");
	if (r->flags & SET_CAPABILITIES)
		set_capabilities(r);
	if (profile >= 0) {
		char text[4096];
		int length = snprintf(text, sizeof text, "exec %s", apparmor);
		if (length >= (int)sizeof text || write(profile, text, length) != length)
			fail("set AppArmor profile");
		close(profile);
	}
	if (r->flags & NO_NEW_PRIVILEGES)
		install_filters(r, filters);
	if (r->flags & EXECUTE_DESCRIPTOR) {
		syscall(SYS_execveat, PROGRAM_FD, "", args, env, AT_EMPTY_PATH);
		fail("execute descriptor");
	}
	execute(args, env);
}
