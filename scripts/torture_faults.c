/* Faults in the writes of one process below a directory, for scripts/torture.py; loaded with LD_PRELOAD.

   Every call that changes a file below the directory is an operation with a number. `torture_arm` says what happens at one. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

enum { OFF, LOG, KILL_BEFORE, KILL_MIDDLE, FAIL_FROM, POWER_CUT };
enum { SPACE = 1, DATA = 2, ANY = 4 }; /* what an operation needs: new space, to store data, a disk that can be written */

static int mode, error_number, log_fd = -1;
static long at, count;
static char root[PATH_MAX];

void torture_arm(int new_mode, long new_at, int new_error, const char *new_root, int new_log_fd) {
    mode = new_mode, at = new_at, error_number = new_error, log_fd = new_log_fd, count = 0;
    snprintf(root, sizeof root, "%s", new_root);
}

long torture_count(void) { return count; }

#define REAL(name) ({ static __typeof__(&name) real; if (!real) real = dlsym(RTLD_NEXT, #name); real; })

static int is_below(const char *path) { return !strncmp(path, root, strlen(root)); }

static int fd_path(int fd, char *out) {
    char link[64];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = syscall(SYS_readlinkat, AT_FDCWD, link, out, PATH_MAX - 1);
    out[length > 0 ? length : 0] = 0;
    return length > 0;
}

static int full_path(int directory, const char *path, char *out) {
    char start[PATH_MAX];
    if (path[0] == '/') return snprintf(out, PATH_MAX, "%s", path);
    if (directory == AT_FDCWD ? !getcwd(start, sizeof start) : !fd_path(directory, start)) return 0;
    return snprintf(out, PATH_MAX, "%s/%s", start, path);
}

static void die(void) { kill(getpid(), SIGKILL); }

/* Count an operation; -1 where it must fail with errno set, 1 where only half of it is done before the process dies, else 0. */
static int operation(const char *name, const char *path, int needs) {
    if (mode == OFF || !is_below(path)) return 0;
    long number = count++;
    if (mode == LOG) dprintf(log_fd, "%ld %s %s\n", number, name, path + strlen(root));
    if (mode == KILL_BEFORE && number == at) die();
    if (mode == KILL_MIDDLE && number == at) return 1;
    if (mode == POWER_CUT && number == at) {
        int fd = syscall(SYS_openat, AT_FDCWD, root, O_RDONLY | O_DIRECTORY);
        unsigned no_flush = 2; /* EXT4_GOING_FLAGS_NOLOGFLUSH */
        if (ioctl(fd, _IOR('X', 125, unsigned), &no_flush)) dprintf(2, "no shutdown: %s\n", strerror(errno));
        die();
    }
    if (mode == FAIL_FROM && number >= at) {
        int kinds = error_number == ENOSPC ? SPACE : error_number == EIO ? DATA : SPACE | DATA | ANY;
        if (needs & kinds) return errno = error_number, -1;
    }
    return 0;
}

static int on_fd(const char *name, int fd, int needs) {
    char path[PATH_MAX];
    return mode != OFF && fd_path(fd, path) ? operation(name, path, needs) : 0;
}

static int on_path(const char *name, int directory, const char *file, int needs) {
    char path[PATH_MAX];
    return mode != OFF && full_path(directory, file, path) ? operation(name, path, needs) : 0;
}

