// A library to preload: it ends its process at the n-th call that changes a file below one folder.
//
// kill_at(n, folder) arms it, calls_so_far() says how many such calls there were. The call that is
// due is not made, except that a write is made by half, as a torn one would be.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

static char root[4096];
static long due = -1, calls = 0;
static char below[4096]; // below[fd]: the descriptor is of a file below the folder

void kill_at(long n, const char *folder) {
    strncpy(root, folder, sizeof root - 1);
    due = n;
    calls = 0;
}

long calls_so_far(void) { return calls; }

static int is_below(const char *path) {
    return *root && path && strncmp(path, root, strlen(root)) == 0;
}

static int is_due(void) { return ++calls == due; }

static void die(void) { kill(getpid(), SIGKILL); }

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))
#define CHANGE(counts, name, ...) \
    if ((counts) && is_due()) die(); \
    return REAL(name)(__VA_ARGS__)

static int opened(int fd, const char *path) {
    if (fd >= 0 && fd < (int)sizeof below) below[fd] = is_below(path);
    return fd;
}

// A descriptor that may be at hand when a path is relative to one is of a folder below.
static int counts_at(int folder, const char *path) { return is_below(path) || folder != AT_FDCWD; }

#define OPEN(name) \
    int name(const char *path, int flags, ...) { \
        va_list list; \
        va_start(list, flags); \
        int mode = va_arg(list, int); \
        va_end(list); \
        if (is_below(path) && (flags & (O_CREAT | O_TRUNC)) && is_due()) die(); \
        return opened(REAL(name)(path, flags, mode), path); \
    }
OPEN(open)
OPEN(open64)

#define OPENAT(name) \
    int name(int folder, const char *path, int flags, ...) { \
        va_list list; \
        va_start(list, flags); \
        int mode = va_arg(list, int); \
        va_end(list); \
        if (is_below(path) && (flags & (O_CREAT | O_TRUNC)) && is_due()) die(); \
        return opened(REAL(name)(folder, path, flags, mode), path); \
    }
OPENAT(openat)
OPENAT(openat64)

ssize_t write(int fd, const void *bytes, size_t size) {
    if (fd >= 0 && fd < (int)sizeof below && below[fd] && is_due()) {
        REAL(write)(fd, bytes, size / 2);
        die();
    }
    return REAL(write)(fd, bytes, size);
}

int fsync(int fd) { CHANGE(fd < (int)sizeof below && below[fd], fsync, fd); }
int mkdir(const char *path, mode_t mode) { CHANGE(is_below(path), mkdir, path, mode); }
int rmdir(const char *path) { CHANGE(is_below(path), rmdir, path); }
int unlink(const char *path) { CHANGE(is_below(path), unlink, path); }
int unlinkat(int folder, const char *path, int flags) {
    CHANGE(counts_at(folder, path), unlinkat, folder, path, flags);
}
int link(const char *one, const char *two) { CHANGE(is_below(two), link, one, two); }
int linkat(int from, const char *one, int to, const char *two, int flags) {
    CHANGE(counts_at(to, two), linkat, from, one, to, two, flags);
}
int rename(const char *one, const char *two) { CHANGE(is_below(two), rename, one, two); }
int renameat(int from, const char *one, int to, const char *two) {
    CHANGE(counts_at(to, two), renameat, from, one, to, two);
}
int renameat2(int from, const char *one, int to, const char *two, unsigned flags) {
    CHANGE(counts_at(to, two), renameat2, from, one, to, two, flags);
}
