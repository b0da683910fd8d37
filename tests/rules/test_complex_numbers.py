"""Complex numbers as pairs of real ones."""

from __future__ import annotations

import torch

from tests.rules.calls import F32, F64, cases, generated, one_of, overload, rule_of, shape_of, t


def _complex(*shape: int, dtype: torch.dtype = F64) -> torch.Tensor:
    return torch.complex(t(*shape, dtype=dtype), t(*shape, dtype=dtype))


@cases("aten::view_as_real")
def _(name):
    for shape in ((5, 7), (3, 1, 5), ()):
        yield overload(name), (_complex(*shape),), {}
    yield overload(name), (_complex(5, 7, dtype=F32),), {}


@cases("aten::view_as_complex")
def _(name):
    for shape in ((5, 7, 2), (3, 1, 5, 2), (2,)):
        yield overload(name), (t(*shape),), {}
    yield overload(name), (t(5, 7, 2, dtype=F32),), {}


@generated("aten::view_as_real")
def _(draw, name):
    return overload(name), (_complex(*shape_of(draw), dtype=one_of(draw, F64, F32)),), {}


@generated("aten::view_as_complex")
def _(draw, name):
    return overload(name), (t(*shape_of(draw), 2, dtype=one_of(draw, F64, F32)),), {}


def test_the_two_parts_of_a_number_stay_together():
    assert (
        str(rule_of((torch.ops.aten.view_as_real.default, (_complex(5, 7),), {}))) == ".1 .0 -> .1 .0 pair; moved: pair"
    )
