"""The pool: bounded queue, turns, deadlines, cancelling, crashes, replicas. No HTTP here."""

from __future__ import annotations

import asyncio
import threading

import pytest

from fledge.engine.requests import Request, SamplingParams
from fledge.errors import UserError
from fledge.serve.api_errors import ApiError
from fledge.serve.jobs import Job
from fledge.serve.metrics import Metrics
from fledge.serve.settings import Limits
from fledge.serve.worker import Pool
from tests.serve.fake import FakeEngine


class Bench:
    """A running pool of fake engines inside an event loop."""

    def __init__(self, toy, limits: Limits | None = None, *, replicas: int = 1, slots: int = 4):
        self.tok = toy
        self.engines: list[FakeEngine] = []
        self.gate = threading.Event()
        self.gate.set()
        self.fatal: list[BaseException] = []
        self.metrics = Metrics()

        def make() -> FakeEngine:
            self.engines.append(FakeEngine(toy, slots=slots, gate=self.gate))
            return self.engines[-1]

        self.pool = Pool("m", [make] * replicas, limits=limits or Limits(), metrics=self.metrics,
                         on_fatal=self.fatal.append)  # fmt: skip

    async def __aenter__(self):
        self.pool.start()
        while self.pool.state() != "ready":
            await asyncio.sleep(0.005)
        return self

    async def __aexit__(self, *_):
        self.gate.set()
        await asyncio.to_thread(self.pool.stop)

    def job(self, text: str, *, key: str = "", n: int = 1) -> Job:
        special = self.tok.special_tokens
        prompt = [special["<|user_start|>"], *self.tok.encode(text), special["<|user_end|>"]]
        request = Request(prompt, SamplingParams(max_tokens=500, n=n))
        return Job(request, rows=n, key=key, prompt_tokens=len(prompt))

    async def text(self, handle) -> str:
        tokens: list[int] = []
        while True:
            for event in await handle.next():
                tokens.append(event.token)
                if event.finish_reason:
                    return self.tok.decode(tokens, skip_special=True)


async def until(condition) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.005)


def test_jobs_of_a_submission_all_get_in_or_none(toy):
    async def run():
        async with Bench(toy, Limits(waiting_rows=3), slots=1) as bench:
            bench.gate.clear()
            (running,) = bench.pool.submit([bench.job("say a")])
            await until(lambda: bench.pool.running == 1)
            bench.pool.submit([bench.job("say b"), bench.job("say c")])
            with pytest.raises(ApiError) as caught:
                bench.pool.submit([bench.job("say d"), bench.job("say e")])
            assert caught.value.status == 503 and int(caught.value.headers["retry-after"]) >= 1
            assert bench.pool.waiting == 2
            (last,) = bench.pool.submit([bench.job("say f")])
            bench.gate.set()
            assert await bench.text(running) == "a"
            assert await bench.text(last) == "f"

    asyncio.run(run())


def test_a_burst_is_not_refused_while_rows_are_free(toy):
    """The engine thread may be in a step when all of a burst arrive."""

    async def run():
        async with Bench(toy, Limits(waiting_rows=1), slots=6) as bench:
            bench.gate.clear()
            bench.pool.submit([bench.job("say first")])
            await until(lambda: bench.pool.running == 1)
            # the engine hangs in its step: nothing is admitted now
            handles = [bench.pool.submit([bench.job(f"say {i}")])[0] for i in range(6)]
            with pytest.raises(ApiError):
                bench.pool.submit([bench.job("say more")])
            bench.gate.set()
            assert [await bench.text(h) for h in handles] == [str(i) for i in range(6)]

    asyncio.run(run())


def test_a_request_larger_than_the_queue_runs_on_an_idle_server(toy):
    async def run():
        async with Bench(toy, Limits(waiting_rows=1), slots=2) as bench:
            (handle,) = bench.pool.submit([bench.job("say x", n=8)])
            ended = 0
            while ended < 8:
                ended += sum(e.finish_reason is not None for e in await handle.next())
            assert bench.pool.replicas[0].used_rows == 0

    asyncio.run(run())


