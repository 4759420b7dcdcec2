"""The files of the web page, read from the package and kept in memory.

Only names in the folder `serve/web` exist; a path is looked up in that list and never joined to
another, so nothing else can be asked for. Called by `serve.app`.
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
            kind = KINDS.get(entry.name.rpartition(".")[2])
            if kind is not None:
                found[f"/web/{entry.name}"] = (entry.read_bytes(), kind)
    if "/web/index.html" in found:
        found["/"] = found["/web/index.html"]
    return found


def known(path: str) -> bool:
    """Whether there is such a file."""
    return path in files()


def content(path: str) -> tuple[bytes, str]:
    """(bytes, content type); ApiError where the page is not part of this installation."""
    if path not in files():
        raise ApiError(404, f"There is no {path[:200]!r} here.", code="unknown_url")
    return files()[path]
