/*
 * Strikes at the n-th change of a run, whoever makes it: Python, SQLite, PyTorch, the trainer or its writer.
 *
 * Preloaded into every process of a run. The calls below that change something under the root are
 * counted in memory that all processes share; at an ordered number the caller, another process or all
 * of them die or stop, or the call fails, writes less, or lies, or the file system loses its power, or the caller
 * takes more memory than there is. All calls can be traced, with the bytes.
 * Not seen: raw system calls, io_uring, stores into mapped files; ckptmgr and SQLite (mmap_size=0) use none.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <sched.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

#define ROLES 32
#define LONGEST 512
#define MUCH (256ul << 20)

enum kind { CREATE, WRITE, TRUNCATE, ALLOCATE, FSYNC, RENAME, UNLINK, RMDIR, MKDIR, SYMLINK, LINK, CLOSE, LOCK };
enum action { NOTHING, KILL, STOP, FAIL, SHORT, TORN, LIE, CUT, WATCH, EAT };
enum lies { NONE, ALL, DATA };
enum target { CALLER = -1, EVERYONE = -2 };

/* The same struct in shim.py. All fields little-endian and aligned as written. */
struct shared {
    uint64_t at;              /* strike at this call, counted from 1; 0: never */
    int32_t action;
    int32_t error;            /* errno of FAIL */
    int32_t sticky;           /* FAIL: from then on */
    int32_t lies;             /* which fsyncs say yes and do nothing, from the start */
    uint32_t kinds;           /* bits of the kinds that are counted */
    int32_t target;           /* who dies: a role, CALLER or EVERYONE; all stop together */
    int32_t phase;            /* where the trainer says it is */
    _Atomic uint64_t count;
    _Atomic uint64_t struck;
    int32_t struck_kind;
    int32_t struck_phase;
    int32_t struck_role;
    _Atomic int32_t lock;     /* keeps traced calls in the order in which they are written down */
    int32_t pids[ROLES];
    char struck_path[LONGEST];
    char root[LONGEST];
    char trace[LONGEST];
    char group[LONGEST];
};

struct record {
    uint32_t length;          /* of path, other path and data behind it */
    uint32_t kind;
    int32_t role;
    int32_t phase;
    int32_t flags;            /* renameat2's flags; CREATE: 1 where a file was truncated and not made */
    uint32_t path;
    uint32_t other;
    uint32_t unused;
    int64_t offset;
    uint64_t number;
};

static struct shared *shared;
static int role = -1;
static int trace = -1;
static __thread uint64_t current;   /* the number of the call that this thread is in */
static volatile sig_atomic_t went_on;

#define REAL(name, type) \
    static type real; \
    if (!real) real = (type)dlsym(RTLD_NEXT, name)

