"""Failures: what the ranks that are left say when another one died, stopped or is too slow.

A backend names an address or a number of milliseconds. Which rank it was is found by asking: a rank at which a collective fails
writes so into the world's store, and looks who else has. Whoever has not is dead, stopped at an error of its own, or lags.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch.distributed as dist

from .c10d import group_called, world_store
from .errors import CommunicationError, first_lines

GRACE = 3.0  # seconds in which other ranks at the same collective fail too


def failed(group: str | Sequence[int], asked: str, where: str, error: Exception) -> CommunicationError:
    """The error to raise for what a backend raised in a collective over a group (by its c10d name, or its ranks)."""
    missing: list[int] | None
    try:
        ranks = list(dist.get_process_group_ranks(group_called(group)) if isinstance(group, str) else group)
        missing = _silent(ranks)
    except (RuntimeError, ValueError):  # the store's process is gone too, or there is no process group
        missing = None
    if missing:
        who = f"rank{'s' * (len(missing) > 1)} {', '.join(map(str, missing))}"
        found = f"{who} did not come: dead, stopped at an error of its own, or too slow"
        remedy = (
            f"look for the first error in the log of {who}; where there is none, allow more time with "
            "init_process_group(timeout=...)"
        )
    else:
        found = "it failed on every rank" if missing == [] else "another rank is gone, perhaps the first one"
        remedy = "look for the earliest error in the logs of all ranks"
    told = CommunicationError(asked, f"{found} ({first_lines(error, 300)})", where or None, remedy)
    told.missing = tuple(missing or ())
    return told


def _silent(ranks: Sequence[int]) -> list[int]:
    """Tells the others that a collective failed here; of `ranks` those that have not told so after a while."""
    store = dist.PrefixStore("dsp_auto/failed", world_store())
    store.set(str(dist.get_rank()), "")
    until = time.monotonic() + GRACE
    while True:
        silent = [rank for rank in ranks if not store.check([str(rank)])]
        if not silent or time.monotonic() > until:
            return silent
        time.sleep(0.05)
