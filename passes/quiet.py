"""Quiet: what `torch.export` says beside the error that it raises goes to the log, at DEBUG.

Of code that a tensor's value decides, it prints the graph so far on stderr, once for each time that it tries, and warns that it
does not know the line. The error that a user sees has what matters of it.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from typing import Any

_log = logging.getLogger(__name__)


@contextmanager
def quiet() -> Iterator[None]:
    """Around `torch.export.export`: what the model itself or another thread writes on stderr meanwhile stands there as ever."""

    def divert(record: logging.LogRecord) -> bool:
        _log.debug("%s", record.getMessage())
        return False

    told = logging.getLogger("torch.fx.experimental.symbolic_shapes")
    told.addFilter(divert)
    try:
        with redirect_stderr(None if sys.stderr is None else _WithoutGraphs(sys.stderr)):
            yield
    finally:
        told.removeFilter(divert)


class _WithoutGraphs:
    """A stream, but for the graphs that exceptions carry."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self._left_out = False  # what was written last, of which the end of the line comes by itself

    def write(self, text: str) -> int:
        graph = getattr(sys.exc_info()[1], "partial_fx_graph", None)
        ends, self._left_out = self._left_out and text == "\n", graph is not None and text == str(graph)
        if self._left_out:
            _log.debug("the graph so far:%s", text.rstrip())
        elif not ends:
            self._stream.write(text)
        return len(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
