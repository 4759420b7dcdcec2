"""`fledge._bpe.Counter` and `train`: streaming, saving, progress, Ctrl-C, the same merges."""

from __future__ import annotations

import _thread
import signal
import threading
import time

import pytest

from fledge.tokenizer import reference

bpe = pytest.importorskip("fledge._bpe")

PATTERNS = sorted(reference.PATTERNS)


def test_patterns_are_the_same_regexes_on_both_sides():
    for name, regex in reference.PATTERNS.items():
        assert bpe.pattern_regex(name) == regex
    assert bpe.pattern_regex(r"regex:\d") == r"\d"


@pytest.mark.parametrize("pattern", [*PATTERNS, r"regex:\d|[a-z]+", "regex:x*"])
def test_pieces_and_merges_equal_the_reference(texts, pattern):
    for text in texts:
        assert bpe.split(text, pattern) == reference.split(text, pattern)
    merges = bpe.train(texts * 2, 150, pattern)
    assert merges == reference.train(texts * 2, 150, pattern)
    assert bpe.train(reversed(texts * 2), 150, pattern, 3) == merges


@pytest.mark.parametrize("engine", [bpe, reference])
def test_a_bad_regex_is_named(engine):
    with pytest.raises(ValueError, match="split regex"):
        engine.split("x", "regex:(")
    with pytest.raises(ValueError, match="no pattern"):
        engine.split("x", "gpt9")


def test_a_counter_goes_on_from_a_saved_state(texts, tmp_path):
    counter = bpe.Counter("o200k+marks")
    counter.add(texts[:2])
    counter.save(tmp_path / "counts")
    resumed = bpe.Counter("o200k+marks", threads=1)
    resumed.add_saved(tmp_path / "counts")
    resumed.add(iter(texts[2:]))
    assert resumed.num_texts == len(texts)
    assert resumed.num_bytes == sum(len(text.encode()) for text in texts)
    assert resumed.pattern == "o200k+marks"
    assert resumed.learn(100) == bpe.train(texts, 100, "o200k+marks")


def test_a_damaged_state_is_refused(texts, tmp_path):
    counter = bpe.Counter("qwen2")
    counter.add(texts)
    counter.save(tmp_path / "counts")
    data = bytearray((tmp_path / "counts").read_bytes())
    data[len(data) // 2] ^= 1
    (tmp_path / "counts").write_bytes(data)
    other = bpe.Counter("qwen2")
    with pytest.raises(ValueError, match="counts"):
        other.add_saved(tmp_path / "counts")
    assert other.num_texts == 0 and other.learn(10) == []
    with pytest.raises(OSError, match="nowhere"):
        other.add_saved(tmp_path / "nowhere")


def test_a_file_is_one_text(texts, tmp_path):
    text = "\n".join(texts)
    (tmp_path / "text").write_text(text, encoding="utf-8", newline="")
    counter = bpe.Counter("llama3")
    counter.add_file(tmp_path / "text")
    assert counter.num_texts == 1
    assert counter.learn(100) == bpe.train([text], 100, "llama3")


def test_progress_is_told_both_phases(texts):
    calls = []
    bpe.train(texts, 50, "qwen2", progress=lambda *call: calls.append(call), total_bytes=9)
    num_bytes = sum(len(text.encode()) for text in texts)
    assert ("count", num_bytes, 9) in calls
    assert calls[-1] == ("merge", 50, 50)


def test_what_fails_inside_comes_out_and_spoils_the_counts(texts):
    def broken():
        yield from texts
        raise LookupError("no more")

    counter = bpe.Counter("qwen2")
    with pytest.raises(LookupError, match="no more"):
        counter.add(broken())
    with pytest.raises(RuntimeError, match="incomplete"):
        counter.learn(5)
    with pytest.raises(ZeroDivisionError):
        bpe.train(texts, 5, "qwen2", progress=lambda phase, done, total: 1 // 0)
    with pytest.raises(TypeError):
        bpe.train([b"bytes"], 5, "qwen2")


@pytest.mark.parametrize("phase", ["count", "merge"])
def test_ctrl_c_gets_through(phase):
    # One text that cannot be cut, counted and learnt by one thread: nothing returns by itself.
    text = "".join(chr(0x4E00 + i * i % 20_000) for i in range(4_000_000))
    asked = threading.Event()
    times = []
    # a shell's background job is started with SIGINT ignored, and then there is no handler
    before = signal.signal(signal.SIGINT, signal.default_int_handler)

    def progress(now, done, total):
        if now == phase and not asked.is_set():
            asked.set()
            times.append(time.monotonic())
            _thread.interrupt_main()

    counter = bpe.Counter("qwen2", threads=1)
    try:
        with pytest.raises(KeyboardInterrupt):
            counter.add([text] * 20, progress=progress)
            counter = bpe.Counter("qwen2", threads=1)
            counter.add([text])
            counter.learn(50_000, progress=progress)
    finally:
        signal.signal(signal.SIGINT, before)
    assert asked.is_set()
    assert time.monotonic() - times[0] < 5  # 0.2 s on a machine that has nothing else to do
