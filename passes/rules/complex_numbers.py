"""Complex numbers as pairs of real ones: the dim of the pair stays whole. (Other ops on them are pointwise.)"""

from __future__ import annotations

from ..notation import OpCall, OpRule, from_notation
from . import rule


@rule("aten::view_as_real")
def view_as_real(call: OpCall) -> OpRule:
    return from_notation("... -> ... pair", call, moved=["pair"])


@rule("aten::view_as_complex")
def view_as_complex(call: OpCall) -> OpRule:
    return from_notation("... pair -> ...", call, moved=["pair"])
