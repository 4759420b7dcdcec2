"""What to do when a download goes wrong: ask again, go on where it stopped, or throw it away.

The other half of `data.hub`, which calls it and nobody else does: `keep_trying` decides which
faults pass by themselves, `checked` compares a file with the checksum in its name, `download` and
`unpack` fetch an archive that lies outside of the hub. It decides nothing about where files come
from, and it never gives a half-written file its final name.
"""

from __future__ import annotations

import hashlib
import os
import re
import sys
import time
import urllib.error
import zipfile
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

from fledge import files

T = TypeVar("T")

WAITS = (1.0, 4.0, 15.0, 40.0)
"""Seconds before each further attempt: a minute together."""
MOST_WAIT = 120.0  # of what a busy server asks for with Retry-After
PASSING = {408, 425, 429, 500, 502, 503, 504}
CHUNK = 1 << 20


class WrongContent(Exception):
    """A file that is not what its checksum says; it is deleted already."""


class Gone(Exception):
    """The server does not answer at all."""


def transport_errors() -> tuple[type[Exception], ...]:
    """The connection errors of the HTTP library under huggingface_hub, whichever that is."""
    found: list[type[Exception]] = [ConnectionError, TimeoutError]
    for name in ("httpx2", "httpx"):
        module: Any = sys.modules.get(name)
        if module is not None:
            found.append(module.TransportError)
    return tuple(found)


def status_of(error: Exception) -> int | None:
    """The HTTP status behind an error, if there is one."""
    response = getattr(error, "response", None)
    status = getattr(response, "status_code", None)
    return status if status is not None else getattr(error, "code", None)


def is_passing(error: Exception) -> bool:
    """Whether asking again later makes sense."""
    status = status_of(error)
    if status is not None:
        return status in PASSING
    return (
        isinstance(error, (WrongContent, urllib.error.URLError, *transport_errors()))
        or "Consistency check failed" in str(error)  # huggingface_hub: the size is wrong
    )


def keep_trying(attempt: Callable[[], T], *, what: str, gone_too: bool = False) -> T:
    """The result of `attempt`, asked again as long as its faults may pass by themselves.

    A server that is gone is given up at once, unless `gone_too`. The last error is raised as it
    is.
    """
    for wait in WAITS:
        try:
            return attempt()
        except Exception as error:
            passing = is_passing(error) or (gone_too and isinstance(error, Gone))
            if not passing:
                raise
            wait = _asked_to_wait(error, wait)
            print(f"{what}: {_short(error)}; again in {wait:.0f} s", file=sys.stderr, flush=True)
        time.sleep(wait)
    return attempt()


def _asked_to_wait(error: Exception, wait: float) -> float:
    """At least what Retry-After asks for, where the waits are not cut short by a test."""
    response = getattr(error, "response", error)
    headers = getattr(response, "headers", None)
    asked = str(headers.get("Retry-After")) if headers is not None else ""
    return max(wait, min(float(asked), MOST_WAIT)) if asked.isdigit() and wait else wait


def _short(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return (lines[0] if lines else type(error).__name__)[:200]


def checked(path: Path, seen: Path) -> Path:
    """The file, once its content is what the checksum in its name in the cache says.

    The hub names large files by their SHA-256 and small ones by Git's SHA-1; huggingface_hub
    compares sizes only. Each is read once; `seen` is the folder that remembers which. Names that
    are no checksum (of a mirror, or where the system has no links) cannot be checked.
    """
    blob = path.resolve()
    name = blob.name
    if not re.fullmatch(r"[0-9a-f]{40}|[0-9a-f]{64}", name) or (seen / name).is_file():
        return path
    with open(blob, "rb") as file:
        if len(name) == 64:
            found = {hashlib.file_digest(file, "sha256").hexdigest()}
        else:
            data = file.read()
            git = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
            found = {git, hashlib.sha1(data).hexdigest()}
    if name not in found:
        size = blob.stat().st_size
        for wrong in {path, blob}:
            wrong.unlink(missing_ok=True)
        raise WrongContent(f"its {size:,} bytes do not have the checksum {name[:12]}...")
    with files.refusals(seen):  # other processes of this run do the same: no renaming
        seen.mkdir(parents=True, exist_ok=True)
        (seen / name).touch()
    return path


def download(open_from: Callable[[int], Any], target: Path) -> Path:
    """A file, resumed where an earlier attempt of this process broke off.

    `open_from` asks for it from a byte on and gives the HTTP reply. The part lies beside as
    NAME.PID.part and gets its name when it is whole. Raises OSError.
    """
    part = target.with_name(target.name + f".{os.getpid()}.part")
    have = part.stat().st_size if part.is_file() else 0
    try:
        reply = open_from(have)
    except urllib.error.HTTPError as error:
        if error.code == 416:  # the part is longer than the file: not its beginning
            part.unlink()
        raise
    with reply, open(part, "ab" if reply.status == 206 else "wb") as file:
        if reply.status != 206:
            have = 0
        length = reply.headers.get("Content-Length")
        while chunk := reply.read(CHUNK):
            file.write(chunk)
            have += len(chunk)
        file.flush()
        os.fsync(file.fileno())
    expected = _whole_size(reply.headers, length)
    if expected is not None and have < expected:
        raise ConnectionError(f"it broke off after {have:,} of {expected:,} bytes")
    os.replace(part, target)
    return target


def _whole_size(headers: Any, length: str | None) -> int | None:
    ranged = re.fullmatch(r"bytes \d+-\d+/(\d+)", headers.get("Content-Range") or "")
    if ranged:
        return int(ranged.group(1))
    return int(length) if length and length.isdigit() else None


def unpack(archive: Path, folder: Path, *, keep: str) -> None:
    """The members of a ZIP archive below a folder called `keep`, as `folder`/`keep`..., or nothing.

    Raises WrongContent if the archive is damaged; names that lead outside are left out.
    """
    try:
        with zipfile.ZipFile(archive) as packed, files.atomic_directory(folder) as target:
            for member in packed.infolist():
                _, found, rest = member.filename.partition(keep)
                if not found or not rest or member.is_dir() or ".." in PurePosixPath(rest).parts:
                    continue
                place = target / keep / rest
                place.parent.mkdir(parents=True, exist_ok=True)
                place.write_bytes(packed.read(member))  # which compares its CRC-32
            if not (target / keep).is_dir():
                raise WrongContent(f"the archive holds no {keep}")
    except (zipfile.BadZipFile, zipfile.LargeZipFile, EOFError) as error:
        raise WrongContent(f"the archive is damaged: {error}") from None
