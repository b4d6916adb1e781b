"""Kernel layers that confine a completion's process: seccomp, Landlock, namespaces, a uid of its
own, limits.

Runs inside the isolated worker, which loads this file by its path: standard library only.
Interfaces: seccomp(2), landlock(7), namespaces(7), mount_namespaces(7), capabilities(7),
setrlimit(2). x86-64 and arm64 Linux; elsewhere, and where a kernel or a container refuses a layer,
its function raises OSError with the reason and the caller reports it.
"""

import ctypes
import errno
import os
import resource
import signal
import struct

libc = ctypes.CDLL(None, use_errno=True)
libc_with_lock = ctypes.PyDLL(None, use_errno=True)  # its calls keep the interpreter's lock
MACHINE = {"x86_64": 0, "aarch64": 1}.get(os.uname().machine)

# System calls that a confined Python program may make, as name:x86-64 number:arm64 number.
ALLOWED = """
    read:0:63 write:1:64 readv:19:65 writev:20:66 pread64:17:67 pwrite64:18:68 close:3:57
    close_range:436:436 fstat:5:80 newfstatat:262:79 stat:4:- lstat:6:- statx:332:291 lseek:8:62
    getdents64:217:61 access:21:- faccessat:269:48 faccessat2:439:439 readlink:89:-
    readlinkat:267:78 getcwd:79:17 chdir:80:49 fchdir:81:50 dup:32:23 dup2:33:- dup3:292:24
    pipe:22:- pipe2:293:59 poll:7:- ppoll:271:73 select:23:- pselect6:270:72 fsync:74:82
    fdatasync:75:83 ftruncate:77:46 umask:95:166 statfs:137:43 fstatfs:138:44 mmap:9:222
    munmap:11:215 mprotect:10:226 mremap:25:216 madvise:28:233 brk:12:214 msync:26:227
    futex:202:98 set_robust_list:273:99 get_robust_list:274:100 set_tid_address:218:96
    rseq:334:293 membarrier:324:283 rt_sigaction:13:134 rt_sigprocmask:14:135 rt_sigreturn:15:139
    rt_sigpending:127:136 rt_sigsuspend:130:133 rt_sigtimedwait:128:137 sigaltstack:131:132
    restart_syscall:219:128 alarm:37:- setitimer:38:103 getitimer:36:102 pause:34:- exit:60:93
    exit_group:231:94 wait4:61:260 waitid:247:95 sched_yield:24:124 sched_getaffinity:204:123
    getpid:39:172 getppid:110:173 gettid:186:178 getuid:102:174 geteuid:107:175 getgid:104:176
    getegid:108:177 getpgrp:111:- uname:63:160 sysinfo:99:179 times:100:153 getrusage:98:165
    getrlimit:97:163 setrlimit:160:164 getcpu:309:168 clock_gettime:228:113 clock_getres:229:114
    clock_nanosleep:230:115 nanosleep:35:101 gettimeofday:96:169 time:201:- getrandom:318:278
"""
REMOVAL = "unlink:87:- unlinkat:263:35 rename:82:- renameat:264:38 renameat2:316:276"
# Those that need a look at their arguments, or that this file makes itself.
OTHERS = """
    kill:62:129 tkill:200:130 tgkill:234:131 prlimit:302:261 ioctl:16:29 fcntl:72:25 clone:56:220
    clone3:435:435 open:2:- openat:257:56 seccomp:317:277 pivot_root:155:41 capget:125:90
    capset:126:91 landlock_create:444:444 landlock_add:445:445 landlock_restrict:446:446
"""
DESCRIPTOR_COMMANDS = (0, 1, 2, 3, 4, 1030)  # of fcntl: copies and flags; no locks, no signals
CAP_DAC_OVERRIDE, CAP_FOWNER, CAP_KILL, CAP_SETGID, CAP_SETUID = 1, 3, 5, 6, 7


def check(result: int, what: str) -> int:
    """The result of a libc call; OSError with errno and the call's name if it is negative."""
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")
    return result


def numbers(table: str) -> dict[str, int]:
    """Call → its number on this machine; the calls that it does not have are left out."""
    rows = [row.split(":") for row in table.split()]
    column = 1 + (MACHINE or 0)
    return {row[0]: int(row[column]) for row in rows if row[column] != "-"}


CALLS = numbers(OTHERS)


