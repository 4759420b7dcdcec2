"""Writing files so that a crash, a full disk or a read-only folder never leaves half of one.

Every writer goes to `NAME.tmp`, syncs it and renames it over the target; a folder is built as
`NAME.tmp/` and renamed when it is whole. What the operating system refuses becomes a `UserError`
in words. Called by everything that writes results (run, tokenizer, data, train, report). It never
knows what is in a file and never builds the path of one.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from fledge.errors import FledgeError, UserError

TEMPORARY = ".tmp"
_FULL = {errno.ENOSPC, errno.EDQUOT}
_FORBIDDEN = {errno.EROFS, errno.EACCES, errno.EPERM}


def canonical_json(value: Any) -> str:
    """The one compact JSON text of a value: sorted keys, no spaces; what fingerprints hash."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def write_bytes(path: Path, data: bytes) -> None:
    """Put `data` at `path` whole or not at all; missing folders are made."""
    temporary = path.with_name(path.name + TEMPORARY)
    with refusals(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(temporary, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(OSError):
                temporary.unlink()
            raise
        sync_directory(path.parent)


def write_text(path: Path, text: str) -> None:
    """Put UTF-8 text with Unix line ends at `path` whole or not at all."""
    write_bytes(path, text.encode("utf-8"))


def write_json(path: Path, value: Any) -> None:
    """Put readable JSON (two spaces, keys in the given order) at `path` whole or not at all."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: Path, keys: Mapping[str, Any] | None = None, *, fix: str) -> Any:
    """The JSON value at `path`; UserError with this `fix` if it is damaged.

    keys: entries, with their types, that the value must have; it must be an object then.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        if keys is not None and not isinstance(value, dict):
            raise ValueError(f"it holds a {type(value).__name__} instead of an object")
        for key, kind in (keys or {}).items():
            if not isinstance(value.get(key), kind):
                raise ValueError(f"its entry {key!r} is missing or of a wrong kind")
    except ValueError as error:
        raise UserError(f"{path} is damaged", str(error), fix) from None
    return value


@contextlib.contextmanager
def atomic_directory(path: Path) -> Iterator[Path]:
    """Yield an empty `NAME.tmp` folder that becomes `path` when the block ends well.

    An existing `path` is replaced; on any error the temporary folder is removed and `path` is as
    it was before.
    """
    temporary = path.with_name(path.name + TEMPORARY)
    old = path.with_name(path.name + ".old" + TEMPORARY)
    with refusals(path):
        for leftover in (temporary, old):
            remove(leftover)
        temporary.mkdir(parents=True)
        try:
            yield temporary
            _sync_tree(temporary)
            if path.exists():
                os.rename(path, old)
            os.rename(temporary, path)
        except BaseException:
            remove(temporary)
            if old.exists() and not path.exists():
                os.rename(old, path)
            raise
        sync_directory(path.parent)
        remove(old)


def sync_directory(path: Path) -> None:
    """Make the names in a folder durable (where the platform can)."""
    if os.name != "posix":
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sync_tree(folder: Path) -> None:
    for parent, _, names in os.walk(folder):
        for name in names:
            with open(Path(parent) / name, "rb+") as file:
                os.fsync(file.fileno())
        sync_directory(Path(parent))


def remove(path: Path) -> None:
    """Delete a file or a folder if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def remove_whole(folder: Path) -> None:
    """Delete a folder so that a crash leaves all of it or none: first it gets a temporary name."""
    with refusals(folder):
        aside = folder.with_name(folder.name + TEMPORARY)
        remove(aside)
        os.rename(folder, aside)
        remove(aside)


def remove_temporary(folder: Path) -> list[Path]:
    """Delete what a crash left behind (`*.tmp`) anywhere below `folder`; says what it removed.

    A folder that was moved aside (`NAME.old.tmp`) comes back if its replacement never arrived.
    """
    removed = []
    for parent, folders, names in os.walk(folder):
        for name in [n for n in folders + names if n.endswith(TEMPORARY)]:
            path = Path(parent) / name
            target = path.with_name(name.removesuffix(".old" + TEMPORARY))
            if target.name != name and not target.exists():
                os.rename(path, target)
                continue
            remove(path)
            removed.append(path)
        folders[:] = [n for n in folders if not n.endswith(TEMPORARY)]
    return removed


def require_free_bytes(folder: Path, needed: int, *, purpose: str = "a checkpoint") -> None:
    """Raise UserError if the disk that holds `folder` has less than `needed` bytes free."""
    place = folder
    while not place.exists() and place != place.parent:
        place = place.parent
    free = shutil.disk_usage(place).free
    if free < needed:
        raise UserError(
            f"not enough disk space for {purpose}",
            f"{folder} has {_size(free)} free and about {_size(needed)} are needed",
            "free some space or choose another place with --out DIR",
        )


def _size(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


@contextlib.contextmanager
def refusals(path: Path) -> Iterator[None]:
    """Turn what the operating system refuses about `path` into a UserError."""
    try:
        yield
    except FledgeError:
        raise
    except Exception as error:
        user_error = disk_full(error, path)
        if user_error is None and isinstance(error, OSError):
            user_error = _explain(path, error)
        if user_error is None:
            raise
        raise user_error from error


def disk_full(error: Exception, path: Path | None = None) -> UserError | None:
    """The words for an error that means a full disk, or None if it means something else."""
    # safetensors and pyarrow report a full disk in their own exception types
    told = "No space left on device" in str(error) or "os error 28" in str(error)
    if not told and getattr(error, "errno", None) not in _FULL:
        return None
    name = path or getattr(error, "filename", None)
    return UserError(
        f"cannot write {name}" if name else "cannot write",
        "the disk is full",
        "free some space, or run again with --out DIR on another disk; finished work is kept",
    )


def _explain(path: Path, error: OSError) -> UserError | None:
    if error.errno in _FORBIDDEN:
        reason = "the file system is read-only" if error.errno == errno.EROFS else "no permission"
        return UserError(
            f"cannot write {path}", reason, "choose a folder that you may write to with --out DIR"
        )
    if error.errno in (errno.ENOTDIR, errno.EEXIST, errno.EISDIR, errno.ENOENT):
        return UserError(
            f"cannot write {path}",
            os.strerror(error.errno).lower(),
            "choose another folder with --out DIR",
        )
    return None


def take_lock(path: Path, out: Path) -> int:
    """Lock the run for this process; the system frees it when the process ends, however it ends."""
    with refusals(out):
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        _lock_file(descriptor)
    except OSError:
        holder = os.read(descriptor, 32).decode(errors="replace").strip() or "unknown"
        os.close(descriptor)
        raise UserError(
            f"{out} is in use",
            f"process {holder} is running it",
            f"wait for it, stop it with `kill {holder}` (it saves first), or give --out DIR",
        ) from None
    try:
        with refusals(out):
            os.ftruncate(descriptor, 0)
            os.write(descriptor, f"{os.getpid()}\n".encode())
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _lock_file(descriptor: int) -> None:
    if os.name == "nt":
        import msvcrt

        # lock one byte far behind the pid, which others must still be able to read
        os.lseek(descriptor, 1 << 20, os.SEEK_SET)
        getattr(msvcrt, "locking")(descriptor, getattr(msvcrt, "LK_NBLCK"), 1)  # noqa: B009
        os.lseek(descriptor, 0, os.SEEK_SET)
        return
    import fcntl

    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