/* Map the orders in *path* and act under them as *mine* from now on; 0 if that works. */
int ckptmgr_shim_arm(const char *path, int mine) {
    int fd = (int)syscall(SYS_openat, AT_FDCWD, path, O_RDWR | O_CLOEXEC, 0);
    if (fd < 0) return -1;
    void *there = mmap(NULL, sizeof(struct shared), PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    syscall(SYS_close, fd);
    if (there == MAP_FAILED) return -1;
    role = mine;
    shared = there;
    if (mine >= 0 && mine < ROLES) shared->pids[mine] = getpid();
    if (shared->trace[0]) {
        int low = (int)syscall(SYS_openat, AT_FDCWD, shared->trace, O_WRONLY | O_APPEND | O_CLOEXEC, 0);
        if (low < 0) return -1;
        trace = fcntl(low, F_DUPFD_CLOEXEC, 700);
        syscall(SYS_close, low);
    }
    return 0;
}

__attribute__((constructor)) static void start(void) {
    const char *path = getenv("CKPTMGR_SHIM"), *mine = getenv("CKPTMGR_SHIM_ROLE");
    if (path && mine) ckptmgr_shim_arm(path, atoi(mine));
}

static int of_descriptor(int fd, char *out) {
    char link[64];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = syscall(SYS_readlinkat, AT_FDCWD, link, out, PATH_MAX - 1);
    if (length <= 0) return 0;
    out[length] = 0;
    return 1;
}

static int of_name(int folder, const char *path, char *out) {
    if (!path) return 0;
    if (path[0] == '/') { snprintf(out, PATH_MAX, "%s", path); return 1; }
    char base[PATH_MAX];
    if (folder == AT_FDCWD) { if (!getcwd(base, sizeof base)) return 0; }
    else if (!of_descriptor(folder, base)) return 0;
    snprintf(out, PATH_MAX, "%.*s/%s", PATH_MAX / 2, base, path);
    return 1;
}

static int ours(const char *path) {
    return shared->root[0] && strncmp(path, shared->root, strlen(shared->root)) == 0;
}

static void hold(void) { int free = 0; while (!atomic_compare_exchange_weak(&shared->lock, &free, 1)) { free = 0; sched_yield(); } }
static void let_go(void) { atomic_store(&shared->lock, 0); }

static void note_going_on(int number) { (void)number; went_on = 1; }

/*
 * Stops the caller's whole group, and returns when it goes on. kill() may return before: of several threads any can
 * be the one that takes the signal, and this one would do meanwhile what it is to be stopped at.
 */
static void stop(void) {
    struct sigaction noting = {.sa_handler = note_going_on, .sa_flags = SA_RESTART}, before;
    went_on = 0;
    sigaction(SIGCONT, &noting, &before);
    kill(0, SIGSTOP);
    while (!went_on) usleep(1000);
    sigaction(SIGCONT, &before, NULL);
}

static void hit(int number) {
    if (shared->target == EVERYONE) { kill(0, number); return; }
    if (shared->target == CALLER) { kill(getpid(), number); return; }
    int pid = shared->pids[shared->target];
    if (pid > 0) kill(pid, number);
}

/*
 * The file system that the root stands on loses its power: nothing more reaches the disk, its own log included.
 * One number for ext4 (EXT4_IOC_SHUTDOWN), XFS (XFS_IOC_GOINGDOWN) and others.
 */
static void cut(void) {
    char folder[LONGEST];
    uint32_t no_log_flush = 2;
    snprintf(folder, sizeof folder, "%.*s", (int)(strrchr(shared->root, '/') - shared->root), shared->root);
    int fd = (int)syscall(SYS_openat, AT_FDCWD, folder, O_RDONLY | O_DIRECTORY | O_CLOEXEC, 0);
    if (fd < 0 || ioctl(fd, _IOR('X', 125, uint32_t), &no_log_flush) != 0) { perror("cannot cut the power"); abort(); }
}

/*
 * Takes memory until the kernel kills somebody for it; more than any of our limits, less than what a machine has.
 * Where that is asked for in a control group that holds nobody else, so that the kernel has no choice.
 */
static void eat(void) {
    if (shared->group[0]) {
        int fd = (int)syscall(SYS_openat, AT_FDCWD, shared->group, O_WRONLY | O_CLOEXEC, 0);
        if (fd < 0 || syscall(SYS_write, fd, "0", 1) != 1) { perror("cannot enter the control group"); abort(); }
        syscall(SYS_close, fd);
    }
    char *much = mmap(NULL, MUCH, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (much == MAP_FAILED) { perror("cannot take memory"); abort(); }
    for (size_t n = 0; n < MUCH; n += 4096) ((volatile char *)much)[n] = 1;
    munmap(much, MUCH);
}

static int lies_about(enum kind kind, const char *path) {
    if (kind != FSYNC || shared->lies == NONE) return 0;
    return shared->lies == ALL || !strstr(path, ".journal.db");
}

static void struck_at(enum kind kind, const char *path) {
    if (atomic_fetch_add(&shared->struck, 1) == 0) {
        shared->struck_kind = kind;
        shared->struck_phase = shared->phase;
        shared->struck_role = role;
        snprintf(shared->struck_path, LONGEST, "%s", path);
    }
}

/* A call that the kernel itself refused for want of space, or because the disk below failed. */
static void refused(enum kind kind, const char *path, int code) {
    int spent = code == ENOSPC || code == EDQUOT || code == EFBIG, broken = code == EIO || code == EROFS;
    if (shared->action == WATCH && (spent || broken)) struck_at(kind, path);
}

/* What becomes of this call: NOTHING (let it happen), FAIL, SHORT, TORN or LIE. Does not return from a death. */
static enum action strike(enum kind kind, const char *path) {
    if (!(shared->kinds & (1u << kind))) return NOTHING;
    uint64_t number = current = atomic_fetch_add(&shared->count, 1) + 1;
    uint64_t at = shared->at;
    enum action usual = lies_about(kind, path) ? LIE : NOTHING;
    if (!at || number < at || (number > at && !shared->sticky)) return usual;
    struck_at(kind, path);
    if (shared->action == CUT) { cut(); hit(SIGKILL); return NOTHING; }
    if (shared->action == KILL || (shared->action == TORN && kind != WRITE)) { hit(SIGKILL); return NOTHING; }
    if (shared->action == STOP) { stop(); return NOTHING; }
    if (shared->action == EAT) { eat(); return NOTHING; }
    return shared->action;
}

static void put_down(enum kind kind, const char *path, const char *other, int flags, int64_t offset,
                     const struct iovec *data, int count, size_t size) {
    size_t path_length = strlen(path), other_length = other ? strlen(other) : 0;
    struct record record = {
        .length = (uint32_t)(path_length + other_length + size), .kind = kind, .role = role, .phase = shared->phase,
        .flags = flags, .path = (uint32_t)path_length, .other = (uint32_t)other_length, .offset = offset,
        .number = current,
    };
    char *whole = malloc(sizeof record + record.length), *end = whole;
    memcpy(end, &record, sizeof record); end += sizeof record;
    memcpy(end, path, path_length); end += path_length;
    if (other) { memcpy(end, other, other_length); end += other_length; }
    for (int n = 0; n < count && size; n++) {
        size_t part = data[n].iov_len < size ? data[n].iov_len : size;
        memcpy(end, data[n].iov_base, part); end += part; size -= part;
    }
    for (char *next = whole; next < end;) {
        ssize_t done = syscall(SYS_write, trace, next, (size_t)(end - next));
        if (done <= 0) abort();
        next += done;
    }
    free(whole);
}

/*
 * One call: decide, do it, write it down if it worked. `call` is an expression whose value is the result.
 * `data`, `count` and the result as size only matter to writes.
 */
#define AROUND(kind, path, other, flags, offset, data, count, result, call) do { \
    enum action todo = strike(kind, path); \
    if (todo == FAIL) { errno = shared->error; return -1; } \
    if (todo == LIE) return 0; \
    if (trace >= 0) hold(); \
    result = (call); \
    int kept = errno; \
    if (result < 0) refused(kind, path, kept); \
    if (trace >= 0) { \
        if (result >= 0) put_down(kind, path, other, flags, offset, data, count, (kind) == WRITE ? (size_t)result : 0); \
        let_go(); \
    } \
    errno = kept; \
} while (0)

/* --- opening --- */

static int opened(const char *name, int folder, const char *path, int flags, mode_t mode, int at) {
    char where[PATH_MAX];
    typedef int (*plain)(const char *, int, ...);
    typedef int (*relative)(int, const char *, int, ...);
    void *found = dlsym(RTLD_NEXT, name);
    int result;
    if (shared && (flags & (O_CREAT | O_TRUNC)) && (flags & O_TMPFILE) != O_TMPFILE && of_name(folder, path, where) && ours(where)) {
        struct stat there;
        int exists = fstatat(AT_FDCWD, where, &there, AT_SYMLINK_NOFOLLOW) == 0;
        if ((flags & O_TRUNC && exists) || (flags & O_CREAT && !exists)) {
            AROUND(CREATE, where, NULL, exists, 0, NULL, 0, result,
                   at ? ((relative)found)(folder, path, flags, mode) : ((plain)found)(path, flags, mode));
            return result;
        }
    }
    return at ? ((relative)found)(folder, path, flags, mode) : ((plain)found)(path, flags, mode);
}

#define MODE mode_t mode = 0; if (flags & O_CREAT || (flags & O_TMPFILE) == O_TMPFILE) { \
    va_list more; va_start(more, flags); mode = va_arg(more, mode_t); va_end(more); }
