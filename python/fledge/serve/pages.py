"""The files of the web page, read from the package and kept in memory.

Only names in the folder `serve/web` exist; a path is looked up in that list and never joined to
another, so nothing else can be asked for. Comments and indentation are for readers of the source
and are not sent. Called by `serve.app`.
"""

from __future__ import annotations

import functools
from importlib import resources

from fledge.serve.api_errors import ApiError

KINDS = {
    "html": "text/html; charset=utf-8",
    "js": "text/javascript; charset=utf-8",
    "css": "text/css; charset=utf-8",
    "svg": "image/svg+xml",
}


@functools.cache
def files() -> dict[str, tuple[bytes, str]]:
    """Path -> (bytes, content type)."""
    folder = resources.files("fledge.serve") / "web"
    found: dict[str, tuple[bytes, str]] = {}
    if folder.is_dir():
        for entry in folder.iterdir():
            ending = entry.name.rpartition(".")[2]
            if ending in KINDS:
                found[f"/web/{entry.name}"] = (_lean(entry.read_bytes(), ending), KINDS[ending])
    if "/web/index.html" in found:
        found["/"] = found["/web/index.html"]
    return found


def _lean(source: bytes, ending: str) -> bytes:
    """The file without indentation, // comments and empty lines; CSS without its blanks.

    Nothing in `serve/web` has a text that goes over several lines (a test holds that), so a line is
    never part of one.
    """
    lines = [line.strip() for line in source.split(b"\n")]
    if ending == "js":
        lines = [_uncommented(line) for line in lines]
    lean = b"\n".join(line for line in lines if line)
    if ending == "css":
        for wide, narrow in (
            (b": ", b":"),
            (b"; ", b";"),
            (b" { ", b"{"),
            (b" }", b"}"),
            (b", ", b","),
        ):
            lean = lean.replace(wide, narrow)
    return lean


def _uncommented(line: bytes) -> bytes:
    """The line without its comment, unless the slashes could stand in a text."""
    code, found, _ = (b" " + line).partition(b" // ")
    if not found or any(code.count(quote) % 2 for quote in (b'"', b"'", b"`")):
        return line
    return code.strip()


def known(path: str) -> bool:
    """Whether there is such a file."""
    return path in files()


def content(path: str) -> tuple[bytes, str]:
    """(bytes, content type); ApiError where the page is not part of this installation."""
    if path not in files():
        raise ApiError(404, f"There is no {path[:200]!r} here.", code="unknown_url")
    return files()[path]