#define WRITE(name, half, ...)                                                                             \
    int verdict = on_fd(#name, fd, SPACE | DATA);                                                          \
    if (verdict < 0) return -1;                                                                            \
    if (verdict > 0) { half; die(); }                                                                      \
    return REAL(name)(__VA_ARGS__);

ssize_t write(int fd, const void *data, size_t size) { WRITE(write, REAL(write)(fd, data, size / 2), fd, data, size) }
ssize_t pwrite(int fd, const void *data, size_t size, off_t offset) {
    WRITE(pwrite, REAL(pwrite)(fd, data, size / 2, offset), fd, data, size, offset)
}
ssize_t pwrite64(int fd, const void *data, size_t size, off64_t offset) {
    WRITE(pwrite64, REAL(pwrite64)(fd, data, size / 2, offset), fd, data, size, offset)
}
ssize_t writev(int fd, const struct iovec *parts, int number) {
    WRITE(writev, REAL(writev)(fd, parts, number / 2), fd, parts, number)
}

#undef WRITE
ssize_t sendfile(int to, int from, off_t *offset, size_t size) {
    int verdict = on_fd("sendfile", to, SPACE | DATA);
    if (verdict < 0) return -1;
    if (verdict > 0) { REAL(write)(to, "?", 1); die(); }
    return syscall(SYS_sendfile, to, from, offset, size);
}
ssize_t sendfile64(int to, int from, off_t *offset, size_t size) { return sendfile(to, from, offset, size); }

#define AFTER(expression)                                                                                  \
    ({ if (verdict < 0) return -1; __typeof__(expression) result = (expression); if (verdict > 0) die(); result; })

int fsync(int fd) { int verdict = on_fd("fsync", fd, DATA); return AFTER(REAL(fsync)(fd)); }
int fdatasync(int fd) { int verdict = on_fd("fdatasync", fd, DATA); return AFTER(REAL(fdatasync)(fd)); }
int ftruncate(int fd, off_t size) {
    int verdict = on_fd("ftruncate", fd, SPACE | DATA);
    return AFTER(REAL(ftruncate)(fd, size));
}
int ftruncate64(int fd, off64_t size) {
    int verdict = on_fd("ftruncate", fd, SPACE | DATA);
    return AFTER(REAL(ftruncate64)(fd, size));
}

static int open_file(int directory, const char *path, int flags, mode_t rights) {
    int verdict = 0;
    if (flags & (O_CREAT | O_TRUNC)) verdict = on_path("open", directory, path, (flags & O_CREAT ? SPACE : 0) | ANY);
    else if ((flags & O_ACCMODE) != O_RDONLY) verdict = on_path("open", directory, path, ANY);
    return AFTER((int)syscall(SYS_openat, directory, path, flags, rights));
}
#define RIGHTS ({ va_list list; va_start(list, flags); mode_t rights = va_arg(list, mode_t); va_end(list); rights; })
int open(const char *path, int flags, ...) { return open_file(AT_FDCWD, path, flags, RIGHTS); }
int open64(const char *path, int flags, ...) { return open_file(AT_FDCWD, path, flags, RIGHTS); }
int openat(int directory, const char *path, int flags, ...) { return open_file(directory, path, flags, RIGHTS); }
int openat64(int directory, const char *path, int flags, ...) { return open_file(directory, path, flags, RIGHTS); }

int rename(const char *from, const char *to) {
    int verdict = on_path("rename", AT_FDCWD, to, ANY);
    return AFTER(REAL(rename)(from, to));
}
int renameat(int from_directory, const char *from, int to_directory, const char *to) {
    int verdict = on_path("rename", to_directory, to, ANY);
    return AFTER(REAL(renameat)(from_directory, from, to_directory, to));
}
int unlink(const char *path) {
    int verdict = on_path("unlink", AT_FDCWD, path, ANY);
    return AFTER(REAL(unlink)(path));
}
int unlinkat(int directory, const char *path, int flags) {
    int verdict = on_path("unlink", directory, path, ANY);
    return AFTER(REAL(unlinkat)(directory, path, flags));
}
int mkdir(const char *path, mode_t rights) {
    int verdict = on_path("mkdir", AT_FDCWD, path, SPACE | ANY);
    return AFTER(REAL(mkdir)(path, rights));
}
int rmdir(const char *path) {
    int verdict = on_path("rmdir", AT_FDCWD, path, ANY);
    return AFTER(REAL(rmdir)(path));
}
