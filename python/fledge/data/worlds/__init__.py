"""Worlds: synthetic data that a tiny model can truly learn, with exams that prove it.

A world is tables of facts plus a grammar. From them `World` makes prose, conversations, problems
and exams, deterministically. `load_world` is the way in.
"""

from fledge.data.worlds.prose import Document
from fledge.data.worlds.tables import Fact
from fledge.data.worlds.world import World, load_world

__all__ = ["Document", "Fact", "World", "load_world"]