int open(const char *path, int flags, ...) { MODE return opened("open", AT_FDCWD, path, flags, mode, 0); }
int open64(const char *path, int flags, ...) { MODE return opened("open64", AT_FDCWD, path, flags, mode, 0); }
int openat(int folder, const char *path, int flags, ...) { MODE return opened("openat", folder, path, flags, mode, 1); }
int openat64(int folder, const char *path, int flags, ...) { MODE return opened("openat64", folder, path, flags, mode, 1); }

/* --- writing --- */

static ssize_t written(int fd, const struct iovec *data, int count, int64_t offset) {
    char where[PATH_MAX];
    struct iovec less[1];
    ssize_t result;
    int positioned = offset >= 0;
#define WRITEV(d, c) (positioned ? syscall(SYS_pwritev, fd, d, (long)(c), (long)offset, 0L) : syscall(SYS_writev, fd, d, (long)(c)))
    if (!shared || !of_descriptor(fd, where) || !ours(where)) return WRITEV(data, count);
    int64_t from = positioned ? offset : (fcntl(fd, F_GETFL) & O_APPEND ? lseek(fd, 0, SEEK_END) : lseek(fd, 0, SEEK_CUR));
    enum action todo = strike(WRITE, where);
    if (todo == FAIL) { errno = shared->error; return -1; }
    if ((todo == SHORT || todo == TORN) && count > 0) {
        less[0] = (struct iovec){data[0].iov_base, data[0].iov_len > 1 ? data[0].iov_len / 2 : data[0].iov_len};
        data = less; count = 1;
    }
    if (trace >= 0) hold();
    result = WRITEV(data, count);
    int kept = errno;
    if (result < 0) refused(WRITE, where, kept);
    if (trace >= 0) {
        if (result >= 0) put_down(WRITE, where, NULL, 0, from, data, count, (size_t)result);
        let_go();
    }
    if (todo == TORN) hit(SIGKILL);
    errno = kept;
    return result;
}

