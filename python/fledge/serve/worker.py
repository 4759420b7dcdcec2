"""Engine threads behind one bounded queue: requests in from the event loop, token events back.

`Pool` is one model: a queue with a place for every waiting row, and one thread per replica that
owns an engine and does nothing but step it. A thread, because torch lets go of the interpreter lock
while it computes (docs/decisions/031). Keys take turns in the queue, so that one busy client does
not starve another. An engine that raises is thrown away with all it held: its requests end with an
error, it is built again, and health says so meanwhile; too many crashes in a short time end the
server. Called by `serve.app` and the handlers; it knows nothing of HTTP, JSON or text.
"""

from __future__ import annotations

import asyncio
import collections
import logging
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from fledge.errors import UserError
from fledge.serve import api_errors
from fledge.serve.api_errors import ApiError
from fledge.serve.jobs import EngineLike, Handle, Job
from fledge.serve.metrics import Metrics
from fledge.serve.settings import Limits

log = logging.getLogger("fledge.serve")

WATCH_SECONDS = 0.25  # how often deadlines are looked at
IDLE_SECONDS = 1.0  # an idle thread looks up so often: its heartbeat
TOOL_WAIT_SECONDS = 0.001  # pause where an engine has only rows that wait for tools
DEFAULT_ROWS = 128


@dataclass
class Replica:
    """One engine thread."""

    index: int
    build: Callable[[], EngineLike]
    thread: threading.Thread | None = None
    engine: EngineLike | None = None
    state: str = "loading"  # loading, ready, rebuilding, failed, stopped
    beat: float = 0.0
    running: dict[int, Job] = field(default_factory=dict)
    calls: collections.deque[tuple[Job, Any]] = field(default_factory=collections.deque)
    cancels: collections.deque[Job] = field(default_factory=collections.deque)
    used_rows: int = 0
    max_rows: int = DEFAULT_ROWS
    crashes: collections.deque[float] = field(default_factory=collections.deque)

    def jobs(self) -> list[Job]:
        """What it works on."""
        return [*list(self.running.values()), *(job for job, _ in list(self.calls))]


