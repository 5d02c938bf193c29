/* A file system that fails where it is told to: preloaded into a process, it counts the calls that
 * change files below one folder, and at the n-th kills the process or returns an error.
 *
 *     cc -shared -fPIC -O1 -o storage_shim.so storage_shim.c -ldl
 *     LD_PRELOAD=./storage_shim.so python ...
 *
 * Armed from the environment (SHIM_ROOT, SHIM_AT, SHIM_MODE, SHIM_ERRNO) or by storage_shim_arm.
 * Modes: 0 count alone, 1 SIGKILL at the n-th call (half of a write is written), 2 the n-th call
 * fails, 3 the n-th and all later ones fail, 4 the same for calls that read (read, open, stat,
 * opendir). What is mapped into memory is read without a call. */
#define _GNU_SOURCE
#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

static char root[PATH_MAX];
static long at, seen;
static int mode, error_number;

void storage_shim_arm(const char *folder, long n, int how, int number) {
    snprintf(root, sizeof root, "%s", folder);
    at = n; mode = how; error_number = number; __atomic_store_n(&seen, 0, __ATOMIC_SEQ_CST);
}
long storage_shim_seen(void) { return __atomic_load_n(&seen, __ATOMIC_SEQ_CST); }

__attribute__((constructor)) static void from_environment(void) {
    const char *folder = getenv("SHIM_ROOT");
    if (folder)
        storage_shim_arm(folder, atol(getenv("SHIM_AT")), atoi(getenv("SHIM_MODE")),
                         atoi(getenv("SHIM_ERRNO")));
}

static int below(const char *path) {
    size_t length = strlen(root);
    return length && !strncmp(path, root, length) && (path[length] == '/' || !path[length]);
}
static int below_fd(int fd) {
    char link[64], path[PATH_MAX];
    if (!root[0]) return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = readlink(link, path, sizeof path - 1);
    if (length < 0) return 0;
    path[length] = 0;
    return below(path);
}
static int below_at(int folder, const char *name) {
    char whole[PATH_MAX * 2], base[PATH_MAX], link[64];
    if (!root[0] || !name) return 0;
    if (name[0] == '/') return below(name);
    if (folder == AT_FDCWD) { if (!getcwd(base, sizeof base)) return 0; }
    else {
        snprintf(link, sizeof link, "/proc/self/fd/%d", folder);
        ssize_t length = readlink(link, base, sizeof base - 1);
        if (length < 0) return 0;
        base[length] = 0;
    }
    snprintf(whole, sizeof whole, "%s/%s", base, name);
    return below(whole);
}
/* 1 when this call is to fail; does not return when it is to kill */
static int strike(int reading) {
    if ((mode == 4) != reading) return 0;
    long now = __atomic_add_fetch(&seen, 1, __ATOMIC_SEQ_CST);
    if (mode == 0 || now < at || (now > at && mode < 3)) return 0;
    if (mode == 1) kill(getpid(), SIGKILL);
    errno = error_number;
    return 1;
}
#define REAL(name) static __typeof__(name) *real; if (!real) real = dlsym(RTLD_NEXT, #name)

ssize_t write(int fd, const void *data, size_t size) {
    REAL(write);
    if (below_fd(fd)) {
        if (mode == 1 && storage_shim_seen() + 1 == at && size > 1) real(fd, data, size / 2);
        if (strike(0)) return -1;
    }
    return real(fd, data, size);
}
ssize_t pwrite64(int fd, const void *data, size_t size, off64_t place) {
    REAL(pwrite64);
    return below_fd(fd) && strike(0) ? -1 : real(fd, data, size, place);
}
ssize_t writev(int fd, const struct iovec *parts, int count) {
    REAL(writev);
    return below_fd(fd) && strike(0) ? -1 : real(fd, parts, count);
}
ssize_t read(int fd, void *data, size_t size) {
    REAL(read);
    return mode == 4 && below_fd(fd) && strike(1) ? -1 : real(fd, data, size);
}
ssize_t pread64(int fd, void *data, size_t size, off64_t place) {
    REAL(pread64);
    return mode == 4 && below_fd(fd) && strike(1) ? -1 : real(fd, data, size, place);
}
int fsync(int fd) { REAL(fsync); return below_fd(fd) && strike(0) ? -1 : real(fd); }
int fdatasync(int fd) { REAL(fdatasync); return below_fd(fd) && strike(0) ? -1 : real(fd); }
int rename(const char *from, const char *to) {
    REAL(rename);
    return below_at(AT_FDCWD, to) && strike(0) ? -1 : real(from, to);
}
int renameat(int from_fd, const char *from, int to_fd, const char *to) {
    REAL(renameat);
    return below_at(to_fd, to) && strike(0) ? -1 : real(from_fd, from, to_fd, to);
}
int unlink(const char *path) {
    REAL(unlink);
    return below_at(AT_FDCWD, path) && strike(0) ? -1 : real(path);
}
int unlinkat(int folder, const char *path, int flags) {
    REAL(unlinkat);
    return below_at(folder, path) && strike(0) ? -1 : real(folder, path, flags);
}
int mkdir(const char *path, mode_t rights) {
    REAL(mkdir);
    return below_at(AT_FDCWD, path) && strike(0) ? -1 : real(path, rights);
}
#define OPEN(name)                                                            \
    int name(const char *path, int flags, ...) {                              \
        static int (*real)(const char *, int, ...);                           \
        if (!real) real = dlsym(RTLD_NEXT, #name);                            \
        mode_t rights = 0;                                                    \
        if (flags & O_CREAT) {                                                \
            va_list rest;                                                     \
            va_start(rest, flags);                                            \
            rights = va_arg(rest, mode_t);                                    \
            va_end(rest);                                                     \
            if (below_at(AT_FDCWD, path) && strike(0)) return -1;             \
        } else if (mode == 4 && below_at(AT_FDCWD, path) && strike(1)) {      \
            return -1;                                                        \
        }                                                                     \
        return real(path, flags, rights);                                     \
    }
OPEN(open)
OPEN(open64)
#define LOOK(name, buffer)                                                    \
    int name(const char *path, struct buffer *state) {                        \
        static int (*real)(const char *, struct buffer *);                    \
        if (!real) real = dlsym(RTLD_NEXT, #name);                            \
        return mode == 4 && below_at(AT_FDCWD, path) && strike(1) ? -1 : real(path, state); \
    }
LOOK(stat, stat)
LOOK(stat64, stat64)
LOOK(lstat, stat)
LOOK(lstat64, stat64)
DIR *opendir(const char *path) {
    REAL(opendir);
    return mode == 4 && below_at(AT_FDCWD, path) && strike(1) ? NULL : real(path);
}