ssize_t write(int fd, const void *data, size_t size) { struct iovec one = {(void *)data, size}; return written(fd, &one, 1, -1); }
ssize_t pwrite(int fd, const void *data, size_t size, off_t at) { struct iovec one = {(void *)data, size}; return written(fd, &one, 1, at); }
ssize_t pwrite64(int fd, const void *data, size_t size, off64_t at) { struct iovec one = {(void *)data, size}; return written(fd, &one, 1, at); }
ssize_t writev(int fd, const struct iovec *data, int count) { return written(fd, data, count, -1); }
ssize_t pwritev(int fd, const struct iovec *data, int count, off_t at) { return written(fd, data, count, at); }
ssize_t pwritev64(int fd, const struct iovec *data, int count, off64_t at) { return written(fd, data, count, at); }

/* These would go past the count: nothing that we test uses them on a run, and the day it does we want to know. */
ssize_t sendfile(int out, int in, off_t *at, size_t size) {
    char where[PATH_MAX];
    if (shared && of_descriptor(out, where) && ours(where)) { fprintf(stderr, "sendfile to %s\n", where); abort(); }
    return syscall(SYS_sendfile, out, in, at, size);
}
ssize_t copy_file_range(int in, off64_t *from, int out, off64_t *at, size_t size, unsigned flags) {
    char where[PATH_MAX];
    if (shared && of_descriptor(out, where) && ours(where)) { fprintf(stderr, "copy_file_range to %s\n", where); abort(); }
    return syscall(SYS_copy_file_range, in, from, out, at, size, flags);
}

