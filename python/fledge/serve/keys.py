"""API keys: read from a file, kept as SHA-256, compared in constant time.

The file has one key a line, `KEY` or `NAME KEY`, `#` begins a comment. A line may hold the hash
instead, written `sha256:HEX`, so that the file itself need hold no secret. NAME is what logs and
limits show; without one it is `key-N`. Keys are random and long, so one round of SHA-256 is enough:
it only keeps them out of memory dumps and logs. Called by `serve.gate` and by the `serve` verb.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import re
from dataclasses import dataclass
from pathlib import Path

from fledge.errors import UserError

MIN_KEY_CHARS = 16
ENVIRONMENT = "FLEDGE_API_KEYS"  # keys with commas between
_HASH = re.compile(r"sha256:([0-9a-f]{64})")
_NAME = re.compile(r"[A-Za-z0-9_.@-]{1,64}")


@dataclass(frozen=True)
class Key:
    """One key: what it is called, and its SHA-256."""

    name: str
    digest: bytes


class Keys:
    """The keys that open this server; without any it is open."""

    def __init__(self, keys: tuple[Key, ...] = ()) -> None:
        self._keys = keys

    def __len__(self) -> int:
        return len(self._keys)

    def name_of(self, secret: str) -> str | None:
        """The name of the key that `secret` is, or None. Always looks at every key."""
        digest = hashlib.sha256(secret.encode("utf-8", "surrogatepass")).digest()
        found = None
        for key in self._keys:
            if hmac.compare_digest(key.digest, digest):
                found = key.name
        return found


def load_keys(path: Path | None) -> Keys:
    """The keys of a file and of the environment variable; UserError names a bad line."""
    lines = os.environ.get(ENVIRONMENT, "").split(",")
    keys = [_key(line, len(lines), where=ENVIRONMENT) for line in lines if line.strip()]
    if path is not None:
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(
                f"cannot read the API keys in {path}",
                str(error),
                "give a text file with one key a line",
            ) from None
        for number, line in enumerate(text.splitlines(), 1):
            if line.partition("#")[0].strip():
                keys.append(_key(line.partition("#")[0], number, where=f"{path}:{number}"))
        if not keys:
            raise UserError(
                f"{path} holds no API key",
                "with an empty list nobody could use the server",
                "add a line, for example from `python -c 'import secrets; "
                "print(secrets.token_urlsafe(32))'`",
            )
    names = [key.name for key in keys]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise UserError(
            f"two API keys are called {twice!r}",
            "limits and logs go by the name",
            "give them different names",
        )
    return Keys(tuple(keys))


def _key(line: str, number: int, *, where: str) -> Key:
    words = line.split()
    name = words[0] if len(words) == 2 else f"key-{number}"
    secret = words[-1]
    if len(words) > 2 or not _NAME.fullmatch(name):
        raise UserError(
            f"{where} is not an API key", "a line is KEY or NAME KEY", "mend or remove that line"
        )
    hashed = _HASH.fullmatch(secret)
    if hashed:
        return Key(name, bytes.fromhex(hashed.group(1)))
    if len(secret) < MIN_KEY_CHARS:
        raise UserError(
            f"the API key at {where} is too short",
            f"fewer than {MIN_KEY_CHARS} characters can be guessed",
            "make one with `python -c 'import secrets; print(secrets.token_urlsafe(32))'`",
        )
    return Key(name, hashlib.sha256(secret.encode()).digest())
