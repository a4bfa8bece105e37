/*
 * Copyright (c) 2026 The authors. BSD-2-Clause licence; see LICENSE.
 *
 * faults: stands between a program and the kernel (LD_PRELOAD).  It counts
 * the calls that touch certain directories, or a socket, makes the n-th one
 * fail, be cut short or be the process's last, and writes down what has
 * become of files and names, so that faults.py can tell what a power cut
 * would have left.  It sees what SQLite does as well as what Python does.
 *
 * Shared with faults.py is a page of memory, `struct state`, in the file
 * FAULTS_STATE, and the log FAULTS_LOG.  Calls are made as system calls, the
 * *at() ones where there is a choice.  What another thread does meanwhile is
 * logged in the order in which it ended; an fsync when it begins, since what
 * happens during it is not promised to anybody.
 */

#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

/* What is done at the n-th call; FOREVER: and at all later ones. */
enum { PASS, KILL, AFTER, TORN, FAIL, LATE, HALF, SHORT, FOREVER = 256 };

/* Classes of calls. */
enum { WRITES = 1, READS = 2, NETWORK = 4, ASIDE = 8 };

struct state {
	uint64_t count;		/* calls so far */
	uint64_t at;		/* the n-th; 0 none */
	uint32_t what;		/* of the above */
	uint32_t error;		/* errno of those that fail */
	uint32_t mask;		/* classes that count; 0 nothing does */
	uint32_t hits;		/* calls to which something was done */
	uint32_t logging;	/* 1: write the log */
	char under[2000];	/* directories, each followed by a newline */
	char only[96];		/* LETTERS PART: these calls count alone, as in
				   the log, on paths with PART; "" all */
};

struct record {
	char op, unused[3];
	uint16_t length1, length2;
	uint64_t ino;
	int64_t offset;
	uint32_t length;
} __attribute__((packed));

static struct state *state;
static int logfd = -1;
static int muted;		/* this process is none of those watched */

void
faults_mute(int on)
{

	muted = on;
}

__attribute__((constructor)) static void
begin(void)
{
	const char *path = getenv("FAULTS_STATE"), *log = getenv("FAULTS_LOG");
	int fd;

	if (path == NULL ||
	    (fd = syscall(SYS_openat, AT_FDCWD, path, O_RDWR | O_CLOEXEC)) < 0)
		return;
	state = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	syscall(SYS_close, fd);
	if (state == MAP_FAILED)
		state = NULL;
	if (log == NULL || (fd = syscall(SYS_openat, AT_FDCWD, log,
	    O_WRONLY | O_APPEND | O_CLOEXEC)) < 0)
		return;
	/* Out of the way of programs that count descriptors. */
	logfd = fcntl(fd, F_DUPFD_CLOEXEC, 700);
	syscall(SYS_close, fd);
}

static int
is_under(const char *path)
{
	const char *p, *end;

	for (p = state->under; (end = strchr(p, '\n')) != NULL; p = end + 1)
		if (strncmp(path, p, end - p) == 0 &&
		    (path[end - p] == '/' || path[end - p] == '\0'))
			return (1);
	return (0);
}

/* The path of an open file, 0 if it is none of ours. */
static int
fd_path(int fd, char *path)
{
	char name[40];
	ssize_t n;

	if (state == NULL || muted || (state->mask == 0 && !state->logging))
		return (0);
	snprintf(name, sizeof(name), "/proc/self/fd/%d", fd);
	n = syscall(SYS_readlinkat, AT_FDCWD, name, path, PATH_MAX - 1);
	if (n <= 0)
		return (0);
	path[n] = '\0';
	return (path[0] == '/' && is_under(path));
}

/* The path of a name, 0 if it is none of ours. */
static int
name_path(int dir, const char *name, char *path)
{
	char proc[40];
	ssize_t n = 0;

	if (state == NULL || name == NULL || muted ||
	    (state->mask == 0 && !state->logging))
		return (0);
	if (name[0] != '/') {
		snprintf(proc, sizeof(proc), "/proc/self/fd/%d", dir);
		n = syscall(SYS_readlinkat, AT_FDCWD,
		    dir == AT_FDCWD ? "/proc/self/cwd" : proc, path, PATH_MAX);
		if (n <= 0 || n + strlen(name) + 2 > PATH_MAX)
			return (0);
		path[n++] = '/';
	} else if (strlen(name) >= PATH_MAX)
		return (0);
	strcpy(path + n, name);
	return (is_under(path));
}