/* --- on descriptors --- */

#define ON_DESCRIPTOR(kind, fd, offset, call) do { \
    char where[PATH_MAX]; \
    int result; \
    if (!shared || !of_descriptor(fd, where) || !ours(where)) return (call); \
    AROUND(kind, where, NULL, 0, offset, NULL, 0, result, call); \
    return result; \
} while (0)

int fsync(int fd) { ON_DESCRIPTOR(FSYNC, fd, 0, (int)syscall(SYS_fsync, fd)); }
int fdatasync(int fd) { ON_DESCRIPTOR(FSYNC, fd, 1, (int)syscall(SYS_fdatasync, fd)); }
int ftruncate(int fd, off_t size) { ON_DESCRIPTOR(TRUNCATE, fd, size, (int)syscall(SYS_ftruncate, fd, size)); }
int ftruncate64(int fd, off64_t size) { ON_DESCRIPTOR(TRUNCATE, fd, size, (int)syscall(SYS_ftruncate, fd, size)); }
int fallocate(int fd, int mode, off_t from, off_t size) { ON_DESCRIPTOR(ALLOCATE, fd, from + size, (int)syscall(SYS_fallocate, fd, mode, from, size)); }
int fallocate64(int fd, int mode, off64_t from, off64_t size) { ON_DESCRIPTOR(ALLOCATE, fd, from + size, (int)syscall(SYS_fallocate, fd, mode, from, size)); }

/* Locks of either kind, counted only where that is asked for. */
#define LOCKING(fd, call) do { \
    char where[PATH_MAX]; \
    int result; \
    if (!shared || !(shared->kinds & (1u << LOCK)) || !of_descriptor(fd, where) || !ours(where)) return (call); \
    AROUND(LOCK, where, NULL, 0, 0, NULL, 0, result, call); \
    return result; \
} while (0)

int flock(int fd, int operation) {
    if (operation & LOCK_UN) return (int)syscall(SYS_flock, fd, operation);
    LOCKING(fd, (int)syscall(SYS_flock, fd, operation));
}

static int controlled(int fd, int command, long argument) {
    int locks = (command == F_SETLK || command == F_SETLKW) && ((struct flock *)argument)->l_type != F_UNLCK;
    if (!locks) return (int)syscall(SYS_fcntl, fd, command, argument);
    LOCKING(fd, (int)syscall(SYS_fcntl, fd, command, argument));
}
int fcntl(int fd, int command, ...) { va_list more; va_start(more, command); long argument = va_arg(more, long); va_end(more); return controlled(fd, command, argument); }
int fcntl64(int fd, int command, ...) { va_list more; va_start(more, command); long argument = va_arg(more, long); va_end(more); return controlled(fd, command, argument); }

int close(int fd) {
    char where[PATH_MAX];
    if (shared && fd != trace && (shared->kinds & (1u << CLOSE)) && of_descriptor(fd, where) && ours(where) &&
        (fcntl(fd, F_GETFL) & O_ACCMODE) != O_RDONLY) {
        enum action todo = strike(CLOSE, where);
        if (todo == FAIL) { syscall(SYS_close, fd); errno = shared->error; return -1; }
        if (trace >= 0) { hold(); put_down(CLOSE, where, NULL, 0, 0, NULL, 0, 0); let_go(); }
    }
    return (int)syscall(SYS_close, fd);
}

/* --- on names --- */

#define ON_NAME(kind, folder, path, offset, call) do { \
    char where[PATH_MAX]; \
    int result; \
    if (!shared || !of_name(folder, path, where) || !ours(where)) return (call); \
    AROUND(kind, where, NULL, 0, offset, NULL, 0, result, call); \
    return result; \
} while (0)