class Pool:
    """One model: its queue and its engine threads."""

    def __init__(
        self,
        name: str,
        builders: Sequence[Callable[[], EngineLike]],
        *,
        limits: Limits,
        metrics: Metrics,
        on_fatal: Callable[[BaseException], None] = lambda _: None,
    ) -> None:
        self.name = name
        self.limits = limits
        self.metrics = metrics
        self.on_fatal = on_fatal
        self.replicas = [Replica(i, build) for i, build in enumerate(builders)]
        self._queues: collections.OrderedDict[str, collections.deque[Job]] = (
            collections.OrderedDict()
        )
        self._waiting_rows = 0
        self._stopping = False
        self._changed = threading.Condition()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._watcher: asyncio.Task[None] | None = None
        self._label = (("engine", "0"), ("model_name", name))
        metrics.gauges.append(self._gauges)

    # -- called from the event loop ----------------------------------------------------------

    def start(self) -> None:
        """Starts the threads, which build their engines; to be called inside the event loop."""
        self._loop = asyncio.get_running_loop()
        self._watcher = self._loop.create_task(self._watch())
        for replica in self.replicas:
            replica.beat = time.monotonic()
            replica.thread = threading.Thread(
                target=self._live, args=(replica,), name=f"engine-{self.name}-{replica.index}",
                daemon=True,
            )  # fmt: skip
            replica.thread.start()

    def stop(self) -> None:
        """Ends the threads after their current step and waits for them."""
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
        if self._watcher is not None:
            self._watcher.cancel()
        for replica in self.replicas:
            if replica.thread is not None:
                replica.thread.join()

    def submit(self, jobs: Sequence[Job]) -> list[Handle]:
        """Queues all of `jobs` or none; ApiError where there is no room or no engine."""
        rows = sum(job.rows for job in jobs)
        now = time.monotonic()
        with self._changed:
            self.check_room(rows)
            handles = [Handle(job, self.cancel) for job in jobs]
            for job in jobs:
                job.arrived, job.live = now, job.rows
                self._queues.setdefault(job.key, collections.deque()).append(job)
            self._waiting_rows += rows
            self._changed.notify_all()
        return handles

    def check_room(self, rows: int = 1) -> None:
        """ApiError where `rows` more would find no room or no engine. Handlers ask before they
        tokenize, so that what is refused costs little."""
        if self._stopping or all(r.state in ("failed", "stopped") for r in self.replicas):
            raise api_errors.unavailable("The engine has stopped.", "engine_stopped")
        # rows that are free now will take some of those that wait before long
        free = sum(r.max_rows - r.used_rows for r in self.replicas if r.state == "ready")
        most = self.limits.waiting_rows + max(0, free)
        if self._waiting_rows and self._waiting_rows + rows > most:
            raise api_errors.busy(
                "The queue of this model is full. Try again in a moment.", self._retry_after()
            )

    def cancel(self, job: Job) -> None:
        """Marks a job as unwanted, wherever it is."""
        with self._changed:
            if job.cancelled:
                return
            job.cancelled = True
            queue = self._queues.get(job.key)
            if job.started is None and queue and job in queue:
                queue.remove(job)
                self._waiting_rows -= job.rows
                if not queue:
                    del self._queues[job.key]
                return
            for replica in self.replicas:
                replica.cancels.append(job)
            self._changed.notify_all()

    def abort(self, error: ApiError) -> None:
        """Ends everything that waits or runs with `error`: the end of the server's grace."""
        with self._changed:
            jobs = [job for queue in self._queues.values() for job in queue]
            jobs += [job for replica in self.replicas for job in replica.jobs()]
        for job in jobs:
            self.cancel(job)
            job.deliver(error)

    async def _watch(self) -> None:
        """Ends jobs that waited or ran too long, even where an engine hangs or is being built."""
        while not self._stopping:
            await asyncio.sleep(WATCH_SECONDS)
            now = time.monotonic()
            limits = self.limits
            with self._changed:
                waiting = [job for queue in self._queues.values() for job in queue]
                running = [job for replica in self.replicas for job in replica.jobs()]
            for job in waiting:
                if now - job.arrived > limits.queue_seconds:
                    self.cancel(job)
                    job.deliver(api_errors.busy("It waited too long in the queue.", 5))
            for job in running:
                if now - job.arrived > limits.request_seconds and not job.cancelled:
                    self.cancel(job)
                    job.deliver(api_errors.too_slow(limits.request_seconds))

    @property
    def waiting(self) -> int:
        """Requests in the queue."""
        return sum(len(queue) for queue in list(self._queues.values()))

    @property
    def running(self) -> int:
        """Requests that engines work on."""
        return sum(len(r.running) + len(r.calls) for r in self.replicas)

    def state(self) -> str:
        """ready, or what keeps the pool from being so (the best of its replicas counts)."""
        now = time.monotonic()
        states = [
            "stalled"
            if r.state == "ready" and now - r.beat > self.limits.heartbeat_seconds
            else r.state
            for r in self.replicas
        ]
        for state in ("ready", "loading", "rebuilding", "stalled", "failed", "stopped"):
            if state in states:
                return state
        return "stopped"

    def _retry_after(self) -> float:
        return min(30.0, max(1.0, self._waiting_rows / 32))

    def _gauges(self) -> dict[str, dict[Any, float]]:
        rows = sum(r.used_rows for r in self.replicas)
        most = sum(r.max_rows for r in self.replicas)
        return {
            "vllm:num_requests_running": {self._label: self.running},
            "vllm:num_requests_waiting": {self._label: self.waiting},
            "vllm:kv_cache_usage_perc": {self._label: rows / most if most else 0.0},
        }

    # -- the engine threads ------------------------------------------------------------------

    def _live(self, replica: Replica) -> None:
        """Builds engines and serves with them until the pool stops or crashes pile up."""
        while not self._stopping:
            try:
                engine = replica.engine = replica.build()
                replica.max_rows = getattr(engine, "slots", DEFAULT_ROWS)
                replica.beat = time.monotonic()
                replica.state = "ready"
                self._serve(replica, engine)
            except Exception as error:
                self._crashed(replica, error)
                if replica.state == "failed":
                    return
            finally:
                _close(replica)
        replica.state = "stopped"
        self._fail_all(replica, api_errors.unavailable("The engine has stopped.", "engine_stopped"))

    def _crashed(self, replica: Replica, error: Exception) -> None:
        now = time.monotonic()
        built = replica.state == "ready"
        replica.state = "rebuilding"
        # the type and the place, not the message: that may quote what a client sent
        where = error.__traceback__
        while where is not None and where.tb_next is not None:
            where = where.tb_next
        place = f"{where.tb_frame.f_code.co_filename}:{where.tb_lineno}" if where else "?"
        log.error("engine %s/%d failed: %s at %s", self.name, replica.index,
                  type(error).__name__, place)  # fmt: skip
        log.debug("engine failure", exc_info=error)
        self.metrics.add("fledge:engine_crashes", self._label)
        self._fail_all(replica, api_errors.engine_failed())
        replica.crashes.append(now)
        while replica.crashes and replica.crashes[0] < now - self.limits.crash_window_seconds:
            replica.crashes.popleft()
        if len(replica.crashes) >= self.limits.crashes or not built:
            replica.state = "failed"
            with self._changed:
                if any(r.state != "failed" for r in self.replicas):
                    return  # the other replicas go on
                jobs = [job for queue in self._queues.values() for job in queue]
                self._queues.clear()
                self._waiting_rows = 0
            self._send([(job, api_errors.engine_failed()) for job in jobs])
            self._call(self.on_fatal, error)

    def _fail_all(self, replica: Replica, error: ApiError) -> None:
        with self._changed:
            jobs = replica.jobs()
            replica.running.clear()
            replica.calls.clear()
            replica.used_rows = 0
        self._send([(job, error) for job in jobs])

    def _serve(self, replica: Replica, engine: EngineLike) -> None:
        while not self._stopping:
            replica.beat = time.monotonic()
            self._cancel_marked(replica, engine)
            self._admit(replica, engine)
            if not replica.running and not replica.calls:
                with self._changed:
                    if not (self._queues or replica.cancels or self._stopping):
                        self._changed.wait(IDLE_SECONDS)
                continue
            if replica.calls:
                self._one_piece(replica, engine)
            if replica.running:
                began = time.monotonic()
                events = engine.step()
                if events:
                    self._route(replica, events)
                elif time.monotonic() - began < TOOL_WAIT_SECONDS / 4:
                    with self._changed:
                        self._changed.wait(TOOL_WAIT_SECONDS)

    def _admit(self, replica: Replica, engine: EngineLike) -> None:
        """Takes jobs from the queue while the engine has free rows; keys take turns."""
        while True:
            with self._changed:
                if not self._queues:
                    return
                key, queue = next(iter(self._queues.items()))
                job = queue[0]
                busy = replica.used_rows > 0
                if busy and replica.used_rows + job.rows > replica.max_rows:
                    return
                queue.popleft()
                del self._queues[key]
                if queue:
                    self._queues[key] = queue  # at the end: the next key is next
                self._waiting_rows -= job.rows
                job.started = time.monotonic()
                replica.used_rows += job.rows
                if job.call is not None:
                    replica.calls.append((job, job.call(engine)))
                    continue
            try:
                request_id = engine.add(job.request)
            except UserError as error:
                replica.used_rows -= job.rows
                self._send([(job, api_errors.bad_value(None, f"{error.what}: {error.why}"))])
                continue
            except Exception:
                # so that _fail_all finds it
                replica.running[-1 - len(replica.running)] = job
                raise
            replica.running[request_id] = job
            self.metrics.observe(
                "vllm:request_queue_time_seconds", self._label, job.started - job.arrived
            )

    def _one_piece(self, replica: Replica, engine: EngineLike) -> None:
        """One bounded piece of the oldest call; the next call is next, so all advance."""
        job, work = replica.calls[0]
        try:
            next(work)
        except StopIteration as done:
            replica.calls.popleft()
            replica.used_rows -= job.rows
            self._send([(job, [done.value])])
            self._finished(job, ["stop"], time.monotonic())
            return
        except ApiError as error:
            replica.calls.popleft()
            replica.used_rows -= job.rows
            self._send([(job, error)])
            return
        replica.calls.rotate(-1)

    def _route(self, replica: Replica, events: Iterable[Any]) -> None:
        """Sorts the tokens of a step by job, with one call into the event loop for all."""
        now = time.monotonic()
        batches: dict[int, list[Any]] = {}
        for event in events:
            batches.setdefault(event.request_id, []).append(event)
        out: list[tuple[Job, Any]] = []
        for request_id, batch in batches.items():
            job = replica.running.get(request_id)
            if job is None:
                continue  # cancelled, and the engine had this step under way
            if job.first is None:
                self._ask_cached(replica, job, request_id)
            self._measure(job, batch, now)
            out.append((job, batch))
            reasons = [event.finish_reason for event in batch if event.finish_reason]
            if reasons:
                job.live -= len(reasons)
                replica.used_rows -= len(reasons)
                self._finished(job, reasons, now)
                if job.live <= 0:
                    del replica.running[request_id]
        self._send(out)

    def _ask_cached(self, replica: Replica, job: Job, request_id: int) -> None:
        """How much of the prompt the engine found in its cache; not every engine knows."""
        ask = getattr(replica.engine, "cached_tokens", None)
        if ask is not None:
            job.cached = ask(request_id)
            self.metrics.add("vllm:prefix_cache_queries", self._label, job.prompt_tokens)
            self.metrics.add("vllm:prefix_cache_hits", self._label, job.cached or 0)

    def _measure(self, job: Job, batch: list[Any], now: float) -> None:
        observe = self.metrics.observe
        if job.first is None:
            job.first = now
            observe("vllm:time_to_first_token_seconds", self._label, now - job.arrived)
            observe("vllm:request_prefill_time_seconds", self._label, now - (job.started or now))
            self.metrics.add("vllm:prompt_tokens", self._label, job.prompt_tokens)
            observe("vllm:request_prompt_tokens", self._label, job.prompt_tokens)
        elif job.last is not None:
            observe("vllm:inter_token_latency_seconds", self._label, now - job.last)
            observe("vllm:time_per_output_token_seconds", self._label, now - job.last)
        job.last = now
        job.generated += len(batch)
        self.metrics.add("vllm:generation_tokens", self._label, len(batch))

    def _finished(self, job: Job, reasons: list[str], now: float) -> None:
        for reason in reasons:
            labels = (*self._label, ("finished_reason", reason))
            self.metrics.add("vllm:request_success", labels)
        if job.live <= 0 or job.call is not None:
            observe = self.metrics.observe
            observe("vllm:e2e_request_latency_seconds", self._label, now - job.arrived)
            if job.first is not None:
                observe("vllm:request_decode_time_seconds", self._label, now - job.first)
                observe("vllm:request_generation_tokens", self._label, job.generated)

    def _cancel_marked(self, replica: Replica, engine: EngineLike) -> None:
        while replica.cancels:
            gone = replica.cancels.popleft()
            for request_id, job in list(replica.running.items()):
                if job is gone:
                    engine.cancel(request_id)
                    del replica.running[request_id]
                    replica.used_rows -= job.live
                    self.metrics.add("fledge:cancelled_requests", self._label)
            kept = [entry for entry in replica.calls if entry[0] is not gone]
            replica.used_rows -= sum(j.rows for j, _ in replica.calls if j is gone)
            replica.calls = collections.deque(kept)

    def _send(self, batches: list[tuple[Job, Any]]) -> None:
        if batches:
            self._call(_deliver, batches)

    def _call(self, function: Callable[..., None], *args: Any) -> None:
        assert self._loop is not None
        try:
            self._loop.call_soon_threadsafe(function, *args)
        except RuntimeError:  # the loop is closed: nobody is left to be told
            log.debug("the event loop is gone")


def _deliver(batches: list[tuple[Job, Any]]) -> None:
    for job, batch in batches:
        job.deliver(batch)


def _close(replica: Replica) -> None:
    """Lets go of an engine: its cache before the next one is built, its tool threads."""
    engine, replica.engine = replica.engine, None
    close = getattr(engine, "close", None)
    if close is not None:
        try:
            close()
        except Exception as error:  # it is broken already; the next one must come all the same
            log.warning("closing an engine failed: %s", type(error).__name__)