static int
is_socket(int fd)
{
	struct stat st;

	return (state != NULL && !muted && (state->mask & NETWORK) != 0 &&
	    fstat(fd, &st) == 0 && S_ISSOCK(st.st_mode));
}

/* Is this call one of those named? */
static int
is_named(char op, const char *path)
{
	const char *space = strchr(state->only, ' ');

	return (space == NULL ||
	    (memchr(state->only, op, space - state->only) != NULL &&
	    strstr(path, space + 1) != NULL));
}

/* What is to be done to this call, `op` being its letter in the log. */
static int
due(int ours, uint32_t class, char op, const char *path)
{
	uint64_t n;

	if (!ours || (state->mask & class) == 0 || !is_named(op, path))
		return (PASS);
	n = __sync_add_and_fetch(&state->count, 1);
	if (state->at == 0 || n < state->at ||
	    (n > state->at && (state->what & FOREVER) == 0))
		return (PASS);
	__sync_add_and_fetch(&state->hits, 1);
	if ((state->what & 255) == KILL)
		kill(getpid(), SIGKILL);
	return (state->what & 255);
}

static int
halved(int what)
{
	return (what == TORN || what == HALF || what == SHORT);
}

/* What a call comes to in the end. */
static long
end(int what, long result)
{
	if (what == AFTER || what == TORN)
		kill(getpid(), SIGKILL);
	if (what == FAIL || what == LATE || what == HALF) {
		errno = state->error;
		return (-1);
	}
	return (result);
}

static void
note(char op, const char *path, const char *path2, uint64_t ino,
    int64_t offset, const void *data, size_t length)
{
	struct record r;
	struct iovec v[4];
	int saved = errno;

	if (logfd < 0 || !state->logging)
		return;
	memset(&r, 0, sizeof(r));
	r.op = op;
	r.length1 = strlen(path);
	r.length2 = path2 ? strlen(path2) : 0;
	r.ino = ino;
	r.offset = offset;
	r.length = length;
	v[0].iov_base = &r;
	v[0].iov_len = sizeof(r);
	v[1].iov_base = (void *)path;
	v[1].iov_len = r.length1;
	v[2].iov_base = (void *)path2;
	v[2].iov_len = r.length2;
	v[3].iov_base = (void *)data;
	v[3].iov_len = length;
	if (syscall(SYS_writev, logfd, v, 4) < 0)
		abort();
	errno = saved;
}

static uint64_t
fd_ino(int fd)
{
	struct stat st;

	return (fstat(fd, &st) == 0 ? st.st_ino : 0);
}

/* Names. */

static int
do_open(int dir, const char *name, int flags, mode_t mode)
{
	char path[PATH_MAX];
	int ours = name_path(dir, name, path), what, fd;

	what = due(ours, flags & (O_CREAT | O_TRUNC) ? WRITES : READS, 'o',
	    path);
	if (what == FAIL)
		return (end(what, -1));
	fd = syscall(SYS_openat, dir, name, flags, mode);
	if (ours && fd >= 0 && (flags & (O_CREAT | O_TRUNC)))
		note(flags & O_TRUNC ? 'O' : 'o', path, NULL, fd_ino(fd), 0,
		    NULL, 0);
	if (fd >= 0 && (what == LATE || what == HALF))
		syscall(SYS_close, fd);
	return (end(what, fd));
}

#define OPEN(symbol, dir, first)					\
int symbol(first const char *name, int flags, ...)			\
{									\
	mode_t mode = 0;						\
	va_list ap;							\
	if (flags & (O_CREAT | __O_TMPFILE)) {				\
		va_start(ap, flags);					\
		mode = va_arg(ap, mode_t);				\
		va_end(ap);						\
	}								\
	return (do_open(dir, name, flags, mode));			\
}
#define NOTHING
#define DIR_FIRST int dir,
OPEN(open, AT_FDCWD, NOTHING)
OPEN(open64, AT_FDCWD, NOTHING)
OPEN(openat, dir, DIR_FIRST)
OPEN(openat64, dir, DIR_FIRST)

