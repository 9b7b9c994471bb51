/* Kinship that no shell makes: "sibling" begins a process whose parent is the command's own (CLONE_PARENT),
 * "thread" goes on in a second thread after the first has ended, so that the process looks like a zombie.
 * Both sleep for argv[2] seconds. */
#define _GNU_SOURCE
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

static void *rest(void *seconds) {
	puts("ready");
	fflush(stdout);
	sleep(atoi(seconds));
	exit(0);
}

int main(int argc, char **argv) {
	pthread_t thread;
	if (argc != 3)
		return 2;
	if (strcmp(argv[1], "sibling") == 0) {
		if (syscall(SYS_clone, CLONE_PARENT | SIGCHLD, NULL, NULL, NULL, NULL) == 0) {
			close(0); /* no stream leads to it */
			close(1);
			close(2);
			execlp("sleep", "sleep", argv[2], NULL);
		}
		rest(argv[2]);
	}
	pthread_create(&thread, NULL, rest, argv[2]);
	pthread_exit(NULL);
}