def syscall(call: str, *args: object) -> int:
    words = [ctypes.c_long(a) if isinstance(a, int) else a for a in (CALLS[call], *args)]
    return check(libc.syscall(*words), call)


# ---- seccomp -------------------------------------------------------------------------------------
OWN_PID = 0x7FABCDEF  # stands in a program for the pid of the process that installs it


LOAD, RETURN = 0x20, 0x06  # instructions of struct sock_filter; its tests
EQUAL, AT_LEAST, ANY_BIT = 0x15, 0x35, 0x45
ALLOW = 0x7FFF0000
ERRNO = 0x00050000
KILL_PROCESS = 0x80000000
NUMBER, ARCHITECTURE, ARGUMENTS = 0, 4, 16  # offsets in struct seccomp_data
O_TMPFILE = 0x00400000
CLONE_THREAD = 0x00010000
CLONE_PARENT = 0x8000
ANY_NAMESPACE = 0x7E020000  # of clone's flags


def step(code: int, value: int, yes: int = 0, no: int = 0) -> bytes:
    """One instruction; a test skips `yes` or `no` instructions."""
    return struct.pack("HBBI", code, yes, no, value)


PERMIT = step(RETURN, ALLOW)
REFUSE = step(RETURN, ERRNO | errno.EPERM)


def when(call: str, *steps: bytes) -> list[bytes]:
    """These steps for the call, if this machine has it."""
    if call not in CALLS:
        return []
    return [step(EQUAL, CALLS[call], 0, len(steps)), *steps]


def argument(number: int) -> bytes:
    return step(LOAD, ARGUMENTS + 8 * number)


def permitted(table: str) -> list[bytes]:
    """Permit calls by ranges of numbers: the kernel tries every call when the filter is installed,
    so that few steps count.
    """
    calls = sorted(numbers(table).values())
    firsts = [call for call in calls if call - 1 not in calls]
    lasts = [call for call in calls if call + 1 not in calls]
    program = []
    for first, last in zip(firsts, lasts):
        program += [step(AT_LEAST, first, 0, 2), step(AT_LEAST, last + 1, 1), PERMIT]
    return program


def seccomp_program(removal: bool) -> bytes:
    """A BPF allow-list: `ALLOWED`, signals to OWN_PID alone, its own limits, threads but no
    processes; else EPERM.

    `removal`: files may be removed, renamed and made without a name; else no file can escape from a
    directory's listing. clone3 answers ENOSYS, so that libc falls back to clone, whose flags a
    filter can read; ioctl answers ENOTTY.
    """
    if MACHINE is None:
        raise OSError(f"no system call table for {os.uname().machine}")
    program = [
        step(LOAD, ARCHITECTURE),
        step(EQUAL, (0xC000003E, 0xC00000B7)[MACHINE], 1),
        step(RETURN, KILL_PROCESS),
        step(LOAD, NUMBER),
        *permitted(ALLOWED + REMOVAL if removal else ALLOWED),
    ]
    for call in ("kill", "tkill", "tgkill", "prlimit"):
        itself = step(EQUAL, 0 if call == "prlimit" else OWN_PID, 0, 1)
        program += when(call, argument(0), itself, PERMIT, REFUSE)
    nameless = step(ANY_BIT, O_TMPFILE, 0 if removal else 1)
    for call, flags in (("open", 1), ("openat", 2)):
        program += when(call, argument(flags), nameless, PERMIT, REFUSE)
    left = range(len(DESCRIPTOR_COMMANDS), 0, -1)
    known = [step(EQUAL, command, n) for command, n in zip(DESCRIPTOR_COMMANDS, left)]
    program += when("fcntl", argument(1), *known, REFUSE, PERMIT)
    process = step(ANY_BIT, CLONE_THREAD, 0, 1)
    program += when("clone", argument(0), step(ANY_BIT, ANY_NAMESPACE, 2), process, PERMIT, REFUSE)
    program += when("clone3", step(RETURN, ERRNO | errno.ENOSYS))
    program += when("ioctl", step(RETURN, ERRNO | errno.ENOTTY))
    return b"".join([*program, REFUSE])


