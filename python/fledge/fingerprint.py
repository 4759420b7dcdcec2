"""What a result depends on, as one hash, and in words what changed when two hashes differ.

A stage's parts are its numeric keys, its inputs' fingerprints, its data's manifest and a format
version; keys of the execution never enter. Used by `fledge.run`, which decides what to do with a
difference. It reads no files of a run.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import platform
import subprocess
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import fledge
from fledge import files


def fingerprint(parts: Mapping[str, Any]) -> str:
    """sha256 over the canonical JSON of a stage's parts (see `Run.stage_parts`)."""
    return hashlib.sha256(files.canonical_json(parts).encode()).hexdigest()


def changed_keys(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """What differs between two stages' parts, as lines "section.key: old -> new"."""
    lines = []
    for group in ("values", "extra", "data", "inputs"):
        prefix = {"values": "", "extra": "", "inputs": "stage "}.get(group, group + ".")
        lines += _differences(old.get(group), new.get(group), prefix)
    if old.get("format") != new.get("format"):
        lines.append(f"format: {old.get('format')} -> {new.get('format')}")
    return lines


def _differences(old: Any, new: Any, prefix: str) -> list[str]:
    if old == new:
        return []
    if isinstance(old, dict) and isinstance(new, dict):
        lines = []
        for key in sorted({*old, *new}):
            lines += _differences(old.get(key), new.get(key), f"{prefix}{key}.")
        return lines
    if isinstance(old, list) and isinstance(new, list) and len(old) + len(new) > 8:
        gone = [x for x in old if x not in new]
        come = [x for x in new if x not in old]
        return [f"{prefix.rstrip('.')}: {len(gone)} entries gone, {len(come)} new"]
    return [f"{prefix.rstrip('.')}: {_short(old)} -> {_short(new)}"]


def _short(value: Any) -> str:
    text = "absent" if value is None else json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."


def environment() -> dict[str, Any]:
    """Versions of what computes, and the git revision when fledge runs from a clone."""
    names = ("torch", "numpy", "pyarrow", "safetensors", "tyro", "pydantic-monty")
    versions = {"fledge": fledge.__version__, "python": platform.python_version()}
    for name in names:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    return {"versions": versions, "git": _git_revision()}


def _git_revision() -> dict[str, Any] | None:
    here = Path(__file__).parent
    try:
        if not any((p / ".git").exists() for p in (here.parent, here.parent.parent)):
            return None
        revision, status = (
            subprocess.run(
                ["git", "-C", str(here), *command],
                capture_output=True,
                text=True,
                timeout=10,
                check=True,
            ).stdout.strip()
            for command in (["rev-parse", "HEAD"], ["status", "--porcelain", "-uno"])
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return {"revision": revision, "changed": bool(status)}
