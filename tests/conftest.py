"""Fixtures that every test may use."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from tests.world import World


@pytest.fixture(scope="session")
def world() -> Iterator[Callable[[int], World]]:
    """`world(n)`: n gloo processes, the same ones for the whole session."""
    worlds: dict[int, World] = {}

    def of(ranks: int) -> World:
        return worlds.setdefault(ranks, World(ranks))

    yield of
    for one in worlds.values():
        one.stop()
