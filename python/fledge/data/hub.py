"""Files from the Hugging Face hub: the only module that training and evaluation reach the net with.

`fetch` puts named files of a repository under FLEDGE_HOME (default ~/.cache/fledge) and returns
their paths; `listing` says which files a repository has. What is already there is never fetched
again, so a run that went through once goes through without a network. HF_HUB_OFFLINE is obeyed,
HF_ENDPOINT names a mirror. Called by `data.task_files` and `data.sources` for whatever is not on
this machine. It never uploads, never runs code of a repository, and never guesses a file name.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

from fledge import files as disk
from fledge.errors import UserError

DEFAULT_ENDPOINT = "https://huggingface.co"
UNREACHABLE = "the hub is not reachable"
FETCH_FIX = "connect to the network once, or put the files under --data.root or FLEDGE_DATA"
_ON = {"1", "ON", "YES", "TRUE"}


def home() -> Path:
    """FLEDGE_HOME: where downloads and machine.json live."""
    return Path(os.environ.get("FLEDGE_HOME") or Path.home() / ".cache" / "fledge")


def offline() -> bool:
    """True if the user forbade the network."""
    names = ("HF_HUB_OFFLINE", "FLEDGE_OFFLINE")
    return any(os.environ.get(name, "").upper() in _ON for name in names)


def endpoint() -> str:
    """The hub's address without a slash at the end."""
    return (os.environ.get("HF_ENDPOINT") or DEFAULT_ENDPOINT).rstrip("/")


def reachable(*, timeout_seconds: float = 3.0) -> bool:
    """Whether the hub answers at all: one connection, so that nobody waits long without a network.

    Behind a proxy only the request itself can tell, and this says True.
    """
    import socket
    from urllib.request import getproxies, proxy_bypass

    if offline():
        return False
    if getproxies() and not proxy_bypass(urlsplit(endpoint()).hostname or ""):
        return True
    address = urlsplit(endpoint())
    port = address.port or (443 if address.scheme == "https" else 80)
    try:
        socket.create_connection((address.hostname or "", port), timeout_seconds).close()
    except OSError:
        return False
    return True


@dataclass(frozen=True)
class Listing:
    """The files of a data set at one commit: (name, bytes), sorted by name."""

    repository: str
    commit: str
    files: list[tuple[str, int]]


def listing(repository: str, revision: str = "main") -> Listing:
    """The files of a data set's repository.

    The first answer is kept under FLEDGE_HOME and stands from then on, so that a run goes on with
    the files that it began with, and without a network. Raises UserError when there is no answer
    yet and none can be had.
    """
    kept = home() / "hub" / "listings" / f"{repository.replace('/', '--')}@{revision}.json"
    if kept.is_file():
        row = json.loads(kept.read_text("utf-8"))
        return Listing(repository, row["commit"], [(name, size) for name, size in row["files"]])
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    what = f"the list of files of {repository} (revision {revision})"
    if offline() or not reachable():
        why = "HF_HUB_OFFLINE forbids the hub" if offline() else UNREACHABLE
        raise UserError(f"{what} is not on this machine", why, "connect to the network once")
    try:
        info = HfApi(endpoint()).dataset_info(
            repository, revision=revision, files_metadata=True, timeout=30
        )
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        reason = str(error).strip().splitlines()
        raise UserError(
            f"the hub does not give {what}",
            reason[-1] if reason else type(error).__name__,
            "check the name, and HF_TOKEN if the repository is private",
        ) from None
    found = sorted((file.rfilename, file.size or 0) for file in info.siblings or [])
    kept.parent.mkdir(parents=True, exist_ok=True)
    disk.write_json(kept, {"commit": info.sha, "files": found})
    return Listing(repository, str(info.sha), found)


def fetch(
    repository: str,
    files: Sequence[str],
    revision: str = "main",
    *,
    kind: Literal["dataset", "model"] = "dataset",
    network: bool = True,
) -> list[Path]:
    """Paths of the files on this machine, downloaded where they are missing (and `network`).

    Raises UserError when a file is not here and cannot be had: no network, offline mode, or no
    such repository, revision or file.
    """
    return [_fetch_one(repository, name, revision, kind, network=network) for name in files]


def _fetch_one(repository: str, name: str, revision: str, kind: str, *, network: bool) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, LocalEntryNotFoundError

    def download(*, local_files_only: bool) -> Path:
        return Path(
            hf_hub_download(
                repository,
                name,
                repo_type=kind,
                revision=revision,
                cache_dir=home() / "hub",
                endpoint=endpoint(),
                etag_timeout=10,
                local_files_only=local_files_only,
            )
        )

    what = f"{repository}/{name} (revision {revision})"
    try:
        return download(local_files_only=True)
    except LocalEntryNotFoundError:
        pass
    if offline():
        raise UserError(
            f"{what} is not on this machine",
            "it is not found under --data.root or FLEDGE_DATA, and HF_HUB_OFFLINE forbids the hub",
            FETCH_FIX,
        )
    try:
        # the probe comes first because the library retries a dead connection for 20 seconds
        path = download(local_files_only=False) if network and reachable() else None
    except LocalEntryNotFoundError:
        path = None
    except (EntryNotFoundError, HfHubHTTPError) as error:
        reason = str(error).strip().splitlines()
        raise UserError(
            f"the hub does not give {what}",
            reason[-1] if reason else type(error).__name__,
            "check the names, and HF_TOKEN if the repository is private",
        ) from None
    except (OSError, ValueError) as error:
        raise UserError(f"{what} could not be downloaded", str(error), FETCH_FIX) from None
    if path is None:
        raise UserError(
            f"{what} is not on this machine",
            f"it is not found under --data.root or FLEDGE_DATA, and {UNREACHABLE}",
            FETCH_FIX,
        )
    return path