int
linkat(int dir1, const char *name1, int dir2, const char *name2, int flags)
{
	char one[PATH_MAX], two[PATH_MAX];
	int ours = name_path(dir2, name2, two);
	int what = due(ours, WRITES, 'l', two);
	int known = name_path(dir1, name1, one), r;

	if (what == FAIL)
		return (end(what, -1));
	r = syscall(SYS_linkat, dir1, name1, dir2, name2, flags);
	if (ours && known && r == 0)
		note('l', one, two, 0, 0, NULL, 0);
	return (end(what, r));
}

int
link(const char *name1, const char *name2)
{
	return (linkat(AT_FDCWD, name1, AT_FDCWD, name2, 0));
}

int
renameat(int dir1, const char *name1, int dir2, const char *name2)
{
	char one[PATH_MAX], two[PATH_MAX];
	int ours = name_path(dir2, name2, two);
	int what = due(ours, WRITES, 'r', two);
	int known = name_path(dir1, name1, one), r;

	if (what == FAIL)
		return (end(what, -1));
	r = syscall(SYS_renameat2, dir1, name1, dir2, name2, 0);
	if (ours && known && r == 0)
		note('r', one, two, 0, 0, NULL, 0);
	return (end(what, r));
}

int
rename(const char *name1, const char *name2)
{
	return (renameat(AT_FDCWD, name1, AT_FDCWD, name2));
}

int
unlinkat(int dir, const char *name, int flags)
{
	char path[PATH_MAX];
	int ours = name_path(dir, name, path);
	int what = due(ours, WRITES, 'u', path), r;

	if (what == FAIL)
		return (end(what, -1));
	r = syscall(SYS_unlinkat, dir, name, flags);
	if (ours && r == 0)
		note('u', path, NULL, 0, 0, NULL, 0);
	return (end(what, r));
}

int
unlink(const char *name)
{
	return (unlinkat(AT_FDCWD, name, 0));
}

int
rmdir(const char *name)
{
	return (unlinkat(AT_FDCWD, name, AT_REMOVEDIR));
}

int
mkdirat(int dir, const char *name, mode_t mode)
{
	char path[PATH_MAX];
	struct stat st;
	int ours = name_path(dir, name, path);
	int what = due(ours, WRITES, 'm', path), r;

	if (what == FAIL)
		return (end(what, -1));
	r = syscall(SYS_mkdirat, dir, name, mode);
	if (ours && r == 0 && lstat(path, &st) == 0)
		note('m', path, NULL, st.st_ino, 0, NULL, 0);
	return (end(what, r));
}

int
mkdir(const char *name, mode_t mode)
{
	return (mkdirat(AT_FDCWD, name, mode));
}

int
symlinkat(const char *target, int dir, const char *name)
{
	char path[PATH_MAX];
	int ours = name_path(dir, name, path);
	int what = due(ours, WRITES, 's', path), r;

	if (what == FAIL)
		return (end(what, -1));
	r = syscall(SYS_symlinkat, target, dir, name);
	if (ours && r == 0)
		note('s', path, target, 0, 0, NULL, 0);
	return (end(what, r));
}

int
symlink(const char *target, const char *name)
{
	return (symlinkat(target, AT_FDCWD, name));
}

/* Contents. */

static ssize_t
do_write(int fd, const void *data, size_t length, off_t offset, int placed)
{
	char path[PATH_MAX];
	int ours = fd_path(fd, path), what;
	ssize_t r;

	if (ours)
		what = due(1, WRITES, 'w', path);
	else
		what = due(is_socket(fd), NETWORK, 'S', "");
	if (what == FAIL)
		return (end(what, -1));
	if (halved(what) && length > 1)
		length /= 2;
	if (placed)
		r = syscall(SYS_pwrite64, fd, data, length, offset);
	else
		r = syscall(SYS_write, fd, data, length);
	if (ours && r > 0) {
		if (!placed)
			offset = syscall(SYS_lseek, fd, 0, SEEK_CUR) - r;
		note('w', path, NULL, fd_ino(fd), offset, data, r);
	}
	return (end(what, r));
}

