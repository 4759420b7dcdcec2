"""Exams that several gloo ranks share end with the results of one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tests.optim.test_sharded import ranks

from fledge.dist import World
from fledge.evals.records import CHUNK, UNIT, examine_in_chunks


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("ranks") / "one"
    return ranks(folder, 1, 0, module="tests.evals.ranks")[0]


def logprobs_of(record: dict[str, Any]) -> list[float]:
    found = record.get("logprobs", record.get("mean_logprobs", []))
    return [x for row in found for x in (row if isinstance(row, list) else [row])]


@pytest.mark.timeout(600)
@pytest.mark.parametrize("size", [2, 4])
def test_ranks_end_with_the_results_of_one_process(
    alone: dict[str, Any], tmp_path: Path, size: int
) -> None:
    found = ranks(tmp_path / "ranks", size, 0, module="tests.evals.ranks")
    for one in found:
        assert one["same"] == alone["same"]  # bitwise, on every rank
        assert one["close"].keys() == alone["close"].keys()
        for name in alone["close"].keys() - {"chat"}:
            *scores, records = one["close"][name]
            *expected, whole = alone["close"][name]
            assert scores == expected
            for a, b in zip(records, whole, strict=True):
                assert logprobs_of(a) == pytest.approx(logprobs_of(b), abs=1e-5)


class Two(World):
    """Rank `rank` of two, of which the other never answers: it shows who scores what."""

    def tell(self, value: Any) -> Any:
        return value

    def all_of(self, value: Any) -> list[Any]:
        return [value]


def test_units_go_round_among_the_ranks() -> None:
    sizes = [5] * (CHUNK + 70)
    asked: list[list[int]] = []

    def score(indices: list[int]) -> list[dict[str, Any]]:
        asked.append(indices)
        return [{"id": i} for i in indices]

    for rank in (0, 1):
        with pytest.raises(KeyError):  # the other's part is missing
            examine_in_chunks(sizes[:CHUNK], score, world=Two(rank, 2))
    assert sorted(i for unit in asked for i in unit) == list(range(CHUNK))
    assert [unit[0] for unit in asked[: CHUNK // UNIT // 2]] == list(range(0, CHUNK, 2 * UNIT))
    # one process takes the very same units, so nothing is ever computed in other company
    by_ranks = sorted(map(tuple, asked))
    asked.clear()
    examine_in_chunks(sizes[:CHUNK], score)
    assert sorted(map(tuple, asked)) == by_ranks


def test_without_units_every_rank_takes_every_second_example() -> None:
    asked: list[int] = []

    def score(indices: list[int]) -> list[dict[str, Any]]:
        asked.extend(indices)
        return [{} for _ in indices]

    with pytest.raises(KeyError):
        examine_in_chunks([1] * 9, score, unit=None, world=Two(1, 2))
    assert asked == [1, 3, 5, 7]


def test_only_the_leader_keeps_what_is_done(tmp_path: Path) -> None:
    partial = tmp_path / "p.jsonl"

    class Told(Two):
        def all_of(self, value: Any) -> list[Any]:
            return [value, {i: {} for i in range(9)}]

    examine_in_chunks([1] * 9, lambda i: [{} for _ in i], partial=partial, world=Told(1, 2))
    assert not partial.exists()
    examine_in_chunks([1] * 9, lambda i: [{} for _ in i], partial=partial, world=Told(0, 2))
    assert len(partial.read_text().splitlines()) == 10
