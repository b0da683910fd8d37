"""Convolutions."""

from __future__ import annotations

import pytest
from hypothesis import strategies as st

from tests.rules.calls import BF16, FLOATS, aten, call, cases, generated, one_of, overload, rule_of, t


@cases("aten::conv1d", "aten::conv2d", "aten::conv3d")
def _(name):
    n = int(name[-2])
    conv, space = overload(name), (8, 12, 4)[:n]
    for bias in (None, t(5)):
        yield call(conv, t(4, 6, *space), t(5, 6, *[2] * n), bias, [2] * n)  # patches
        yield call(conv, t(4, 1, *space), t(5, 1, *[4] * n), bias, [4] * n)
        yield call(conv, t(4, 6, *space), t(5, 6, *[1] * n), bias)
        yield call(conv, t(4, 6, *space), t(5, 6, *[3] * n), bias, [1] * n, [1] * n)  # overlap
        yield call(conv, t(4, 6, *space), t(5, 6, *[2] * n), bias, [1] * n)
        yield call(conv, t(4, 6, *space), t(5, 6, *[2] * n), bias, [2] * n, [0] * n, [2] * n)
    yield call(conv, t(4, 6, *[7] * n), t(5, 6, *[3] * n), None, [3] * n)  # a remainder that no patch covers
    yield call(conv, t(4, 6, *space, dtype=BF16), t(5, 6, *[2] * n, dtype=BF16), t(5, dtype=BF16), [2] * n)
    yield call(conv, t(2, 3, *space), t(5, 3, *[4] + [2] * (n - 1)), t(5), [4] + [2] * (n - 1))
    yield call(conv, t(6, *space), t(5, 6, *[3] * n), None, [1] * n, [1] * n)  # no batch
    yield call(conv, t(2, 6, *space), t(6, 1, *[3] * n), t(6), [1] * n, [1] * n, [1] * n, 6)  # a channel at a time
    for padding in ("same", "valid"):
        yield call(overload(name, "padding"), t(2, 3, *space), t(5, 3, *[3] * n), None, [1] * n, padding)


@generated("aten::conv1d", "aten::conv2d", "aten::conv3d")
def _(draw, name):
    """Patches and overlaps, paddings written out or by name, groups, with and without a batch."""
    n, groups = int(name[-2]), one_of(draw, 1, 1, 1, 2, 3)
    few = st.integers(1, 4 if n < 3 else 2)
    (channels, features), dtype = draw(st.tuples(few, few)), one_of(draw, *FLOATS)

    def per_dim(numbers) -> list[int]:
        return draw(st.lists(numbers, min_size=n, max_size=n))

    kernel, dilation = per_dim(st.integers(1, 4 if n < 3 else 3)), per_dim(st.integers(1, 2))
    stride, padding = per_dim(st.integers(1, 3)), per_dim(st.integers(0, 2))
    reach = [(k - 1) * d + 1 for k, d in zip(kernel, dilation)]
    form = one_of(draw, "patches", "patches", "written", "written", "one number", "same", "valid")
    if form == "patches":
        stride, padding, dilation, reach = kernel, [0] * n, [1] * n, kernel
    elif form == "one number":
        stride, padding = stride[:1], padding[:1]
    elif form == "same":
        stride, padding = [1] * n, "same"
    elif form == "valid":
        padding = "valid"
    most = padding * (n if len(padding) == 1 else 1) if isinstance(padding, list) else [0] * n
    space = [max(step * (draw(few) - 1) + r - 2 * p, 1, r - 2 * p) for step, r, p in zip(stride * n, reach, most)]
    if form != "patches":
        space = [size + draw(st.integers(0, 2)) for size in space]
    batch = one_of(draw, [2], [5], [1], [])
    x = t(*batch, groups * channels, *space, dtype=dtype)
    weight = t(groups * features, channels, *kernel, dtype=dtype)
    bias = one_of(draw, None, t(groups * features, dtype=dtype))
    target = overload(name, "padding" if isinstance(padding, str) else "default")
    return call(target, x, weight, bias, stride, padding, dilation, groups)


@cases("aten::conv_transpose1d", "aten::conv_transpose2d.input", "aten::conv_transpose3d.input")
def _(name):
    n = 2 if "2" in name else 1 if "1" in name else 3
    space = (5, 4, 3)[:n]
    for bias in (None, t(5)):
        yield call(overload(name), t(4, 6, *space), t(6, 5, *[2] * n), bias, [2] * n)  # patches
        yield call(overload(name), t(4, 6, *space), t(6, 5, *[3] * n), bias, [1] * n, [1] * n)  # overlap
        yield call(overload(name), t(4, 6, *space), t(6, 5, *[4] * n), bias, [2] * n, [1] * n)
        yield call(overload(name), t(4, 6, *space), t(6, 5, *[2] * n), bias, [3] * n)  # gaps
        yield call(overload(name), t(4, 6, *space), t(6, 5, *[2] * n), bias, [2] * n, [0] * n, [1] * n)


@generated("aten::conv_transpose1d", "aten::conv_transpose2d.input", "aten::conv_transpose3d.input")
def _(draw, name):
    """Patches, overlaps and gaps between what the inputs spread to, groups, with and without a batch."""
    n, groups = 2 if "2" in name else 1 if "1" in name else 3, one_of(draw, 1, 1, 1, 2, 3)
    few = st.integers(1, 4 if n < 3 else 2)
    (channels, features), dtype = draw(st.tuples(few, few)), one_of(draw, *FLOATS)

    def per_dim(numbers) -> list[int]:
        return draw(st.lists(numbers, min_size=n, max_size=n))

    kernel, stride = per_dim(st.integers(1, 4 if n < 3 else 3)), per_dim(st.integers(1, 3))
    padding, dilation, extra = per_dim(st.integers(0, 1)), per_dim(st.integers(1, 2)), per_dim(st.integers(0, 1))
    if one_of(draw, "patches", "any", "any") == "patches":
        stride, padding, dilation, extra = kernel, [0] * n, [1] * n, [0] * n
    extra = [min(own, max(step, d) - 1) for own, step, d in zip(extra, stride, dilation)]
    least = [2 if p else 1 for p in padding]
    batch = one_of(draw, [2], [5], [1], [])
    x = t(*batch, groups * channels, *(draw(few) + own for own in least), dtype=dtype)
    weight = t(groups * channels, features, *kernel, dtype=dtype)
    bias = one_of(draw, None, t(groups * features, dtype=dtype))
    return call(overload(name), x, weight, bias, stride, padding, extra, groups, dilation)


@pytest.mark.parametrize(
    ("made", "notation"),
    [
        (call(aten.conv1d.default, t(2, 3, 12), t(5, 3, 4), None, [4]), "b c (s0 k0), f c k0 -> b f s0; reduces: c k0"),
    ],
)
def test_rules_read(made, notation):
    assert str(rule_of(made)) == notation
