"""How a Linux process gives up everything but computing: limits, Landlock and a seccomp filter.

Pure ctypes, no library and no privilege: works as any user and inside the default profiles of
Docker and Podman. Used by `fledge.sandbox.process_server` only, in a process of its own that is
thrown away; a process that called `lock` can never do more again. Every step that the kernel
refuses raises OSError: half a lockdown is none. What each wall is for:

- rlimits: address space, processor time, no file, no core, no process, no further descriptor;
- no_new_privs and not dumpable: no set-user-id program, and no debugger of the same user;
- Landlock: no file, no TCP (ABI 4), no signal and no abstract socket outside (ABI 6);
- seccomp: a list of system calls that computing needs. Nothing on it takes a path, makes a
  descriptor, a process or a thread, sends a signal, or maps memory that is shared or can be
  executed.

Sources: Linux Documentation/userspace-api/{landlock,seccomp_filter,no_new_privs}.rst and the
headers named below. This module never runs anything itself and keeps no state.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import resource
import signal
import struct
from dataclasses import dataclass

# <linux/prctl.h>
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_SECCOMP = 1, 4, 22
PR_SET_CHILD_SUBREAPER, PR_SET_NO_NEW_PRIVS = 36, 38
SECCOMP_MODE_FILTER = 2
# <asm-generic/unistd.h>: the numbers of these calls are the same on every architecture
LANDLOCK_CREATE_RULESET, LANDLOCK_RESTRICT_SELF, CLOSE_RANGE = 444, 446, 436
LANDLOCK_CREATE_RULESET_VERSION = 1
# <linux/seccomp.h>
RET_KILL_PROCESS, RET_ERRNO, RET_ALLOW = 0x80000000, 0x00050000, 0x7FFF0000
# <linux/bpf_common.h>: load a word, and with a constant, jump if equal / not below, return
LD, AND, JEQ, JGE, RET = 0x20, 0x54, 0x15, 0x35, 0x06
NR, ARCH, ARGS = 0, 4, 16  # offsets in struct seccomp_data; the low word of an argument is first
X32_BIT = 0x40000000

PROT_EXEC = 4
MMAP, MAP_TYPE, MAP_PRIVATE = (9, 222), 0x0F, 2  # <asm-generic/mman-common.h>
LAST_FD = 3  # of a locked process: null, standard output, standard error, its result


@dataclass(frozen=True)
class Machine:
    """One architecture: its audit name, whether x32 calls exist, its column in the tables."""

    audit_arch: int
    x32: bool
    column: int


MACHINES = {  # <linux/audit.h>
    "x86_64": Machine(audit_arch=0xC000003E, x32=True, column=0),
    "aarch64": Machine(audit_arch=0xC00000B7, x32=False, column=1),
}

# name: (x86-64, aarch64), from asm/unistd_64.h and asm-generic/unistd.h
ALLOWED: dict[str, tuple[int | None, int | None]] = {
    "read": (0, 63),
    "write": (1, 64),
    "close": (3, 57),
    "fstat": (5, 80),
    "lseek": (8, 62),
    "munmap": (11, 215),
    "brk": (12, 214),
    "mremap": (25, 216),
    "rt_sigaction": (13, 134),
    "rt_sigprocmask": (14, 135),
    "rt_sigreturn": (15, 139),
    "sigaltstack": (131, 132),
    "restart_syscall": (219, 128),
    "nanosleep": (35, 101),
    "gettimeofday": (96, 169),
    "time": (201, None),
    "times": (100, 153),
    "getrusage": (98, 165),
    "getrandom": (318, 278),
    "sched_yield": (24, 124),
    "getpid": (39, 172),
    "getppid": (110, 173),
    "gettid": (186, 178),
    "getuid": (102, 174),
    "geteuid": (107, 175),
    "getgid": (104, 176),
    "getegid": (108, 177),
    "exit": (60, 93),
    "exit_group": (231, 94),
}


@dataclass(frozen=True)
class Rule:
    """A call that is allowed only while `argument & mask` is one of `values`."""

    numbers: tuple[int, int]
    argument: int
    mask: int
    values: tuple[int, ...]


# clocks of the machine and of the caller; a negative one would read another process's
_CLOCKS = (0, 1, 2, 3, 4, 5, 6, 7, 11)
RULES: dict[str, Rule] = {
    "mmap": Rule(MMAP, 2, PROT_EXEC, (0,)),
    "mprotect": Rule((10, 226), 2, PROT_EXEC, (0,)),
    # DONTNEED, FREE, NOHUGEPAGE: what allocators use; huge pages hold more than the limit counts
    "madvise": Rule((28, 233), 2, 0xFFFFFFFF, (4, 8, 15)),
    # WAIT, WAKE and their BITSET forms, private or not, any clock; the others have had holes
    "futex": Rule((202, 98), 1, 0xFFFFFFFF & ~(128 | 256), (0, 1, 9, 10)),
    "clock_gettime": Rule((228, 113), 0, 0xFFFFFFFF, _CLOCKS),
    "clock_getres": Rule((229, 114), 0, 0xFFFFFFFF, _CLOCKS),
    "clock_nanosleep": Rule((230, 115), 0, 0xFFFFFFFF, _CLOCKS),
}


def seccomp_filter(machine: str) -> bytes:
    """The filter program for `machine` as an array of struct sock_filter.

    Another architecture's or an x32 call kills the process; a call that is not listed gives EPERM.
    """
    kind = MACHINES[machine]
    program = [
        (LD, 0, 0, ARCH),
        (JEQ, 1, 0, kind.audit_arch),
        (RET, 0, 0, RET_KILL_PROCESS),
        (LD, 0, 0, NR),
    ]
    if kind.x32:
        program += [(JGE, 0, 1, X32_BIT), (RET, 0, 0, RET_KILL_PROCESS)]
    for numbers in ALLOWED.values():
        number = numbers[kind.column]
        if number is not None:
            program += [(JEQ, 0, 1, number), (RET, 0, 0, RET_ALLOW)]
    deny = (RET, 0, 0, RET_ERRNO | errno.EPERM)
    program += [  # shared memory outlives its mapping: RLIMIT_AS would not bound it
        (JEQ, 0, 5, MMAP[kind.column]),
        (LD, 0, 0, ARGS + 8 * 3),
        (AND, 0, 0, MAP_TYPE),
        (JEQ, 1, 0, MAP_PRIVATE),
        deny,
        (LD, 0, 0, NR),
    ]
    for rule in RULES.values():
        test = [(LD, 0, 0, ARGS + 8 * rule.argument), (AND, 0, 0, rule.mask)]
        for value in rule.values:
            test += [(JEQ, 0, 1, value), (RET, 0, 0, RET_ALLOW)]
        test.append(deny)
        program += [(JEQ, 0, len(test), rule.numbers[kind.column]), *test]
    program.append(deny)
    return b"".join(struct.pack("=HBBI", *instruction) for instruction in program)


def landlock_abi() -> int:
    """The version of Landlock that the kernel offers; 0 where there is none or it is off."""
    try:
        return _call(_libc(), LANDLOCK_CREATE_RULESET, 0, 0, LANDLOCK_CREATE_RULESET_VERSION)
    except OSError:
        return 0


def landlock_attributes(abi: int) -> bytes:
    """struct landlock_ruleset_attr that handles, so denies, all that version `abi` knows.

    Files: 13 rights, then REFER (2), TRUNCATE (3), IOCTL_DEV (5); TCP bind and connect (4);
    abstract sockets and signals (6). Later versions get what version 6 has.
    """
    rights = 13 + (abi >= 2) + (abi >= 3) + (abi >= 5)
    attributes = struct.pack("=Q", (1 << rights) - 1)
    if abi >= 4:
        attributes += struct.pack("=Q", 0b11)
    if abi >= 6:
        attributes += struct.pack("=Q", 0b11)
    return attributes


@dataclass(frozen=True)
class Lock:
    """What is prepared once and applied by every process that is locked."""

    ruleset: int  # descriptor of the Landlock ruleset
    filter: ctypes.Array[ctypes.c_char]
    libc: ctypes.CDLL


def prepare() -> Lock:
    """Builds the ruleset and the filter; OSError where the kernel has no Landlock."""
    libc = _libc()
    attributes = landlock_attributes(landlock_abi())
    ruleset = _call(libc, LANDLOCK_CREATE_RULESET, attributes, len(attributes), 0)
    program = seccomp_filter(platform.machine())
    return Lock(ruleset, ctypes.create_string_buffer(program, len(program)), libc)


def harden_server() -> int:
    """What the fork server gives up for itself and its children; its user id afterwards.

    A root server becomes nobody where it may; where it may not (no CAP_SETUID) it keeps the user
    id and loses every capability. Raises OSError if anything else is refused.
    """
    libc = _libc()
    try:  # if memory runs out on the machine, this goes first and not its parent
        with open("/proc/self/oom_score_adj", "w", encoding="ascii") as file:
            file.write("1000")
    except OSError:
        pass  # no /proc, or not ours to write: only a preference
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    _prctl(libc, PR_SET_NO_NEW_PRIVS, 1)
    if os.geteuid() == 0:
        try:
            os.setgroups([])
            os.setresgid(65534, 65534, 65534)
            os.setresuid(65534, 65534, 65534)
        except OSError:
            pass  # said by `fledge doctor`; the other walls do not rest on it
    header = struct.pack("=Ii", 0x20080522, 0)  # _LINUX_CAPABILITY_VERSION_3
    _checked("capset", libc.capset(header, bytes(24)))
    _prctl(libc, PR_SET_DUMPABLE, 0)
    _prctl(libc, PR_SET_CHILD_SUBREAPER, 1)
    return os.geteuid()


def lock(prepared: Lock, *, memory_bytes: int, cpu_seconds: int, parent: int) -> None:
    """Locks the calling process down for good; closes every descriptor above LAST_FD.

    `memory_bytes` bounds the whole address space, `parent` is who must be alive still. Raises
    OSError if a step is refused; the caller must then leave without running anything.
    """
    os.setsid()
    _prctl(prepared.libc, PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        raise OSError(errno.ESRCH, "the fork server is gone")
    _prctl(prepared.libc, PR_SET_NO_NEW_PRIVS, 1)
    _prctl(prepared.libc, PR_SET_DUMPABLE, 0)
    _call(prepared.libc, LANDLOCK_RESTRICT_SELF, prepared.ruleset, 0)
    _call(prepared.libc, CLOSE_RANGE, LAST_FD + 1, 0xFFFFFFFF, 0)
    for kind, most in (
        (resource.RLIMIT_AS, memory_bytes),
        (resource.RLIMIT_CPU, cpu_seconds),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_NPROC, 0),
        (resource.RLIMIT_NOFILE, LAST_FD + 1),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_MEMLOCK, 0),
        (resource.RLIMIT_MSGQUEUE, 0),
        (resource.RLIMIT_SIGPENDING, 0),
    ):
        hard = resource.getrlimit(kind)[1]
        bound = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(kind, (bound, bound))
    program = prepared.filter
    fprog = struct.pack("@HP", len(program) // 8, ctypes.addressof(program))
    _prctl(prepared.libc, PR_SET_SECCOMP, SECCOMP_MODE_FILTER, fprog)


def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def _prctl(libc: ctypes.CDLL, option: int, *arguments: int | bytes) -> None:
    words = [*arguments, 0, 0, 0, 0][:4]
    _checked(f"prctl {option}", libc.prctl(option, *map(_word, words)))


def _call(libc: ctypes.CDLL, number: int, *arguments: int | bytes) -> int:
    return _checked(f"system call {number}", libc.syscall(number, *map(_word, arguments)))


def _word(argument: int | bytes) -> ctypes.c_ulong | bytes:
    return argument if isinstance(argument, bytes) else ctypes.c_ulong(argument)


def _checked(name: str, result: int) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")
    return result
