"""A hub that is gone, slow, busy or wrong: asked again, resumed, or refused with the remedy.

Nothing that arrived half or damaged is ever handed out, nor left where a later run would find it.
"""

from __future__ import annotations

import hashlib
import io
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from fledge.data import hub, patience
from fledge.data.task_files import TaskData
from fledge.errors import UserError
from tests.helpers_hub import LocalHub, local_hub

pytest.importorskip("huggingface_hub", reason="huggingface_hub is not installed")

LARGE = bytes(range(256)) * 12_000  # 3 MB: several reads
NAMES = {"some/set/data/train.parquet": LARGE, "some/set/small.jsonl": b'{"a": 1}\n'}
LARGE_FILE = "data/train.parquet"


def archive(members: dict[str, bytes]) -> bytes:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_STORED) as target:
        for name, data in members.items():
            target.writestr(name, data)
    return packed.getvalue()


ROW = b'{"query": "Why?", "choices": ["a", "b"], "gold": 0}\n'
BUNDLE = archive(
    {
        "eval_bundle/core.yaml": b"x",
        "eval_bundle/eval_data/commonsense_reasoning/copa.jsonl": ROW * 2000,
        "eval_bundle/eval_data/../../outside.jsonl": ROW,
    }
)


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LocalHub]:
    monkeypatch.setattr(patience, "WAITS", (0.0, 0.0))
    files = NAMES | {"eval_bundle.zip": BUNDLE}
    with local_hub(files, str(tmp_path / "home"), monkeypatch) as made:
        yield made


def fetch() -> Path:
    return hub.fetch("some/set", [LARGE_FILE])[0]


@pytest.mark.parametrize("fault", ["429", "500", "corrupt", "short"])
def test_a_fault_that_passes_is_outlived(server: LocalHub, fault: str) -> None:
    server.faults[LARGE_FILE] = [fault]
    assert fetch().read_bytes() == LARGE
    assert len(server.paths()) >= 2


def test_a_file_that_broke_off_is_resumed_where_it_stopped(
    server: LocalHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    # what arrived is written by such pieces: 10 MB in earnest
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 65536)
    server.faults[LARGE_FILE] = ["broken off"]
    assert fetch().read_bytes() == LARGE
    ranges = [path for path in server.paths() if "bytes=" in path]
    assert ranges and not ranges[-1].endswith("bytes=0-")


@pytest.mark.parametrize("fault", ["500", "corrupt", "short"])
def test_a_fault_that_stays_is_refused_and_leaves_nothing(
    server: LocalHub, tmp_path: Path, fault: str
) -> None:
    server.faults[LARGE_FILE] = [fault] * 60
    with pytest.raises(UserError) as caught:
        fetch()
    assert "asked 3 times" in caught.value.why or "some/set" in caught.value.what
    assert "again" in caught.value.fix or "connect" in caught.value.fix
    digest = hashlib.sha256(LARGE).hexdigest()
    left = [p for p in (tmp_path / "home").rglob("*") if p.name in (digest, "train.parquet")]
    assert left == []
    server.faults.clear()
    assert fetch().read_bytes() == LARGE  # the same command, later


def test_what_a_kill_left_unchecked_is_looked_at_before_it_is_used(
    server: LocalHub, tmp_path: Path
) -> None:
    path = fetch().resolve()
    path.write_bytes(LARGE[:-1] + b"?")
    (mark,) = (tmp_path / "home" / "hub" / "seen-whole").iterdir()
    mark.unlink()
    assert fetch().read_bytes() == LARGE
    mark.unlink()
    path.write_bytes(LARGE[:-1] + b"?")
    server.shutdown()
    server.server_close()
    with pytest.raises(UserError, match="not on this machine"):
        fetch()


def test_a_small_file_is_compared_with_its_git_checksum(server: LocalHub) -> None:
    server.faults["small.jsonl"] = ["corrupt"]
    (path,) = hub.fetch("some/set", ["small.jsonl"])
    assert path.read_bytes() == NAMES["some/set/small.jsonl"]


@pytest.mark.parametrize("faults", [["500"] * 2, ["429", "500"], ["hangs"]])
def test_a_listing_too_is_asked_for_again(
    server: LocalHub, monkeypatch: pytest.MonkeyPatch, faults: list[str]
) -> None:
    from huggingface_hub import HfApi

    quick = HfApi.dataset_info

    def hasty(self, *args, **rest):
        return quick(self, *args, **(rest | {"timeout": 0.5}))

    monkeypatch.setattr(HfApi, "dataset_info", hasty)
    server.faults["api/datasets"] = faults
    assert [name for name, _ in hub.listing("some/set").files] == [LARGE_FILE, "small.jsonl"]


def test_a_hub_that_goes_away_during_training_is_waited_for(
    server: LocalHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def away_once(**_: object) -> bool:
        asked.append(1)
        return len(asked) > 1

    monkeypatch.setattr(hub, "reachable", away_once)
    with pytest.raises(UserError, match="not on this machine"):
        fetch()  # at the beginning of a run nobody should wait
    asked.clear()
    (path,) = hub.fetch("some/set", [LARGE_FILE], wait=True)
    assert path.read_bytes() == LARGE and len(asked) == 2


def test_a_busy_server_says_how_long_to_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    class Busy(Exception):
        class response:
            status_code = 429
            headers = {"Retry-After": "7"}  # noqa: RUF012

    slept: list[float] = []
    monkeypatch.setattr(patience.time, "sleep", slept.append)

    def attempt() -> None:
        raise Busy

    with pytest.raises(Busy):
        patience.keep_trying(attempt, what="it")
    assert slept == [7.0, 7.0, 15.0, 40.0]


# -- CORE's archive ------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", ["500", "broken off", "corrupt"])
def test_cores_archive_is_fetched_whole_or_not_at_all(
    server: LocalHub, tmp_path: Path, fault: str
) -> None:
    server.faults["eval_bundle"] = [fault]
    if fault == "corrupt":
        with pytest.raises(UserError, match="arrived damaged"):
            hub.core_bundle()
        assert not (tmp_path / "home" / "core").exists()
    folder = hub.core_bundle()
    found = {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}
    assert found == {"commonsense_reasoning/copa.jsonl"}
    asked = len(server.asked)
    assert hub.core_bundle() == folder and len(server.asked) == asked
    left = sorted(p.name for p in (tmp_path / "home").iterdir())
    assert left == ["core"]
    if fault == "broken off":
        assert any("bytes=" in line for line in server.asked)


def test_cores_rows_come_from_the_archive(server: LocalHub) -> None:
    data = TaskData(None)
    data.root = None
    rows = data.rows("core/eval_data/commonsense_reasoning/copa")
    assert rows is not None and len(rows) == 2000
    assert data.rows("core/eval_data/no/such") is None
    assert "has no such.jsonl" in data.why_missing("core/eval_data/no/such")


def test_without_the_archive_a_sentence_says_so_once(server: LocalHub) -> None:
    server.faults["eval_bundle"] = ["500"] * 9
    data = TaskData(None)
    for name in ("copa", "piqa"):
        assert data.rows(f"core/eval_data/x/{name}") is None
    assert len([line for line in server.asked if "eval_bundle" in line]) == 3
    assert "could not be downloaded" in data.missing()[0]
