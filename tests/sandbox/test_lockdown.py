"""The walls by themselves: the seccomp program is read back by a small BPF machine, twice."""

from __future__ import annotations

import errno
import re
import struct
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fledge.sandbox import lockdown
from fledge.sandbox.lockdown import ALLOWED, MACHINES, RULES, seccomp_filter

EPERM = lockdown.RET_ERRNO | errno.EPERM
BOTH = pytest.mark.parametrize("machine", list(MACHINES))
HEADERS = {
    "x86_64": Path("/usr/include/x86_64-linux-gnu/asm/unistd_64.h"),
    "aarch64": Path("/usr/include/asm-generic/unistd.h"),
}


NEVER = """
open openat openat2 stat newfstatat statx execve execveat socket connect clone clone3 fork kill
tkill tgkill ptrace prctl seccomp bpf io_uring_setup mount unshare setns chroot ioctl fcntl dup
pipe2 memfd_create userfaultfd process_vm_readv pidfd_open setrlimit prlimit64 setuid setresuid
capset keyctl perf_event_open init_module reboot personality
"""


def verdict(program: bytes, number: int, arch: int, arguments: tuple[int, ...] = ()) -> int:
    """What the kernel would answer: the readable twin of its interpreter."""
    data = struct.pack("=IIQ6Q", number, arch, 0, *(*arguments, *[0] * 6)[:6])
    accumulator, position = 0, 0
    while True:
        code, true, false, k = struct.unpack_from("=HBBI", program, 8 * position)
        position += 1
        match code:
            case lockdown.LD:
                (accumulator,) = struct.unpack_from("=I", data, k)
            case lockdown.AND:
                accumulator &= k
            case lockdown.JEQ:
                position += true if accumulator == k else false
            case lockdown.JGE:
                position += true if accumulator >= k else false
            case lockdown.RET:
                return k
            case _:
                raise AssertionError(f"instruction {code:#x}")


@BOTH
def test_only_the_listed_calls_pass(machine: str) -> None:
    kind, program = MACHINES[machine], seccomp_filter(machine)
    listed = {numbers[kind.column] for numbers in ALLOWED.values()}
    ruled = {rule.numbers[kind.column] for rule in RULES.values()}
    assert not listed & ruled
    for number in range(1200):
        expected = lockdown.RET_ALLOW if number in listed else EPERM
        if number not in ruled:
            assert verdict(program, number, kind.audit_arch) == expected, number
    assert len(program) // 8 <= 4096


@BOTH
def test_rules_look_at_their_argument(machine: str) -> None:
    kind, program = MACHINES[machine], seccomp_filter(machine)

    def allowed(name: str, value: int) -> bool:
        rule = RULES[name]
        # 0xFFF2: flags of a private mapping for mmap, anything for the others
        arguments = tuple(value if i == rule.argument else 0xFFF2 for i in range(6))
        number = rule.numbers[kind.column]
        return verdict(program, number, kind.audit_arch, arguments) == lockdown.RET_ALLOW

    for name in ("mmap", "mprotect"):
        assert [allowed(name, protection) for protection in range(8)] == [True] * 4 + [False] * 4
    assert allowed("futex", 0) and allowed("futex", 128 | 9) and allowed("futex", 1 | 128 | 256)
    assert not any(allowed("futex", op | 128) for op in (3, 4, 5, 6, 7, 8, 11, 12, 13))
    assert allowed("clock_gettime", 1) and not allowed("clock_gettime", 0xFFFFFFFA)
    assert allowed("madvise", 4) and not allowed("madvise", 100)
    mmap = RULES["mmap"].numbers[kind.column]
    for flags in (0x20, 0x21, 0x23, 0x28):  # no type, shared, shared and validated, unknown
        denied = verdict(program, mmap, kind.audit_arch, (0, 4096, 3, flags, 0, 0))
        assert denied != lockdown.RET_ALLOW, hex(flags)


@BOTH
@given(
    number=st.integers(0, 2**32 - 1),
    arch=st.integers(0, 2**32 - 1),
    arguments=st.tuples(*[st.integers(0, 2**64 - 1)] * 6),
)
def test_the_program_always_ends_and_strange_machines_die(
    machine: str, number: int, arch: int, arguments: tuple[int, ...]
) -> None:
    kind, program = MACHINES[machine], seccomp_filter(machine)
    if arch != kind.audit_arch:
        assert verdict(program, number, arch, arguments) == lockdown.RET_KILL_PROCESS
    answer = verdict(program, number, kind.audit_arch, arguments)
    assert answer in (lockdown.RET_ALLOW, EPERM, lockdown.RET_KILL_PROCESS)
    if number >= 2000:
        assert answer != lockdown.RET_ALLOW
    if kind.x32 and number >= lockdown.X32_BIT:
        assert answer == lockdown.RET_KILL_PROCESS


@BOTH
def test_numbers_are_those_of_the_headers(machine: str) -> None:
    header = HEADERS[machine]
    if not header.is_file():
        pytest.skip(f"needs the kernel's headers ({header})")
    text = header.read_text()
    found = dict(re.findall(r"#define __NR(?:3264)?_(\w+)\s+(\d+)", text))
    column = MACHINES[machine].column
    tables = {**ALLOWED, **{name: rule.numbers for name, rule in RULES.items()}}
    for name, numbers in tables.items():
        number = numbers[column]
        assert number is None or int(found[name]) == number, name


@BOTH
@pytest.mark.parametrize(
    "name",
    NEVER.split(),
)
def test_what_must_never_be_on_the_list(machine: str, name: str) -> None:
    header = HEADERS[machine]
    if not header.is_file():
        pytest.skip(f"needs the kernel's headers ({header})")
    number = re.search(rf"#define __NR(?:3264)?_{name}\s+(\d+)", header.read_text())
    kind = MACHINES[machine]
    if number is not None:
        assert verdict(seccomp_filter(machine), int(number[1]), kind.audit_arch) == EPERM


def test_landlock_denies_what_each_version_knows() -> None:
    sizes = {abi: len(lockdown.landlock_attributes(abi)) for abi in range(1, 9)}
    assert sizes == {1: 8, 2: 8, 3: 8, 4: 16, 5: 16, 6: 24, 7: 24, 8: 24}
    files = [struct.unpack_from("=Q", lockdown.landlock_attributes(abi))[0] for abi in range(1, 7)]
    assert [f.bit_length() for f in files] == [13, 14, 15, 15, 16, 16]
    assert struct.unpack("=QQQ", lockdown.landlock_attributes(6))[1:] == (0b11, 0b11)