def test_keys_take_turns(toy):
    async def run():
        async with Bench(toy, slots=1) as bench:
            bench.gate.clear()
            bench.pool.submit([bench.job("say first", key="greedy")])
            await until(lambda: bench.pool.running == 1)
            for i in range(5):
                bench.pool.submit([bench.job(f"say g{i}", key="greedy")])
            (modest,) = bench.pool.submit([bench.job("say me", key="modest")])
            bench.gate.set()
            await bench.text(modest)
            asked = [bench.tok.decode(r.prompt, skip_special=True)
                     for r in bench.engines[0].requests.values()]  # fmt: skip
            assert asked.index("say me") <= 2, asked

    asyncio.run(run())


def test_cancel_in_the_queue_and_in_the_engine(toy):
    async def run():
        async with Bench(toy, slots=1) as bench:
            bench.gate.clear()
            (running,) = bench.pool.submit([bench.job("count 100")])
            await until(lambda: bench.pool.running == 1)
            (waiting,) = bench.pool.submit([bench.job("say never")])
            waiting.cancel()
            assert bench.pool.waiting == 0
            running.cancel()
            running.cancel()
            bench.gate.set()
            await until(lambda: bench.engines[0].in_flight == 0)
            await until(lambda: bench.pool.running == 0)
            assert bench.engines[0].cancelled == [1] and len(bench.engines[0].requests) == 1
            (after,) = bench.pool.submit([bench.job("say after")])
            assert await bench.text(after) == "after"
            assert bench.pool.replicas[0].used_rows == 0

    asyncio.run(run())


def test_a_cancel_storm_leaves_nothing(toy):
    async def run():
        async with Bench(toy, slots=4) as bench:
            for _ in range(50):
                handles = bench.pool.submit([bench.job("count 50", n=2) for _ in range(4)])
                await asyncio.sleep(0)
                for handle in handles:
                    handle.cancel()
            await until(lambda: bench.pool.running == 0 and bench.pool.waiting == 0)
            await until(lambda: bench.engines[0].in_flight == 0)
            assert bench.pool.replicas[0].used_rows == 0
            assert bench.pool._waiting_rows == 0

    asyncio.run(run())


def test_deadlines(toy):
    async def run():
        limits = Limits(queue_seconds=0.2, request_seconds=0.6)
        async with Bench(toy, limits, slots=1) as bench:
            bench.gate.clear()
            (running,) = bench.pool.submit([bench.job("count 100")])
            await until(lambda: bench.pool.running == 1)
            (waiting,) = bench.pool.submit([bench.job("say x")])
            with pytest.raises(ApiError) as caught:
                await waiting.next()
            assert caught.value.status == 503 and bench.pool.waiting == 0
            with pytest.raises(ApiError) as caught:
                await running.next()
            # the engine hangs, and the client is told all the same
            assert caught.value.status == 408
            assert caught.value.headers["x-should-retry"] == "false"
            bench.gate.set()
            await until(lambda: bench.engines[0].in_flight == 0)

    asyncio.run(run())


def test_a_hanging_engine_is_seen(toy):
    async def run():
        async with Bench(toy, Limits(heartbeat_seconds=0.2)) as bench:
            bench.gate.clear()
            (handle,) = bench.pool.submit([bench.job("say x")])
            await until(lambda: bench.pool.state() == "stalled")
            bench.gate.set()
            assert await bench.text(handle) == "x"
            await until(lambda: bench.pool.state() == "ready")

    asyncio.run(run())


def test_a_crash_ends_what_ran_and_the_queue_goes_on(toy):
    async def run():
        async with Bench(toy, slots=2) as bench:
            bench.gate.clear()
            crash, other = bench.pool.submit([bench.job("crash"), bench.job("count 200")])
            await until(lambda: bench.pool.running == 2)
            (waiting,) = bench.pool.submit([bench.job("say survived")])
            bench.gate.set()
            for handle in (crash, other):
                with pytest.raises(ApiError) as caught:
                    while True:
                        await handle.next()
                assert caught.value.code == "engine_failure"
            assert await bench.text(waiting) == "survived"
            assert len(bench.engines) == 2 and not bench.fatal
            assert bench.pool.replicas[0].used_rows == 0

    asyncio.run(run())


