"""What a process gives up before it runs foreign code. Linux, through ctypes; elsewhere the limits alone.

In order: namespaces with a root of their own (where asked for), limits, no new privileges, Landlock, capabilities and
user, seccomp. Each is a layer that holds if another one fails.
"""

from __future__ import annotations

import contextlib
import ctypes
import glob
import os
import resource
import struct
import sys

NOBODY = 65534
SPACE = 2**24  # bytes of the program's own directory, and of one file in it
FILES = 64  # open at once
NEW_ROOT = "/sys"  # any folder that exists and holds nothing of Python's

CLONE_THREAD, NEW_NAMESPACES = 0x10000, 0x6C020000  # mount, UTS, IPC, PID, network; without the user's
NEW_USER = 0x10000000
READ_ONLY, NO_SUID, NO_DEV, REMOUNT, BIND, RECURSIVE, PRIVATE, DETACH = 1, 2, 4, 32, 4096, 16384, 1 << 18, 2
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_KEEPCAPS = 1, 4, 8
PR_SET_SECCOMP, PR_CAPBSET_DROP, PR_SET_NO_NEW_PRIVS, PR_SET_CHILD_SUBREAPER = 22, 24, 38, 36
OVERRIDE, READ_SEARCH = 1 << 1, 1 << 2  # CAP_DAC_…: files of others
READ, LIST = 4, 8  # rights of Landlock

MACHINES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}  # as seccomp names them
SYSCALLS = """
read 0 63  write 1 64  close 3 57  fstat 5 80  lseek 8 62  mmap 9 222  mprotect 10 226  munmap 11 215  brk 12 214
rt_sigaction 13 134  rt_sigprocmask 14 135  rt_sigreturn 15 139  rt_sigpending 127 136  rt_sigtimedwait 128 137
sigaltstack 131 132  pread64 17 67  pwrite64 18 68  readv 19 65  writev 20 66  pipe2 293 59  pselect6 270 72
ppoll 271 73  sched_yield 24 124  mremap 25 216  madvise 28 233  mincore 27 232  msync 26 227  dup 32 23  dup3 292 24
nanosleep 35 101  clock_nanosleep 230 115  getpid 39 172  getppid 110 173  gettid 186 178  exit 60 93
exit_group 231 94  futex 202 98  set_robust_list 273 99  get_robust_list 274 100  set_tid_address 218 96  rseq 334 293
membarrier 324 283  restart_syscall 219 128  getrandom 318 278  clock_gettime 228 113  clock_getres 229 114
gettimeofday 96 169  times 100 153  getrusage 98 165  newfstatat 262 79  statx 332 291  faccessat 269 48
faccessat2 439 439  getdents64 217 61  getcwd 79 17  chdir 80 49  fchdir 81 50  readlinkat 267 78  statfs 137 43
fstatfs 138 44  getuid 102 174  geteuid 107 175  getgid 104 176  getegid 108 177  getgroups 115 158
getresuid 118 148  getresgid 120 150  getpgid 121 155  getsid 124 156  umask 95 166  uname 63 160  sysinfo 99 179
sched_getaffinity 204 123  getcpu 309 168  epoll_create1 291 20  epoll_ctl 233 21  epoll_pwait 281 22
eventfd2 290 19  setitimer 38 103  getitimer 36 102  capget 125 90  stat 4 -  lstat 6 -  access 21 -  pipe 22 -
poll 7 -  select 23 -  dup2 33 -  getdents 78 -  readlink 89 -  getpgrp 111 -  time 201 -  alarm 37 -  pause 34 -
epoll_create 213 -  epoll_wait 232 -
"""  # name, number on x86_64, number on aarch64
WRITING = """
ftruncate 77 46  fsync 74 82  fdatasync 75 83  fallocate 285 47  truncate 76 45  mkdirat 258 34  unlinkat 263 35
renameat 264 38  renameat2 316 276  mkdir 83 -  rmdir 84 -  unlink 87 -  rename 82 -  creat 85 -
"""
PARTLY = """clone 56 220  fcntl 72 25  ioctl 16 29  openat 257 56  open 2 -"""
FCNTL = (0, 1, 2, 3, 4, 1030)  # F_DUPFD, F_GETFD, F_SETFD, F_GETFL, F_SETFL, F_DUPFD_CLOEXEC: no signals, no locks
IOCTL = (0x5401, 0x5421, 0x541B, 0x5450, 0x5451)  # TCGETS, FIONBIO, FIONREAD, FIONCLEX, FIOCLEX
OPEN_TO_WRITE = 0o20001103  # O_WRONLY | O_RDWR | O_CREAT | O_TRUNC | O_TMPFILE