def install_seccomp(program: bytes, pid: int) -> None:
    """Filter this thread's system calls and those of all it starts; needs no_new_privs."""
    program = program.replace(struct.pack("I", OWN_PID), struct.pack("I", pid))
    code = ctypes.create_string_buffer(program, len(program))
    header = struct.pack("HxxxxxxQ", len(program) // 8, ctypes.addressof(code))
    syscall("seccomp", 1, 0, header)  # SECCOMP_SET_MODE_FILTER


# ---- Landlock ------------------------------------------------------------------------------------
WRITE_FILE = 1 << 1
READ_FILE = 1 << 2
READ_DIR = 1 << 3
REMOVE_FILE = 1 << 5
MAKE_REG = 1 << 8
TRUNCATE = 1 << 14
RIGHTS = (0, 13, 14, 15, 15, 16)  # that an ABI knows


def landlock_ruleset(readable: list[str], hidden: list[str], scratch: str) -> int:
    """A ruleset's descriptor: read `readable` without `hidden`, use plain files in `scratch` and
    the null device.

    No TCP (ABI 4), no signals or abstract sockets to the outside (ABI 6), no device ioctl (ABI 5).
    `scratch` stays flat: no directories, links, FIFOs or devices can be made in it. Raises OSError
    if the kernel has no Landlock.
    """
    abi = syscall("landlock_create", 0, 0, 1)
    rights = (1 << RIGHTS[min(abi, 5)]) - 1
    of_files_tcp_and_scopes = struct.pack("QQQ", rights, 3, 3)
    attributes = of_files_tcp_and_scopes[: 8 * (1 + (abi >= 4) + (abi >= 6))]
    ruleset = syscall("landlock_create", attributes, len(attributes), 0)
    in_scratch = READ_FILE | READ_DIR | WRITE_FILE | REMOVE_FILE | MAKE_REG | TRUNCATE
    granted = dict.fromkeys(without_hidden(readable, hidden), READ_FILE | READ_DIR)
    granted |= {os.devnull: in_scratch, scratch: in_scratch}
    for path, access in granted.items():
        beneath = os.open(path, os.O_PATH | os.O_CLOEXEC)
        if not os.path.isdir(path):
            access &= READ_FILE | WRITE_FILE | TRUNCATE
        access &= rights
        syscall("landlock_add", ruleset, 1, struct.pack("=QI", access, beneath), 0)
        os.close(beneath)
    return ruleset


def without_hidden(paths: list[str], hidden: list[str]) -> list[str]:
    """The paths, each that is above a hidden one replaced by what it contains; those that do not
    exist left out.
    """
    kept = []
    for path in paths:
        if any(away.startswith(f"{path}/") for away in hidden):
            inner = [f"{path}/{name}" for name in os.listdir(path)]
            kept += without_hidden(inner, hidden)
        elif path not in hidden and os.path.exists(path):
            kept.append(path)
    return kept


# ---- namespaces ----------------------------------------------------------------------------------
NEWUSER = 0x10000000
NAMESPACES = 0x20000 | 0x4000000 | 0x8000000 | 0x20000000 | 0x40000000  # mount, UTS, IPC, pid, net
RDONLY, NOSUID, NODEV, NOEXEC, REMOUNT, BIND = 1, 2, 4, 8, 32, 4096
REC, PRIVATE, DETACH = 16384, 1 << 18, 2
LOCKED = NOSUID | NODEV | NOEXEC | 1024 | 2048  # in a user namespace; the last two are atime's


def mount(source: str, target: str, kind: str, flags: int, data: str = "") -> None:
    names = [name.encode() for name in (source, target, kind)]
    check(libc.mount(*names, ctypes.c_ulong(flags), data.encode()), f"mount {target}")


def seal(target: str, flags: int = NODEV) -> None:
    """Make a mount read-only."""
    mount("none", target, "", BIND | REMOUNT | RDONLY | NOSUID | flags)


def unshare() -> None:
    """New mount, pid, network, IPC and UTS namespaces; without root also a user namespace, uid and
    gid mapped alone.
    """
    uid, gid = os.geteuid(), os.getegid()
    check(libc.unshare(NAMESPACES | (NEWUSER if uid else 0)), "unshare")
    identity = {"setgroups": "deny", "uid_map": f"{uid} {uid} 1", "gid_map": f"{gid} {gid} 1"}
    for name, line in identity.items() if uid else ():
        with open(f"/proc/self/{name}", "w") as file:
            file.write(line)


def change_root(base: str, readable: list[str], hidden: list[str], disk_bytes: int) -> None:
    """Make `base` the root: `readable` bound read-only, /scratch a tmpfs of `disk_bytes`, and
    nothing else, no /proc.

    Over each of `hidden`, directories below readable ones, lies an empty one; a readable path may
    be in that.
    """
    mount("none", "/", "", REC | PRIVATE)
    os.umask(0o022)  # the root's directories are for every uid to pass through
    mount("tmpfs", base, "tmpfs", NOSUID | NODEV, "size=1m,mode=755")
    for path in sorted(readable):
        target = base + path
        if os.path.lexists(target):
            continue
        if os.path.isdir(path):
            os.makedirs(target)
        else:
            os.makedirs(os.path.dirname(target), exist_ok=True)
            open(target, "w").close()
        mount(path, target, "", BIND | REC)
        seal(target, os.statvfs(path).f_flag & LOCKED)
        for away in hidden:
            if away.startswith(f"{path}/"):
                mount("tmpfs", base + away, "tmpfs", NOSUID | NODEV, "size=1m,mode=755")
    for path in hidden:
        seal(base + path)
    scratch = f"{base}/scratch"
    size = f"size={disk_bytes},nr_inodes=1k,mode=700"
    os.mkdir(scratch)
    mount("tmpfs", scratch, "tmpfs", NOSUID | NODEV | NOEXEC, size)
    os.chdir(base)
    syscall("pivot_root", b".", b".")
    check(libc.umount2(b".", DETACH), "umount2")
    seal("/")
    os.chdir("/")
    os.umask(0o077)


# ---- in the job's process ------------------------------------------------------------------------
PDEATHSIG, DUMPABLE, NO_NEW_PRIVS, SUBREAPER = 1, 4, 38, 36


def prctl(option: int, value: int) -> None:
    check(libc.prctl(option, ctypes.c_ulong(value), 0, 0, 0), f"prctl {option}")


def keep_capabilities(*kept: int) -> None:
    """Drop every capability but these, of those that this process has."""
    header = struct.pack("II", 0x20080522, 0)
    had = ctypes.create_string_buffer(24)
    syscall("capget", header, had)
    permitted_now = struct.unpack_from("I", had, 4)[0]
    mask = permitted_now & sum(1 << capability for capability in kept)
    syscall("capset", header, struct.pack("II16x", mask, mask))


def drop_privileges(uid: int, keep_files: bool = False) -> None:
    """Become `uid` for good (0: stay who one is), without any capability.

    `keep_files`: only as the real user, whose processes and threads are counted; files are accessed
    as before. Root that becomes another user loses its capabilities by that, capabilities(7).
    """
    if uid and not keep_files:
        os.setgroups([])
        os.setresgid(uid, uid, uid)
        os.setresuid(uid, uid, uid)
    else:
        os.setresuid(uid or -1, -1, -1)
        keep_capabilities()
    prctl(PDEATHSIG, 9)  # SIGKILL: the kernel clears it when the uid changes


def fork_beside() -> int:
    """Fork, as a sibling of this process, whose parent alone can wait for it (clone(2),
    CLONE_PARENT).
    """
    ctypes.pythonapi.PyOS_BeforeFork()
    pid = libc_with_lock.syscall(CALLS["clone"], CLONE_PARENT | signal.SIGCHLD, 0, 0, 0, 0)
    if not pid:
        ctypes.pythonapi.PyOS_AfterFork_Child()
    else:
        ctypes.pythonapi.PyOS_AfterFork_Parent()
    return check(pid, "clone")


def limit(cpu_seconds: int, address_bytes: int, file_bytes: int, processes: int | None) -> None:
    """Limit CPU seconds, address space, file size, processes and threads, …; no core dumps.

    The stack's soft limit alone may be raised. The gap below the stack that exec reserves is at
    least 128 MB.
    """
    limits = {
        resource.RLIMIT_CPU: cpu_seconds,
        resource.RLIMIT_AS: address_bytes,
        resource.RLIMIT_FSIZE: file_bytes,
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_NOFILE: 64,
        resource.RLIMIT_MEMLOCK: 0,
        resource.RLIMIT_STACK: 100 << 20,
    }
    if processes is not None:
        limits[resource.RLIMIT_NPROC] = processes
    for name, soft in limits.items():
        hard = resource.getrlimit(name)[1]
        if hard != resource.RLIM_INFINITY:
            soft = min(soft, hard)
        resource.setrlimit(name, (soft, hard if name == resource.RLIMIT_STACK else soft))