int mkdir(const char *path, mode_t mode) { ON_NAME(MKDIR, AT_FDCWD, path, 0, (int)syscall(SYS_mkdirat, AT_FDCWD, path, mode)); }
int mkdirat(int folder, const char *path, mode_t mode) { ON_NAME(MKDIR, folder, path, 0, (int)syscall(SYS_mkdirat, folder, path, mode)); }
int unlink(const char *path) { ON_NAME(UNLINK, AT_FDCWD, path, 0, (int)syscall(SYS_unlinkat, AT_FDCWD, path, 0)); }
int rmdir(const char *path) { ON_NAME(RMDIR, AT_FDCWD, path, 0, (int)syscall(SYS_unlinkat, AT_FDCWD, path, AT_REMOVEDIR)); }
int unlinkat(int folder, const char *path, int flags) {
    if (flags & AT_REMOVEDIR) ON_NAME(RMDIR, folder, path, 0, (int)syscall(SYS_unlinkat, folder, path, flags));
    ON_NAME(UNLINK, folder, path, 0, (int)syscall(SYS_unlinkat, folder, path, flags));
}
int truncate(const char *path, off_t size) { ON_NAME(TRUNCATE, AT_FDCWD, path, size, (int)syscall(SYS_truncate, path, size)); }
int truncate64(const char *path, off64_t size) { ON_NAME(TRUNCATE, AT_FDCWD, path, size, (int)syscall(SYS_truncate, path, size)); }

#define ON_TWO(kind, folder, path, other_folder, other_path, flags, call) do { \
    char where[PATH_MAX], whither[PATH_MAX]; \
    int result; \
    if (!shared || !of_name(folder, path, where) || !of_name(other_folder, other_path, whither) || !(ours(where) || ours(whither))) \
        return (call); \
    AROUND(kind, where, whither, flags, 0, NULL, 0, result, call); \
    return result; \
} while (0)

int rename(const char *old, const char *new) { ON_TWO(RENAME, AT_FDCWD, old, AT_FDCWD, new, 0, (int)syscall(SYS_renameat2, AT_FDCWD, old, AT_FDCWD, new, 0)); }
int renameat(int a, const char *old, int b, const char *new) { ON_TWO(RENAME, a, old, b, new, 0, (int)syscall(SYS_renameat2, a, old, b, new, 0)); }
int renameat2(int a, const char *old, int b, const char *new, unsigned flags) { ON_TWO(RENAME, a, old, b, new, (int)flags, (int)syscall(SYS_renameat2, a, old, b, new, flags)); }
int link(const char *old, const char *new) { ON_TWO(LINK, AT_FDCWD, old, AT_FDCWD, new, 0, (int)syscall(SYS_linkat, AT_FDCWD, old, AT_FDCWD, new, 0)); }
int linkat(int a, const char *old, int b, const char *new, int flags) { ON_TWO(LINK, a, old, b, new, 0, (int)syscall(SYS_linkat, a, old, b, new, flags)); }

/* A link's target is only text: where = the link, other = the text. */
int symlinkat(const char *target, int folder, const char *path) {
    char where[PATH_MAX];
    int result;
    if (!shared || !of_name(folder, path, where) || !ours(where)) return (int)syscall(SYS_symlinkat, target, folder, path);
    AROUND(SYMLINK, where, target, 0, 0, NULL, 0, result, (int)syscall(SYS_symlinkat, target, folder, path));
    return result;
}
int symlink(const char *target, const char *path) { return symlinkat(target, AT_FDCWD, path); }

/* --- not on files --- */

/* A death signal that never comes, as where a change of user has cleared it. */
int prctl(int option, ...) {
    va_list more; va_start(more, option);
    unsigned long a = va_arg(more, unsigned long), b = va_arg(more, unsigned long), c = va_arg(more, unsigned long), d = va_arg(more, unsigned long);
    va_end(more);
    if (option == PR_SET_PDEATHSIG && getenv("CKPTMGR_SHIM_OUTLIVES")) return 0;
    return (int)syscall(SYS_prctl, option, a, b, c, d);
}