libc = ctypes.CDLL(None, use_errno=True) if sys.platform == "linux" else None


def sources() -> list[str]:
    """What the interpreter needs of the file system: its library and the system's, none below another."""
    python = [path for path in sys.path if os.path.isdir(path)] + [os.path.join(sys.base_prefix, "lib")]
    system = ["/lib", "/lib64", "/usr/lib", "/usr/lib64", "/usr/local/lib", "/usr/share/zoneinfo", "/etc/ld.so.cache"]
    paths = [path for path in dict.fromkeys(python + system) if os.path.exists(path)]
    return [path for path in paths if not any(path.startswith(other + "/") for other in paths)]


def packages() -> list[str]:
    """The folders of installed packages in `sources`, which may hold a benchmark with its solutions."""
    folders = [folder for path in sources() for folder in (path, *glob.glob(f"{path}/python3*"))]
    return [path for folder in folders for path in glob.glob(f"{folder}/*-packages") if os.path.isdir(path)]


def readable(paths: list[str], hidden: list[str]) -> list[tuple[str, bool]]:
    """Paths for Landlock, which can open folders but not close what is in them. True: to read, False: to list only."""
    rules = []
    for path in paths:
        if not any(other.startswith(f"{path}/") for other in hidden):
            rules.append((path, path not in hidden))
        else:
            rules += [(path, False), *readable([f"{path}/{name}" for name in os.listdir(path)], hidden)]
    return rules


def confine(means: str, seconds: float, memory: int) -> list[str]:
    """Give up everything that this process does not need, and return the layers that hold.

    means: "namespaces" (after `unshare`), "bwrap" (inside it) or "plain". OSError if a layer that was asked for, or
    that the kernel has, fails.
    """
    layers = [] if means == "plain" else ["namespaces"]
    if means == "namespaces":
        new_root()
    filtered = libc is not None and os.uname().machine in MACHINES
    limits(seconds, memory, alone=not filtered)
    layers.append("limits")
    if libc is None:
        return layers
    prctl(PR_SET_NO_NEW_PRIVS, 1)
    inside = means != "plain"
    landlocked = landlock([("/", True)], ["/tmp"]) if inside else landlock(readable(sources(), packages()), [])
    layers += ["landlock"] * landlocked
    drop(reads_all=landlocked and not inside)
    prctl(PR_SET_DUMPABLE, 0)  # no other process of this user can read its memory
    prctl(PR_SET_PDEATHSIG, 9)
    if filtered:
        seccomp(SYSCALLS + WRITING if inside else SYSCALLS, open_to_write=inside)
        layers.append("seccomp")
    open(os.__file__).close()  # else every import of the program would fail
    return layers


def limits(seconds: float, memory: int, alone: bool) -> None:
    """Limits of this process. alone: nothing else keeps it from making others, so this does, and from threads too."""
    most = {"CPU": int(seconds) + 1, "AS": memory, "FSIZE": SPACE, "NOFILE": FILES}
    most |= dict.fromkeys(("CORE", "MEMLOCK", "MSGQUEUE"), 0) | ({"NPROC": 1} if alone else {})
    for name, limit in most.items():
        kind = getattr(resource, f"RLIMIT_{name}", None)
        if kind is None or (name == "AS" and libc is None):  # macOS limits no memory
            continue
        hard = resource.getrlimit(kind)[1]
        limit = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
        resource.setrlimit(kind, (limit, limit))


# ---- namespaces


