"""Worlds that the tests of this folder share."""

from __future__ import annotations

from pathlib import Path

import pytest

from fledge.data.worlds import World, load_world


@pytest.fixture(scope="session")
def village() -> World:
    """The village of seed 7."""
    return load_world("village", 7)


@pytest.fixture
def table(tmp_path: Path) -> Path:
    """A small table of a user: 20 stars with two relations."""
    lines = ["star,colour,first_seen"]
    lines += [f"Star{i},shade {i % 10},{1500 + i}" for i in range(20)]
    path = tmp_path / "stars.csv"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path
