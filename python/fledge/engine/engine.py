"""The inference engine: prompts in, tokens with log-probabilities out.

`Engine` serves the terminal chat, the server, evaluation and reinforcement with the same batched
code. It holds the live model, so after an optimizer step and `weights_changed` the next call uses
the new weights. Prompts and completions are token ids; text is the caller's business (tools
excepted: their code and output are decoded and encoded here). One thread uses an engine at a time.
Never trains, never reads or writes a run.
"""

from __future__ import annotations

import os
from collections.abc import Generator, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from fledge.engine.packed import PackedRunner, can_pack
from fledge.engine.requests import Completion, Request, SamplingParams, TokenEvent
from fledge.engine.runner import Runner
from fledge.engine.scheduler import Scheduler, pad_right
from fledge.engine.tool_runner import ToolRunner, ToolTokens
from fledge.engine.tools import Tools
from fledge.errors import UserError
from fledge.model import Transformer
from fledge.tokenizer import Tokenizer

DEFAULT_SLOTS = 128
CHUNK_TOKENS = 256  # read in one step: bounds how long the rows that are answering wait
SCORE_TOKENS = 4096  # padded tokens in one scoring pass
CACHE_SHARE = 0.4  # of the memory of the machine, at most, for keys and values


class Engine:
    """Batched generation and scoring over one model and one tokenizer.

    `deterministic`: results do not depend on what else runs (sums of a row in one order, one chunk
    size, tool results in the order of their calls, no reuse of earlier prompts). `weights`:
    float32, bfloat16 or int8 (`engine.linears`). For tests: `packed=False` runs the module itself,
    `poison` makes NaN of what is not a row's own.
    """

    def __init__(
        self,
        model: Transformer,
        tokenizer: Tokenizer,
        *,
        slots: int = DEFAULT_SLOTS,
        deterministic: bool = False,
        chunk_tokens: int = CHUNK_TOKENS,
        prefix_reuse: bool = True,
        weights: str = "float32",
        packed: bool = True,
        poison: bool = False,
    ):
        self.model = model
        self.tokenizer = tokenizer
        self.deterministic = deterministic
        self.weights = weights
        self.packed = packed
        if weights != "float32" and not (packed and can_pack(model)):
            raise UserError(
                f"{weights} weights are not possible here",
                "they need a qwen3 model on a CPU",
                "leave the weights as they are",
            )
        self.context = model.config.max_position_embeddings
        special = tokenizer.special_tokens
        self.stop_ids = frozenset({special["<|assistant_end|>"], special["<|bos|>"]})
        self._options = {
            "chunk_tokens": chunk_tokens,
            "prefix_reuse": prefix_reuse,
            "special": frozenset(special.values()),
            "poison": poison,
        }
        self._slots = slots
        self._tool_runner = ToolRunner(
            ToolTokens(
                special["<|python_start|>"],
                special["<|python_end|>"],
                special["<|output_start|>"],
                special["<|output_end|>"],
            ),
            tokenizer.encode,
            tokenizer.decode,
        )
        self._made_runner: Runner | None = None
        self._live: Scheduler | None = None
        self._next_id = 0
        self._kept: list[TokenEvent] = []  # events that came while `generate` ran

    @classmethod
    def from_folder(cls, folder: str | Path) -> Engine:
        """The engine of a checkpoint folder that holds model and tokenizer."""
        return cls(Transformer.load(folder), Tokenizer.load(folder))

    # -- the live interface ----------------------------------------------------------------------

    def add(self, request: Request) -> int:
        """Takes a request in; its id. Raises UserError where it can't be served."""
        self._check([request.prompt])
        self._next_id += 1
        self._scheduler().add(self._next_id, request)
        return self._next_id

    def step(self) -> list[TokenEvent]:
        """One step of all requests in flight; [] when nothing is in flight or nothing came yet."""
        kept, self._kept = self._kept, []
        if self._live is None or not self._live.busy:
            return kept
        return kept + self._live.step()

    def cancel(self, request_id: int) -> None:
        """Ends a request: its rows are gone now, the next step says so. Unknown ids do nothing."""
        if self._live is not None:
            self._live.cancel(request_id)

    @property
    def in_flight(self) -> int:
        """Requests that have not ended."""
        return 0 if self._live is None else len(self._live.requests)

    @property
    def slots(self) -> int:
        """Rows that can be in flight at once: as many as wanted, or as memory holds."""
        return self._slots_that_fit() if self._live is None else len(self._live.pool.slots)

    @property
    def runner(self) -> Runner:
        """The passes of the model as this engine runs them: `hidden_of` and `head` for scoring."""
        return self._runner()

    def cached_tokens(self, request_id: int) -> int | None:
        """Tokens of a request's prompt that were known from earlier; None before it was begun."""
        return None if self._live is None else self._live.cached_tokens.get(request_id)

    def weights_changed(self) -> None:
        """To be called after an optimizer step: what was read with the old weights is dropped."""
        if self._live is None or not self._live.busy:
            self._live = self._made_runner = None  # their memory too: training needs it
        else:
            self._live.pool.forget()
            self._live.runner.weights_changed()

    def close(self) -> None:
        """Ends the tool threads and gives the cache back."""
        self._tool_runner.close()
        self._live = self._made_runner = None

    # -- whole calls -----------------------------------------------------------------------------

    def generate(
        self,
        prompts: list[list[int]],
        params: SamplingParams | Sequence[SamplingParams],
        tools: Tools | None = None,
    ) -> list[list[Completion]]:
        """`params.n` completions of every prompt, in the order of the prompts; one `params` for
        all, or one for each."""
        self._check(prompts)
        own = [params] * len(prompts) if isinstance(params, SamplingParams) else params
        ids = [self.add(Request(p, o, tools)) for p, o in zip(prompts, own, strict=True)]
        done = {
            i: [Completion([], [], [], "") for _ in range(o.n)]
            for i, o in zip(ids, own, strict=True)
        }
        for event in self._events_of(set(ids), sum(o.n for o in own)):
            choices = done[event.request_id]
            completion = choices[event.choice]
            completion.ids.append(event.token)
            completion.logprobs.append(event.logprob)
            completion.sampled_mask.append(event.sampled)
            if event.finish_reason is not None:
                choices[event.choice] = Completion(
                    completion.ids,
                    completion.logprobs,
                    completion.sampled_mask,
                    event.finish_reason,
                )
        return [done[i] for i in ids]

    def stream(
        self, prompt: list[int], params: SamplingParams, tools: Tools | None = None
    ) -> Generator[int, None, None]:
        """The tokens of one completion as they come, forced ones and the end token included.

        Leaving the iterator early cancels the request.
        """
        request_id = self.add(Request(prompt, params, tools))
        try:
            for event in self._events_of({request_id}, params.n):
                yield event.token
        finally:
            self.cancel(request_id)
            self._kept = [e for e in self._kept if e.request_id != request_id]
            live = self._scheduler()
            live.cancelled = [e for e in live.cancelled if e.request_id != request_id]

    def _events_of(self, ids: set[int], endings: int) -> Iterator[TokenEvent]:
        """The events of some requests until all have ended; others' are kept for `step`."""
        live = self._scheduler()
        while endings:
            events = live.step()
            self._kept += [e for e in events if e.request_id not in ids]
            for event in events:
                if event.request_id in ids:
                    endings -= event.finish_reason is not None
                    yield event

    def _scheduler(self) -> Scheduler:
        if self._live is None:
            slots = self._slots_that_fit()
            runner = self._runner()
            runner.cache = self.model.new_cache(slots, self.context)
            self._live = Scheduler(
                runner,
                slots=slots,
                context=self.context,
                stop_ids=self.stop_ids,
                tools=self._tool_runner,
                deterministic=self.deterministic,
                **self._options,
            )
        return self._live

    def _runner(self) -> Runner:
        """The fastest way to run this model here; the module itself where there is no other."""
        if self._made_runner is None:
            if self.packed and can_pack(self.model):
                self._made_runner = PackedRunner(
                    self.model, deterministic=self.deterministic, weights=self.weights
                )
            else:
                self._made_runner = Runner(self.model, deterministic=self.deterministic)
        return self._made_runner

    def _slots_that_fit(self) -> int:
        """The wanted number of slots, or fewer where memory is short."""
        config, device = self.model.config, self.model.cos.device
        token = 8 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
        if device.type == "cuda":
            memory = torch.cuda.mem_get_info(device)[0]
        else:
            memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        return max(1, min(self._slots, int(memory * CACHE_SHARE / (token * self.context))))

    # -- scoring ---------------------------------------------------------------------------------

    @torch.inference_mode()
    def score(self, rows: list[list[int]]) -> list[list[float]]:
        """Log-probability of every token given those before it; the first of a row gets 0.0."""
        result: list[list[float]] = [[] for _ in rows]
        runner = self._runner()
        for group, ids, last in self._batches(rows):
            logprobs = runner.token_logprobs(ids[:, :-1], ids[:, 1:])
            for i, end, row in zip(group, last.tolist(), logprobs.tolist(), strict=True):
                result[i] = [0.0, *row[:end]]
        return result

    @torch.inference_mode()
    def next_logprobs(self, prompts: list[list[int]], candidates: list[int]) -> list[list[float]]:
        """Log-probabilities of `candidates` as the token right after each prompt."""
        result: list[list[float]] = [[] for _ in prompts]
        runner = self._runner()
        for group, ids, last in self._batches(prompts):
            states = runner.hidden_of(ids)[torch.arange(len(group)), last]
            table = runner.head(states).float().log_softmax(dim=-1)[:, candidates]
            for i, row in zip(group, table.tolist(), strict=True):
                result[i] = row
        return result

    def _batches(self, rows: list[list[int]]) -> Iterator[tuple[list[int], Tensor, Tensor]]:
        """(indices, padded ids, places of the last tokens) of groups of like length, longest first,
        at most SCORE_TOKENS padded tokens each."""
        self._check(rows)
        order = sorted(range(len(rows)), key=lambda i: -len(rows[i]))
        while order:
            count = max(1, SCORE_TOKENS // len(rows[order[0]]))
            group, order = order[:count], order[count:]
            ids, last = pad_right([rows[i] for i in group])
            yield group, ids.to(self.model.cos.device), last

    def _check(self, prompts: list[list[int]]) -> None:
        limit = self.context
        for prompt in prompts:
            if not prompt:
                raise UserError("a prompt is empty", "there is nothing to continue", "add text")
            if len(prompt) >= limit:
                raise UserError(
                    f"a prompt has {len(prompt)} tokens",
                    f"the model reads at most {limit} tokens, prompt and answer together",
                    "shorten the prompt, or raise model.max_seq_len and train again",
                )
