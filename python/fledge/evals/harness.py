"""Our models inside lm-evaluation-harness: the model class `fledge`, in this process, no server.

    import fledge.evals.harness            # registers the name
    lm_eval.simple_evaluate(model="fledge", model_args="pretrained=runs/quickstart", tasks=[...])

or with a live model, also in the middle of training: `FledgeLM(engine)`. It is a thin layer on the
two primitives of `scoring`, so lm-eval's tasks get batches of like length and shared prefixes.
Tokens are those that transformers would give the same folder: <|bos|> in front, and special tokens
in a text only where lm-eval's chat template has written them. A context that is too long loses its
beginning, as in lm-eval's own models. Needs the `harness` extra; nothing else in fledge imports it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lm_eval import utils  # pyright: ignore[reportMissingImports]
from lm_eval.api.model import TemplateLM  # pyright: ignore[reportMissingImports]
from lm_eval.api.registry import register_model  # pyright: ignore[reportMissingImports]
from lm_eval.models.utils import (  # pyright: ignore[reportMissingImports]
    handle_stop_sequences,
    normalize_gen_kwargs,
    postprocess_generated_text,
)

from fledge.engine import Engine
from fledge.evals.scoring import Likelihood, Request, generate, loglikelihood
from fledge.run import find_checkpoint
from fledge.tokenizer import files
from fledge.tokenizer.chat import render_text

FIRST_ROUND = 16  # tokens generated before the first look for a stop string; then twice as many


@register_model("fledge")
class FledgeLM(TemplateLM):
    """An `Engine` as lm-eval sees a model."""

    def __init__(
        self,
        pretrained: Engine | str | Path,
        *,
        batch_size: int | str | None = None,
        max_length: int | None = None,
        deterministic: bool = False,
        device: str | None = None,
        max_batch_size: int | None = None,
        **unknown: Any,
    ) -> None:
        """`pretrained` is an engine, a run directory or a checkpoint folder.

        batch_size: rows of one forward pass ("auto" or None: as many as are good). lm-eval also
        passes `max_batch_size`, which bounds nothing here.
        """
        super().__init__()
        if unknown:
            raise ValueError(f"the fledge model does not know {', '.join(sorted(unknown))}")
        if isinstance(pretrained, Engine):
            self.engine = pretrained
        else:
            folder, _, _ = find_checkpoint(Path(pretrained))
            self.engine = Engine.from_folder(folder)
        self.engine.model.eval()
        if device is not None:
            self.engine.model.to(device)
        # lm-eval's command line says 1 where the user said nothing: that is its default, not a wish
        sized = isinstance(batch_size, int | str) and str(batch_size).isdigit()
        self._rows = int(batch_size) if sized and int(batch_size) > 1 else None  # type: ignore[arg-type]
        self._deterministic = deterministic
        self._max_length = max_length
        self._device = self.engine.model.cos.device
        self.tokenizer: Any = self.engine.tokenizer

    # -- what lm-eval asks about the model ---------------------------------------------------------

    @property
    def max_length(self) -> int:
        limit = self.engine.model.config.max_position_embeddings
        return min(self._max_length or limit, limit)

    @property
    def max_gen_toks(self) -> int:
        return 256

    @property
    def eot_token_id(self) -> int:
        return self.tokenizer.eos_id

    @property
    def prefix_token_id(self) -> int:
        return self.tokenizer.bos_id

    @property
    def tokenizer_name(self) -> str:
        return "fledge"

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_: Any
    ) -> list[int]:
        """Token ids with bos in front; a text that begins with bos is a rendered conversation."""
        bos = "<|bos|>"
        if add_special_tokens is None and string.startswith(bos):
            return self.tokenizer.encode(string, allow_special=True)
        ids = self.tokenizer.encode(string)
        return ids if add_special_tokens is False else [self.prefix_token_id, *ids]

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """A conversation as text with our special tokens (chat_template.jinja's bytes)."""
        return render_text({"messages": chat_history}, add_generation_prompt=add_generation_prompt)

    def chat_template(self, chat_template: bool | str = False) -> str:
        """The template's own text, for lm-eval's records."""
        return files.chat_template()

    # -- the three requests ------------------------------------------------------------------------

    def _loglikelihood_tokens(
        self,
        requests: list[tuple[tuple[str, str], list[int], list[int]]],
        disable_tqdm: bool = False,
        **_: Any,
    ) -> list[tuple[float, bool]]:
        found = self._score([(context, continuation) for _, context, continuation in requests])
        answers = [(likelihood.total, likelihood.is_greedy) for likelihood in found]
        for (strings, *_ids), answer in zip(requests, answers, strict=True):
            if strings is not None:
                self.cache_hook.add_partial("loglikelihood", strings, answer)
        return answers

    def _score(self, pairs: Sequence[tuple[list[int], list[int]]]) -> list[Likelihood]:
        asked = []
        for context, continuation in pairs:
            ids = [*context, *continuation][-(self.max_length + 1) :]
            asked.append(Request(ids, max(1, len(ids) - len(continuation))))
        return loglikelihood(
            self.engine, asked, batch_size=self._rows, deterministic=self._deterministic
        )

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Summed log-probabilities of whole texts, every token once (lm-eval's windows)."""
        windows, owners = [], []
        for index, request in enumerate(requests):
            (text,) = request.args
            rolling = utils.get_rolling_token_windows(
                token_list=self.tok_encode(text),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            for pair in rolling:
                windows.append(utils.make_disjoint_window(pair))
                owners.append(index)
        totals = [0.0] * len(requests)
        for owner, likelihood in zip(owners, self._score(windows), strict=True):
            totals[owner] += likelihood.total
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Greedy continuations up to a stop string, which is not part of them."""
        eos = self.tokenizer.decode([self.eot_token_id])
        groups: dict[tuple[Any, ...], list[int]] = {}
        for index, request in enumerate(requests):
            options = normalize_gen_kwargs(dict(request.args[1]), self.max_gen_toks)
            stops = tuple(handle_stop_sequences(options.get("until"), eos=eos))
            how = (stops, options["max_gen_toks"], float(options.get("temperature", 0.0)))
            groups.setdefault(how, []).append(index)
        said = [""] * len(requests)
        for (stops, most, temperature), members in groups.items():
            room = self.max_length - most
            if room < 1:
                raise ValueError(
                    f"{most} tokens are asked for and the model reads {self.max_length}: "
                    "no room for the question; give a smaller max_gen_toks"
                )
            prompts = [self.tok_encode(requests[i].args[0])[-room:] for i in members]
            texts = self._continue(prompts, stops, most, temperature)
            for i, text in zip(members, texts, strict=True):
                said[i] = postprocess_generated_text(text, stop=list(stops), think_end_token=None)
                self.cache_hook.add_partial("generate_until", requests[i].args, said[i])
        return said

    def _continue(
        self, prompts: list[list[int]], stops: Sequence[str], most: int, temperature: float
    ) -> list[str]:
        """What follows the prompts, at most `most` tokens; rounds double until a stop is seen.

        A sampled text cannot be taken up again without changing its draws, so it has one round.
        """
        ids: list[list[int]] = [[] for _ in prompts]
        waiting = list(range(len(prompts)))
        size = FIRST_ROUND if temperature == 0 else most
        while waiting:
            asked = [[*prompts[i], *ids[i]] for i in waiting]
            left = {i: most - len(ids[i]) for i in waiting}
            found = generate(
                self.engine,
                asked,
                max_tokens=min(size, max(left.values())),
                temperature=temperature,
            )
            still = []
            for i, (completion,) in zip(waiting, found, strict=True):
                ids[i] = [*ids[i], *completion.ids][:most]
                text = self.tokenizer.decode(ids[i], skip_special=True)
                done = completion.finish_reason == "stop" or len(ids[i]) >= most
                if not done and not any(stop and stop in text for stop in stops):
                    still.append(i)
            waiting, size = still, 2 * size
        return [self.tokenizer.decode(row, skip_special=True) for row in ids]
