"""The models that a server offers: found, described and given an engine pool each.

`served_models` reads what is cheap (tokenizer, configuration, template) at once, so that a wrong
path or a foreign tokenizer is an error before the port opens; weights load in the engine threads.
Names are what clients write in `model`. Called by `serve.server`; tests build `ServedModel` around
an engine of their own.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import fledge
from fledge.errors import UserError
from fledge.run import Run, find_checkpoint
from fledge.serve.api_errors import no_such_model
from fledge.serve.cards import card_of
from fledge.serve.jobs import EngineLike
from fledge.serve.metrics import Metrics
from fledge.serve.settings import Limits
from fledge.serve.templates import ForeignTemplate
from fledge.serve.worker import Pool
from fledge.tokenizer import Tokenizer
from fledge.tokenizer.files import chat_template


@dataclass
class ServedModel:
    """One model by name."""

    name: str
    tokenizer: Tokenizer
    context: int
    pool: Pool
    created: int = 0
    fingerprint: str = "fp_fledge"
    template: str = field(default_factory=chat_template)
    foreign: ForeignTemplate | None = None
    card: dict[str, Any] = field(default_factory=dict)
    run: Run | None = None
    """The run that raised it; None for a checkpoint folder from elsewhere."""


class Models:
    """All models of a server, the first being the one that is meant where none is named."""

    def __init__(self, models: Sequence[ServedModel]) -> None:
        assert models
        self._models = {model.name: model for model in models}
        self.first = models[0]

    def __iter__(self):
        return iter(self._models.values())

    def get(self, name: str | None) -> ServedModel:
        """The model called `name`; ApiError where there is none."""
        if name is None:
            return self.first
        found = self._models.get(name)
        if found is None:
            raise no_such_model(name, list(self._models))
        return found


def split_name(word: str) -> tuple[str | None, Path]:
    """(name or None, path) of NAME=PATH or PATH on the command line."""
    name, equals, path = word.partition("=")
    if equals and "/" not in name and name:
        return name, Path(path)
    return None, Path(word)


def served_models(
    words: Sequence[str],
    *,
    limits: Limits,
    metrics: Metrics,
    on_fatal: Callable[[BaseException], None],
    make_engine: Callable[[Path, int], EngineLike] | None = None,
    replicas: int = 1,
) -> list[ServedModel]:
    """The models of the command line's words; UserError for what cannot be one."""
    make = make_engine or _engine
    served: list[ServedModel] = []
    for word in words:
        given, path = split_name(word)
        folder, run, stage = find_checkpoint(path)
        name = given or (f"{run.path.name}-{stage}" if run is not None else folder.name)
        if any(model.name == name for model in served):
            raise UserError(
                f"two models are called {name!r}",
                "clients choose a model by its name",
                f"give one another name: NAME={path}",
            )
        config = _config(folder)
        tokenizer = Tokenizer.load(folder)
        if tokenizer.vocab_size > config["vocab_size"]:
            raise UserError(
                f"the tokenizer in {folder} does not belong to the model there",
                f"it has {tokenizer.vocab_size} tokens, the model {config['vocab_size']}",
                "take both from the same checkpoint",
            )
        builders = [_builder(make, folder, i) for i in range(replicas)]
        pool = Pool(name, builders, limits=limits, metrics=metrics, on_fatal=on_fatal)
        source = _template(folder)
        foreign = source is not None and source != chat_template()
        served.append(
            ServedModel(
                name,
                tokenizer,
                int(config["max_position_embeddings"]),
                pool,
                created=int((folder / "config.json").stat().st_mtime),
                fingerprint=_fingerprint(folder, config),
                template=source or chat_template(),
                foreign=ForeignTemplate(source or "", tokenizer, limits) if foreign else None,
                card=card_of(config, run, stage),
                run=run,
            )
        )
    return served


def _builder(
    make: Callable[[Path, int], EngineLike], folder: Path, index: int
) -> Callable[[], EngineLike]:
    return lambda: make(folder, index)


def _engine(folder: Path, index: int) -> EngineLike:
    """The engine of a checkpoint; replica `index` on its own GPU where there are any."""
    import torch

    from fledge.engine import Engine

    engine = Engine.from_folder(folder)
    if torch.cuda.is_available():
        engine.model.to(torch.device("cuda", index % torch.cuda.device_count()))
    return engine  # type: ignore[return-value]


def _config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        return {**config, "vocab_size": int(config["vocab_size"]),
                "max_position_embeddings": int(config["max_position_embeddings"])}  # fmt: skip
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path} is not a complete model configuration",
            f"{type(error).__name__}: {error}",
            "give a checkpoint folder that fledge wrote, or a run directory",
        ) from None


def _template(folder: Path) -> str | None:
    path = folder / "chat_template.jinja"
    return path.read_text(encoding="utf-8") if path.is_file() else None


def _fingerprint(folder: Path, config: dict[str, Any]) -> str:
    """Changes with the program, the configuration and the weights' size and time."""
    weights = folder / "model.safetensors"
    stat = weights.stat() if weights.is_file() else None
    seen = [fledge.__version__, config, [stat.st_size, stat.st_mtime_ns] if stat else None]
    return "fp_" + hashlib.sha256(json.dumps(seen, sort_keys=True).encode()).hexdigest()[:12]
