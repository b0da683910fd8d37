"""Progress: what planning says while it goes on, and once a plan is made.

Logs go to the logger "dsp_auto" and those below it: a line at INFO for each plan, and warnings, on the first rank alone (on
others at DEBUG), and at DEBUG the plan itself and what each step took. On a terminal the first rank also says on stderr what
takes long; into a pipe or a file nothing is written.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist

from .plan import Plan
from .units import show_bytes

# Seconds after which a step is worth a line on the terminal.
DELAY = 1.0
_log = logging.getLogger("dsp_auto")


@contextmanager
def step(what: str) -> Iterator[None]:
    """Around what may take long: `with step("capture of Transformer2D")`."""
    said = threading.Event()

    def begin() -> None:
        said.set()
        _say(f"{what} …")

    timer = threading.Timer(DELAY, begin)
    timer.daemon = True
    if _is_watched():
        timer.start()
    started = time.perf_counter()
    try:
        yield
    finally:
        timer.cancel()
        seconds = time.perf_counter() - started
        _log.debug("%s took %.2f s", what, seconds)
        if said.is_set():
            _say(f"{what}: {seconds:.1f} s")


def log_plan(plan: Plan) -> None:
    """The line on a plan that was made."""
    sent, memory = plan.communication, plan.memory
    seconds = sum(plan.seconds.get(name, 0.0) for name in ("capture", "plan", "rewrite"))
    mesh = " x ".join(f"{name}={size}" for name, size in plan.mesh.items())
    _log.log(
        logging.INFO if _is_first_rank() else logging.DEBUG,
        "planned %s for mesh %s in %.1f s: wire bytes per device %s forward, %s backward; %s at the peak%s",
        plan.strategy,
        mesh,
        seconds,
        show_bytes(sent["forward_bytes"]),
        show_bytes(sent["backward_bytes"]),
        show_bytes(memory["peak_bytes"]),
        f" of {show_bytes(memory['capacity_bytes'])}" if memory["capacity_bytes"] is not None else "",
    )
    _log.debug("the plan %s:\n%s", plan.digest[:12], plan)


def warn(text: str) -> None:
    """Logs what every rank has seen, at WARNING on the first rank alone."""
    _log.log(logging.WARNING if _is_first_rank() else logging.DEBUG, text)


def _say(text: str) -> None:
    print(f"dsp_auto: {text}", file=sys.stderr, flush=True)


def _is_watched() -> bool:
    return sys.stderr is not None and sys.stderr.isatty() and _is_first_rank()


def _is_first_rank() -> bool:
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank() == 0
    return os.environ.get("RANK", "0") == "0"  # as launchers set it
