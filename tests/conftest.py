"""Fixtures that every test may use."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

import pytest

from tests.world import World

os.environ.setdefault("DSP_AUTO_CACHE", "off")  # rules found in tests stay out of the user's cache


@pytest.fixture(scope="session")
def world() -> Iterator[Callable[[int], World]]:
    """`world(n)`: n gloo processes, the same ones for the whole session."""
    worlds: dict[int, World] = {}

    def of(ranks: int) -> World:
        return worlds.setdefault(ranks, World(ranks))

    yield of
    for one in worlds.values():
        one.stop()