def test_too_many_crashes_are_fatal(toy):
    async def run():
        async with Bench(toy, Limits(crashes=2)) as bench:
            for _ in range(2):
                (handle,) = bench.pool.submit([bench.job("crash")])
                with pytest.raises(ApiError):
                    while True:
                        await handle.next()
            await until(lambda: bench.fatal)
            assert bench.pool.state() == "failed"
            with pytest.raises(ApiError) as caught:
                bench.pool.submit([bench.job("say x")])
            assert caught.value.status == 503

    asyncio.run(run())


def test_an_engine_that_cannot_be_built_is_fatal():
    async def run():
        wrong = UserError("the weights do not fit", "their shapes differ", "take both files")
        fatal: list[BaseException] = []

        def broken():
            raise wrong

        pool = Pool("m", [broken], limits=Limits(), metrics=Metrics(), on_fatal=fatal.append)
        pool.start()
        await until(lambda: fatal)
        assert fatal == [wrong] and pool.state() == "failed"
        await asyncio.to_thread(pool.stop)

    asyncio.run(run())


def test_a_request_that_the_engine_refuses_harms_nobody(toy):
    async def run():
        async with Bench(toy) as bench:
            (good,) = bench.pool.submit([bench.job("say fine")])
            bad = Job(request=None)
            engine = bench.engines[0]
            accept = engine.add

            def add(request):
                if request is None:
                    raise UserError("the prompt is empty", "nothing can follow", "add text")
                return accept(request)

            engine.add = add  # type: ignore[method-assign]
            (handle,) = bench.pool.submit([bad])
            with pytest.raises(ApiError) as caught:
                await handle.next()
            assert caught.value.status == 400 and "the prompt is empty" in caught.value.message
            assert await bench.text(good) == "fine"
            assert bench.pool.replicas[0].used_rows == 0

    asyncio.run(run())


def test_replicas_share_the_queue(toy):
    async def run():
        async with Bench(toy, replicas=2, slots=1) as bench:
            await until(lambda: len(bench.engines) == 2)
            bench.gate.clear()
            handles = bench.pool.submit([bench.job(f"say {i}") for i in range(6)])
            await until(lambda: bench.pool.running == 2)
            bench.gate.set()
            assert [await bench.text(h) for h in handles] == [str(i) for i in range(6)]
            assert all(engine.requests for engine in bench.engines)

    asyncio.run(run())


def test_calls_run_between_steps(toy):
    async def run():
        async with Bench(toy) as bench:
            order: list[str] = []

            def work(engine):
                for i in range(3):
                    order.append(f"piece {i}")
                    yield
                return "result"

            (tokens,) = bench.pool.submit([bench.job("count 50")])
            (call,) = bench.pool.submit([Job(call=work)])
            assert await call.next() == ["result"]
            assert order == ["piece 0", "piece 1", "piece 2"]
            assert (await bench.text(tokens)).endswith("50")
            assert bench.pool.replicas[0].used_rows == 0

    asyncio.run(run())


def test_abort_ends_everything(toy):
    async def run():
        async with Bench(toy, slots=1) as bench:
            bench.gate.clear()
            handles = bench.pool.submit([bench.job("count 9"), bench.job("count 9")])
            await until(lambda: bench.pool.running == 1)
            over = ApiError(503, "over")
            bench.pool.abort(over)
            for handle in handles:
                with pytest.raises(ApiError) as caught:
                    await handle.next()
                assert caught.value is over
            bench.gate.set()
            await until(lambda: bench.pool.running == 0 and bench.engines[0].in_flight == 0)

    asyncio.run(run())


def test_figures(toy):
    async def run():
        async with Bench(toy) as bench:
            (handle,) = bench.pool.submit([bench.job("say abc")])
            await bench.text(handle)
            text = bench.metrics.text()
            label = '{engine="0",model_name="m"}'
            assert f"vllm:generation_tokens_total{label} 4" in text
            assert 'finished_reason="stop"} 1' in text
            assert f"vllm:time_to_first_token_seconds_count{label} 1" in text
            assert f"vllm:inter_token_latency_seconds_count{label} 3" in text
            assert f"vllm:num_requests_running{label} 0" in text

    asyncio.run(run())