def unshare() -> None:
    """Leave the namespaces of the host. As an ordinary user this needs a user namespace, where the user is nobody."""
    uid, gid = os.geteuid(), os.getegid()
    if os.uname().machine not in MACHINES:
        raise OSError(f"no namespaces here on {os.uname().machine}")
    if uid == 0 and libc.unshare(NEW_NAMESPACES) == 0:
        return
    checked(libc.unshare(NEW_NAMESPACES | NEW_USER), "unshare")
    for file, content in ("setgroups", "deny"), ("uid_map", f"{NOBODY} {uid} 1"), ("gid_map", f"{NOBODY} {gid} 1"):
        with open(f"/proc/self/{file}", "w") as map:
            map.write(content)


def new_root() -> None:
    """A root that holds `sources` alone, read-only, and /tmp, which is empty, small and writable."""
    mount("none", "/", flags=RECURSIVE | PRIVATE)
    mount("tmpfs", NEW_ROOT, "tmpfs", NO_SUID | NO_DEV, "mode=755,size=1m")
    os.mkdir(f"{NEW_ROOT}/tmp")  # first, since Python may be installed there
    mount("tmpfs", f"{NEW_ROOT}/tmp", "tmpfs", NO_SUID | NO_DEV, f"mode=1777,size={SPACE},nr_inodes=1000")
    for path in sources():
        target = NEW_ROOT + path
        os.makedirs(os.path.dirname(target), exist_ok=True)
        if os.path.islink(path):
            os.symlink(os.readlink(path), target)
            continue
        os.mkdir(target) if os.path.isdir(path) else open(target, "x").close()
        mount(path, target, flags=BIND | RECURSIVE)
        locked = os.statvfs(target).f_flag & 0o16  # nosuid, nodev, noexec
        mount("none", target, flags=REMOUNT | BIND | READ_ONLY | NO_SUID | NO_DEV | locked)
    for path in packages():
        if not os.path.islink(path) and os.path.isdir(NEW_ROOT + path):
            mount("tmpfs", NEW_ROOT + path, "tmpfs", READ_ONLY, "size=4k")
    mount("none", NEW_ROOT, flags=REMOUNT | BIND | READ_ONLY | NO_SUID | NO_DEV)
    os.chdir(NEW_ROOT)
    pivot_root = {"x86_64": 155, "aarch64": 41}[os.uname().machine]
    checked(libc.syscall(pivot_root, b".", b"."), "pivot_root")
    checked(libc.umount2(b".", DETACH), "umount")
    os.chdir("/tmp")


def mount(source: str, target: str, kind: str = "none", flags: int = 0, options: str = "") -> None:
    """mount(2). OSError if it fails."""
    arguments = source.encode(), target.encode(), kind.encode(), ctypes.c_ulong(flags), options.encode() or None
    checked(libc.mount(*arguments), f"mount {target}")


# ---- Landlock, capabilities, seccomp


def landlock(to_read: list[tuple[str, bool]], to_write: list[str]) -> bool:
    """Refuse all files but these, TCP, and signals to others; False if the kernel has no Landlock (before 5.13).

    to_read: as from `readable`.
    """
    create, add, restrict = 444, 445, 446
    version = libc.syscall(create, None, ctypes.c_size_t(0), 1)
    if version < 1:
        return False
    rights = (1 << (13, 14, 15, 15)[version - 1] if version < 5 else 1 << 16) - 1
    attributes = struct.pack("QQQ", rights, 3, 3)[: 8 if version < 4 else 16 if version < 6 else 24]
    rules = checked(libc.syscall(create, attributes, ctypes.c_size_t(len(attributes)), 0), "landlock")
    allowed = [(path, LIST | READ if contents else LIST) for path, contents in to_read]
    for path, access in allowed + [(path, rights) for path in to_write]:
        access = access if os.path.isdir(path) else access & READ
        if access and os.path.exists(path):  # a dangling link is neither
            file = os.open(path, os.O_PATH)
            checked(libc.syscall(add, rules, 1, struct.pack("=Qi", access, file), 0), f"landlock {path}")
            os.close(file)
    checked(libc.syscall(restrict, rules, 0), "landlock")
    os.close(rules)
    return True


