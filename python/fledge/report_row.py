"""A run as one row of a leaderboard: docs/leaderboard.md is made of such rows.

The figures are those of the run's own files (metrics of base, stage.json, resolved.json); nothing
is entered by hand, so that anybody's row says the same thing. Called by `fledge report RUN --row`.
It measures nothing and changes nothing.
"""

from __future__ import annotations

import hashlib
import time
from typing import Any

from fledge import files
from fledge.errors import UserError
from fledge.progress import format_count, format_seconds
from fledge.run import Run

COLUMNS = (
    *("bpb", "time of base", "tokens", "network", "parameters", "machine", "dtype", "text", "seed"),
    *("fledge", "date"),
)


def header() -> str:
    """The two lines that the rows stand under."""
    return f"| {' | '.join(COLUMNS)} |\n|{' --- |' * len(COLUMNS)}\n"


def row(run: Run, facts: dict[str, Any]) -> str:
    """The run's line; facts is report.json's content. UserError while base is not done."""
    record, base = run.read_stage("base"), facts["stages"].get("base", {})
    score = base.get("scores", {}).get("bpb")
    if record is None or record["status"] != "done" or score is None:
        raise UserError(
            f"{run.path} has no row yet",
            "its base stage is not done, or measured no bits per byte",
            "finish it with the same `fledge run` command",
        )
    known, model, values = run.resolved, run.model, run.values
    hardware, git = known["hardware"], known.get("git") or {}
    revision = (git.get("revision") or "unknown")[:9] + (" + changes" if git.get("changed") else "")
    network = (
        f"{model.arch} depth {model.num_hidden_layers}, width {model.hidden_size}, "
        f"{model.vocab_size:,} words, context {model.max_position_embeddings}"
    )
    cells = {
        "bpb": f"{score['value']:.4f}",
        "time of base": format_seconds(record["seconds"]),
        "tokens": format_count(base["tokens"]),
        "network": network,
        "parameters": format_count(known["estimates"]["parameters"]),
        "machine": f"{hardware['name']}, {values['hardware.threads']} threads",
        "dtype": values.get("hardware.dtype") or "float32",
        "text": _text(values, record),
        "seed": str(values["base.seed"]),
        "fledge": f"{known['versions']['fledge']} {revision}",
        "date": time.strftime("%Y-%m-%d", time.gmtime(record["finished"])),
    }
    return f"| {' | '.join(cells[name].replace('|', '/') for name in COLUMNS)} |\n"


def _text(values: dict[str, Any], record: dict[str, Any]) -> str:
    """The corpus by name, and the first digits of its manifest's hash: the same text or not."""
    name = values["data.source"] or f"world {values['data.world']}"
    data = record.get("parts", {}).get("data", {})
    text = data.get("text", data)
    digest = hashlib.sha256(files.canonical_json(text).encode()).hexdigest()[:8]
    size = values["data.max_bytes"]
    limit = f", first {format_count(size)}B" if size else ""
    return f"{str(name).rstrip('/').rpartition('/')[2]} ({digest}{limit})"
