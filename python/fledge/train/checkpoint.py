"""One checkpoint folder: the Hugging Face files, and `train_state/` to go on training exactly.

`write` fills a folder that the caller makes visible atomically (`run.atomic_directory`); `read`
verifies every byte against SHA256SUMS before anything is used. Optimizer state is kept as full
tensors by parameter name, so that any world size can load it. No pickle anywhere.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from fledge.errors import UserError
from fledge.model import Transformer
from fledge.model.hf_files import save_model
from fledge.optim.groups import Optimizers

STATE_FOLDER = "train_state"
_OPTIMIZER = "optimizer-00001-of-1.safetensors"


def write(
    folder: Path,
    *,
    model: Transformer,
    optimizers: Optimizers,
    state: dict[str, Any],
    token_ids: dict[str, int],
    tensors: dict[str, Tensor] | None = None,
    weights: dict[str, Tensor] | None = None,
) -> None:
    """Writes model files and training state into `folder`, then SHA256SUMS over all that it holds
    (the tokenizer's files are the caller's, before). `tensors`: the optimizers' state where several
    ranks had to gather it together; `weights`: copies, where training goes on meanwhile."""
    save_model(model, folder, token_ids=token_ids, weights=weights)
    train_state = folder / STATE_FOLDER
    train_state.mkdir()
    tensors = optimizers.state_tensors() if tensors is None else tensors
    save_file(tensors, train_state / _OPTIMIZER)
    _write_json(train_state / "index.json", {"files": [_OPTIMIZER], "tensors": sorted(tensors)})
    _write_json(train_state / "state.json", state)
    lines = [
        f"{_sha256(path)}  {path.relative_to(folder).as_posix()}\n"
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    ]
    (train_state / "SHA256SUMS").write_text("".join(lines), encoding="utf-8")


def verify(folder: Path) -> None:
    """UserError that names the file if a checkpoint is incomplete or damaged.

    Without its train_state, which one may delete, there is nothing to check against.
    """
    if not (folder / STATE_FOLDER).is_dir():
        return
    sums = folder / STATE_FOLDER / "SHA256SUMS"
    if not sums.is_file():
        raise _damaged(folder, f"{sums.relative_to(folder)} is missing")
    lines = sums.read_text(encoding="utf-8", errors="replace").splitlines()
    expected = {name: digest for digest, _, name in (line.partition("  ") for line in lines)}
    for needed in ("model.safetensors", "config.json", f"{STATE_FOLDER}/state.json"):
        if needed not in expected:
            raise _damaged(folder, f"{sums.relative_to(folder)} does not name {needed}")
    for name, digest in expected.items():
        path = folder / name
        if not path.is_file():
            raise _damaged(folder, f"{name} is missing")
        if _sha256(path) != digest:
            raise _damaged(folder, f"the bytes of {name} changed after it was written")


def read_state(folder: Path) -> dict[str, Any]:
    """The JSON state of a verified checkpoint: step, loader cursor, and what the stage added."""
    path = folder / STATE_FOLDER / "state.json"
    if not path.is_file():
        raise _damaged(folder, "its train_state is gone; going on inside a stage needs it")
    return json.loads(path.read_text(encoding="utf-8"))


def read_optimizers(folder: Path, optimizers: Optimizers) -> bool:
    """Loads the optimizer state if the checkpoint has one; False if it does not.

    The state may lie in any number of files, one of each rank that wrote; all that index.json names
    must be there. Raises UserError that names the missing one.
    """
    index = folder / STATE_FOLDER / "index.json"
    if not index.is_file():
        return False
    table = json.loads(index.read_text(encoding="utf-8"))
    tensors: dict[str, Tensor] = {}
    for name in table["files"]:
        path = index.with_name(name)
        if not path.is_file():
            raise _damaged(folder, f"{STATE_FOLDER}/{name} is missing, which index.json names")
        tensors |= load_file(path)
    lacking = sorted(set(table["tensors"]) - set(tensors))
    if lacking:
        raise _damaged(folder, f"no file of its {STATE_FOLDER} holds {lacking[0]}")
    optimizers.load_state_tensors(tensors)
    return True


def _damaged(folder: Path, why: str) -> UserError:
    return UserError(
        f"the checkpoint {folder} is damaged",
        why,
        "delete that folder and point LATEST at the checkpoint before it, or --restart the stage",
    )


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
