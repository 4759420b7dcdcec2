"""Fetching from the hub: from a small local server that speaks its endpoints, and offline."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.helpers_hub import COMMIT, LocalHub, local_hub

from fledge.data import hub
from fledge.errors import UserError

pytest.importorskip("huggingface_hub", reason="huggingface_hub is not installed")


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


CONTENT = b'{"question": "1+1?", "answer": "#### 2"}\n'


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LocalHub]:
    files = {"some/set/data/train.jsonl": CONTENT}
    with local_hub(files, str(tmp_path / "home"), monkeypatch) as made:
        yield made


def test_a_file_is_fetched_once_and_then_kept(server: LocalHub, tmp_path: Path) -> None:
    (path,) = hub.fetch("some/set", ["data/train.jsonl"])
    assert path.read_bytes() == CONTENT
    assert path.is_relative_to(tmp_path / "home")
    asked = len(server.asked)
    assert hub.fetch("some/set", ["data/train.jsonl"]) == [path]
    assert len(server.asked) == asked
    assert hub.reachable()


def test_a_file_that_does_not_exist(server: LocalHub) -> None:
    with pytest.raises(UserError) as caught:
        hub.fetch("some/set", ["data/other.jsonl"])
    assert "the hub does not give some/set/data/other.jsonl" in caught.value.what


def test_a_listing_is_asked_for_once(server: LocalHub, monkeypatch: pytest.MonkeyPatch) -> None:
    found = hub.listing("some/set")
    assert found == hub.Listing("some/set", COMMIT, [("data/train.jsonl", len(CONTENT))])
    asked = len(server.asked)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    assert hub.listing("some/set") == found  # without a network
    assert len(server.asked) == asked
    with pytest.raises(UserError, match="list of files of other/set"):
        hub.listing("other/set")


def test_a_listing_of_a_data_set_that_does_not_exist(server: LocalHub) -> None:
    with pytest.raises(UserError, match="does not give the list of files of no/set"):
        hub.listing("no/set")


def test_no_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # the discard port: nobody listens
    monkeypatch.setenv("FLEDGE_HOME", str(tmp_path))
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    assert not hub.reachable(timeout_seconds=0.5)
    with pytest.raises(UserError) as caught:
        hub.fetch("some/set", ["data/train.jsonl"])
    assert "not found under --data.root or FLEDGE_DATA, and the hub is not reachable" in (
        caught.value.why
    )


def test_offline_mode_asks_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("FLEDGE_HOME", str(tmp_path))
    assert hub.offline() and not hub.reachable()
    with pytest.raises(UserError, match="HF_HUB_OFFLINE forbids"):
        hub.fetch("some/set", ["data/train.jsonl"])


def test_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLEDGE_HOME", str(tmp_path))
    assert hub.home() == tmp_path
    monkeypatch.delenv("FLEDGE_HOME")
    assert hub.home() == Path.home() / ".cache" / "fledge"
