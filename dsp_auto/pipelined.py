"""Pipelined: whether a stage of `torch.distributed.pipelining` calls a module.

PyTorch tells a stage's module nothing, so it is read off the call stack: the module in which stages are, which is public, and
`forward_one_chunk`, the public method that runs a microbatch. `tests/test_pipeline.py` fails where they change.
"""

from __future__ import annotations

from traceback import walk_stack

_STAGES = "torch.distributed.pipelining.stage"


def called_by_stage() -> bool:
    """Whether a `PipelineStage` calls."""
    return bool(_callers())


def called_for_metadata() -> bool:
    """Whether one calls to see the shapes of what its module returns, on memory that holds anything."""
    callers = _callers()
    return bool(callers) and "forward_one_chunk" not in callers


def _callers() -> set[str]:
    return {frame.f_code.co_name for frame, _ in walk_stack(None) if frame.f_globals.get("__name__") == _STAGES}
