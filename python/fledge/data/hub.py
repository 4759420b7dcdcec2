"""Files from the Hugging Face hub: the only module that training and evaluation reach the net with.

`fetch` puts named files of a repository under FLEDGE_HOME (default ~/.cache/fledge) and returns
their paths; `listing` says which files a repository has; `core_bundle` has the files of CORE. What
is already there is never fetched again, so a run that went through once goes through without a
network. HF_HUB_OFFLINE is obeyed, HF_ENDPOINT names a mirror. A hub that is slow, busy or out of
order is asked again (`patience`); a file that broke off is resumed where it stopped; one whose
content is not what its checksum says is thrown away. Called by `data.task_files` and `data.sources`
for whatever is not on this machine. It never uploads, never runs code of a repository, never
guesses a file name, and never hands out a file that it has not seen whole.
"""

from __future__ import annotations

import functools
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from fledge import files as disk
from fledge.data import patience
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
        info = patience.keep_trying(
            lambda: HfApi(endpoint()).dataset_info(
                repository, revision=revision, files_metadata=True, timeout=30
            ),
            what=what,
        )
    except (HfHubHTTPError, HFValidationError, OSError, *patience.transport_errors()) as error:
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
    wait: bool = False,
) -> list[Path]:
    """Paths of the files on this machine, downloaded where they are missing (and `network`).

    A busy hub is asked again for a minute; with `wait`, one that is gone altogether too (in the
    middle of a training, where giving up costs more). Raises UserError when a file is not here and
    cannot be had: no network, offline mode, no such repository, revision or file, or content that
    is not what its checksum says.
    """
    return [
        _fetch_one(repository, name, revision, kind, network=network, wait=wait) for name in files
    ]


def _fetch_one(
    repository: str, name: str, revision: str, kind: str, *, network: bool, wait: bool
) -> Path:
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
        return patience.checked(download(local_files_only=True), home() / "hub" / "seen-whole")
    except LocalEntryNotFoundError:
        pass
    except patience.WrongContent as error:  # killed between the end of a download and this look
        print(f"{what}: {error}; fetching it anew", file=sys.stderr, flush=True)
    if offline():
        raise UserError(
            f"{what} is not on this machine",
            "it is not found under --data.root or FLEDGE_DATA, and HF_HUB_OFFLINE forbids the hub",
            FETCH_FIX,
        )

    def attempt() -> Path:
        if not reachable():  # the library would try a dead connection for 20 seconds
            raise patience.Gone(UNREACHABLE)
        return patience.checked(download(local_files_only=False), home() / "hub" / "seen-whole")

    path = None
    try:
        if network:
            path = patience.keep_trying(attempt, what=what, gone_too=wait)
    except (LocalEntryNotFoundError, patience.Gone):
        pass
    except (EntryNotFoundError, HfHubHTTPError) as error:
        reason = str(error).strip().splitlines()
        busy = patience.is_passing(error)
        raise UserError(
            f"the hub does not give {what}",
            (reason[-1] if reason else type(error).__name__) + _again(busy=busy),
            "run the same command again later: what is here stays"
            if busy
            else "check the names, and HF_TOKEN if the repository is private",
        ) from None
    except patience.WrongContent as error:
        raise UserError(
            f"{what} arrived damaged",
            f"{error}{_again(busy=True)}",
            "run the same command again; if it stays so, the hub or a proxy on the way serves a "
            "broken file: set HF_ENDPOINT to another mirror",
        ) from None
    except (OSError, ValueError, *patience.transport_errors()) as error:
        raise UserError(
            f"{what} could not be downloaded",
            (str(error) or type(error).__name__) + _again(busy=patience.is_passing(error)),
            FETCH_FIX,
        ) from None
    if path is None:
        raise UserError(
            f"{what} is not on this machine",
            f"it is not found under --data.root or FLEDGE_DATA, and {UNREACHABLE}",
            FETCH_FIX,
        )
    return path


def _again(*, busy: bool) -> str:
    return f" (asked {len(patience.WAITS) + 1} times)" if busy else ""


ARCHIVE_TIMEOUT = 30.0  # seconds of silence
CORE_ADDRESS = "https://karpathy-public.s3.us-west-2.amazonaws.com/eval_bundle.zip"
"""Where nanochat's base_eval.py (92d63d4) gets CORE's 22 files from: 162 MB."""


def _open_from(address: str, first: int) -> Any:
    """The reply of a server to a request for a file from its byte `first` on."""
    from urllib.request import Request, urlopen

    return urlopen(
        Request(address, headers={"Range": f"bytes={first}-"} if first else {}),
        timeout=ARCHIVE_TIMEOUT,
    )


def core_bundle() -> Path:
    """The folder eval_data/ of CORE's files, fetched and unpacked the first time.

    FLEDGE_CORE_BUNDLE names another address. The archive is checked by its own checksums before
    anything is unpacked. Raises UserError when it cannot be had.
    """
    folder = home() / "core"
    if (folder / "eval_data").is_dir():
        return folder / "eval_data"
    address = os.environ.get("FLEDGE_CORE_BUNDLE") or CORE_ADDRESS
    what = f"CORE's files ({address})"
    fix = "connect to the network once, or put the unpacked eval_data/ under data.root"
    if offline():
        raise UserError(
            f"{what} are not on this machine", "HF_HUB_OFFLINE forbids the network", fix
        )
    archive = home() / "core.zip"
    with disk.refusals(archive):
        archive.parent.mkdir(parents=True, exist_ok=True)
    try:
        open_from = functools.partial(_open_from, address)
        patience.keep_trying(lambda: patience.download(open_from, archive), what=what)
        patience.unpack(archive, folder, keep="eval_data/")
    except patience.WrongContent as error:
        raise UserError(f"{what} arrived damaged", str(error), "run it again later") from None
    except OSError as error:
        raise UserError(f"{what} could not be downloaded", str(error), fix) from None
    finally:
        archive.unlink(missing_ok=True)
    return folder / "eval_data"