ssize_t
write(int fd, const void *data, size_t length)
{
	return (do_write(fd, data, length, 0, 0));
}

ssize_t
pwrite(int fd, const void *data, size_t length, off_t offset)
{
	return (do_write(fd, data, length, offset, 1));
}

ssize_t
pwrite64(int fd, const void *data, size_t length, off_t offset)
{
	return (do_write(fd, data, length, offset, 1));
}

ssize_t
writev(int fd, const struct iovec *v, int n)
{
	size_t i, length = 0;
	ssize_t r;
	char *data;

	for (i = 0; i < (size_t)n; i++)
		length += v[i].iov_len;
	if (state == NULL || (data = malloc(length + 1)) == NULL)
		return (syscall(SYS_writev, fd, v, n));
	for (i = 0, length = 0; i < (size_t)n; length += v[i++].iov_len)
		memcpy(data + length, v[i].iov_base, v[i].iov_len);
	r = do_write(fd, data, length, 0, 0);
	free(data);
	return (r);
}

int
ftruncate(int fd, off_t size)
{
	char path[PATH_MAX];
	int ours = fd_path(fd, path), what = due(ours, WRITES, 't', path), r;

	if (what == FAIL)
		return (end(what, -1));
	r = syscall(SYS_ftruncate, fd, size);
	if (ours && r == 0)
		note('t', path, NULL, fd_ino(fd), size, NULL, 0);
	return (end(what, r));
}

int
ftruncate64(int fd, off_t size)
{
	return (ftruncate(fd, size));
}

static int
do_fsync(int fd, long number)
{
	char path[PATH_MAX];
	int ours = fd_path(fd, path), what = due(ours, WRITES, 'f', path);

	if (what == FAIL || what == HALF)
		return (end(what, -1));
	if (ours)
		note('f', path, NULL, fd_ino(fd), 0, NULL, 0);
	/* Where the power is cut in thought only, no disk need turn. */
	return (end(what, state != NULL ? 0 : syscall(number, fd)));
}

int
fsync(int fd)
{
	return (do_fsync(fd, SYS_fsync));
}

int
fdatasync(int fd)
{
	return (do_fsync(fd, SYS_fdatasync));
}

static ssize_t
do_read(int fd, void *data, size_t length, off_t offset, int placed)
{
	char path[PATH_MAX];
	int ours = fd_path(fd, path), what;

	if (ours)
		what = due(1, READS, 'g', path);
	else
		what = due(is_socket(fd), NETWORK, 'R', "");
	if (what == FAIL)
		return (end(what, -1));
	if (halved(what) && length > 1)
		length /= 2;
	if (placed)
		return (end(what, syscall(SYS_pread64, fd, data, length,
		    offset)));
	return (end(what, syscall(SYS_read, fd, data, length)));
}

ssize_t
read(int fd, void *data, size_t length)
{
	return (do_read(fd, data, length, 0, 0));
}

ssize_t
pread(int fd, void *data, size_t length, off_t offset)
{
	return (do_read(fd, data, length, offset, 1));
}

ssize_t
pread64(int fd, void *data, size_t length, off_t offset)
{
	return (do_read(fd, data, length, offset, 1));
}

/* Sockets. */

ssize_t
sendto(int fd, const void *data, size_t length, int flags,
    const struct sockaddr *address, socklen_t size)
{
	int what = due(is_socket(fd), NETWORK, 'S', "");

	if (what == FAIL)
		return (end(what, -1));
	if (halved(what) && length > 1)
		length /= 2;
	return (end(what, syscall(SYS_sendto, fd, data, length, flags, address,
	    size)));
}

ssize_t
send(int fd, const void *data, size_t length, int flags)
{
	return (sendto(fd, data, length, flags, NULL, 0));
}

ssize_t
recvfrom(int fd, void *data, size_t length, int flags,
    struct sockaddr *restrict address, socklen_t *restrict size)
{
	int what = due(is_socket(fd), NETWORK, 'R', "");

	if (what == FAIL)
		return (end(what, -1));
	return (end(what, syscall(SYS_recvfrom, fd, data, length, flags,
	    address, size)));
}

ssize_t
recv(int fd, void *data, size_t length, int flags)
{
	return (recvfrom(fd, data, length, flags, NULL, NULL));
}