def drop(reads_all: bool) -> None:
    """Become nobody, without capabilities. reads_all: root keeps the one to read its files, as Landlock allows."""
    for capability in range(64):
        libc.prctl(PR_CAPBSET_DROP, capability, 0, 0, 0)  # refused to ordinary users, who have none
    header, current = struct.pack("Ii", 0x20080522, 0), ctypes.create_string_buffer(24)
    checked(libc.capget(header, current), "capget")
    permitted = struct.unpack("6I", current)[1]
    retained = (permitted & READ_SEARCH or permitted & OVERRIDE) if reads_all and os.geteuid() == 0 else 0
    if os.geteuid() == 0:
        prctl(PR_SET_KEEPCAPS, 1)
        with contextlib.suppress(OSError):  # in a container whose only user is a root without rights outside
            os.setgroups([])
            os.setresgid(NOBODY, NOBODY, NOBODY)
            os.setresuid(NOBODY, NOBODY, NOBODY)
    checked(libc.capset(header, struct.pack("6I", retained, retained, 0, 0, 0, 0)), "capset")


def seccomp(allowed: str, open_to_write: bool) -> None:
    """Refuse every other system call for good, and of some all but harmless arguments.

    Refused are, among others, new processes and programs, signals, sockets, ptrace, mounts, namespaces, shared memory
    and io_uring. To the C library they look like those of an older kernel: ENOSYS.
    """
    machine = os.uname().machine
    column = 1 + list(MACHINES).index(machine)

    def number(name):
        return next((int(row[column]) for row in rows(PARTLY) if row[0] == name and row[column] != "-"), None)

    load, equal, any_bit, back = 0x20, 0x15, 0x45, 0x06
    allow, refuse, kill = 0x7FFF0000, 0x00050000 | 38, 0x80000000
    program = [(load, 0, 0, 4), (equal, 1, 0, MACHINES[machine]), (back, 0, 0, kill), (load, 0, 0, 0)]
    for _, *numbers in rows(allowed):
        if numbers[column - 1] != "-":
            program += [(equal, 0, 1, int(numbers[column - 1])), (back, 0, 0, allow)]

    def partly(name, argument, tests, hit, miss):
        if number(name) is not None:
            body = [(load, 0, 0, 16 + 8 * argument)]
            for test, value in tests:
                body += [(test, 0, 1, value), (back, 0, 0, hit)]
            program.extend([(equal, 0, len(body) + 1, number(name)), *body, (back, 0, 0, miss)])

    partly("clone", 0, [(any_bit, CLONE_THREAD)], allow, refuse)
    partly("fcntl", 1, [(equal, command) for command in FCNTL], allow, refuse)
    partly("ioctl", 1, [(equal, command) for command in IOCTL], allow, refuse)
    for name, argument in ("open", 1), ("openat", 2):
        partly(name, argument, [(any_bit, 0 if open_to_write else OPEN_TO_WRITE)], refuse, allow)
    program.append((back, 0, 0, refuse))
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *step) for step in program))
    filter = struct.pack("HxxxxxxP", len(program), ctypes.addressof(code))
    prctl(PR_SET_SECCOMP, 2, filter)


def rows(table: str):
    """(name, number on x86_64, number on aarch64) of each system call in a table."""
    words = table.split()
    return zip(words[::3], words[1::3], words[2::3])


def prctl(option: int, *arguments) -> None:
    """prctl(2). OSError if it fails."""
    padded = [*arguments, *(0,) * (4 - len(arguments))]
    longs = [value if isinstance(value, bytes) else ctypes.c_ulong(value) for value in padded]
    checked(libc.prctl(option, *longs), f"prctl {option}")


def checked(result: int, what: str) -> int:
    """The result of a system call. OSError, with what was tried, if it failed."""
    if result < 0:
        error = ctypes.get_errno()
        raise OSError(error, f"{what}: {os.strerror(error)}")
    return result
