"""Kernels that slide along dims, with the windows in which they see them: what convolutions, pools and patches share."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..notation import OpCall, OpRule, Window, from_notation


@dataclass(frozen=True)
class Sliding:
    """A kernel that slides along one dim: `kernel` taps `dilation` apart, `stride` from one output to the next."""

    kernel: int
    stride: int
    dilation: int
    before: int  # padding
    after: int

    @property
    def span(self) -> int:
        return self.dilation * (self.kernel - 1) + 1

    def is_patches(self, size: int) -> bool:
        """No two outputs see one input, and every input is seen."""
        no_padding = self.before == self.after == 0 and self.dilation == 1
        return no_padding and self.kernel == self.stride and size % self.kernel == 0

    def needs(self, start: int, stop: int) -> tuple[int, int]:
        """The inputs that the outputs `[start, stop)` see."""
        return start * self.stride - self.before, (stop - 1) * self.stride - self.before + self.span

    def spread_needs(self, start: int, stop: int) -> tuple[int, int]:
        """The inputs that a transposed kernel spreads to the outputs `[start, stop)`; enough of them that what they
        spread to covers these outputs."""
        first = (start + self.before - self.span) // self.stride + 1
        last = max((stop - 1 + self.before) // self.stride, -(-(stop - 1 + self.before - self.span + 1) // self.stride))
        return min(first, (start + self.before) // self.stride), last + 1


def per_dim(call: OpCall, name: str, space: int, default: Sequence[int] = ()) -> list[int]:
    """An argument that stands for all dims, or one for each."""
    value = call[name]
    values = [value] if isinstance(value, int) else list(value) or list(default)
    return values * space if len(values) == 1 else values


@dataclass
class SlidingDims:
    """The dims along which kernels slide, in notation, by their number among them."""

    before: list[str] = field(default_factory=list)
    after: list[str] = field(default_factory=list)
    sizes: dict[str, int] = field(default_factory=dict)
    windows: dict[int, Window] = field(default_factory=dict)


def slide_along(
    call: OpCall,
    slides: Sequence[Sliding],
    patches: Collection[int],
    *,
    fill: float = 0.0,
    whole: Collection[int] = (),
    transposed: bool = False,
) -> SlidingDims:
    """The last dims of the first operand and of the result, one for each of `slides`.

    A dim in `patches` is `(s k)` on its long side and `s` on the other. Of others a range needs a range, with `fill` beyond
    the ends; those in `whole` have no window.
    """
    lead = len(call.outputs[0]) - len(slides)
    dims = SlidingDims()
    for n, slide in enumerate(slides):
        size, out = call.operands[0].shape[lead + n], call.outputs[0][lead + n]
        if n in patches:
            here, there = (f"s{n}", f"(s{n} k{n})") if transposed else (f"(s{n} k{n})", f"s{n}")
            dims.sizes |= {f"s{n}": min(size, out), f"k{n}": slide.kernel}
        else:
            here, there = _same_or_not(n, size, out)
            if n not in whole:
                needs = slide.spread_needs if transposed else slide.needs
                dims.windows[n] = Window(0, lead + n, here, there, needs, fill=fill, computes=True)
        dims.before.append(here)
        dims.after.append(there)
    return dims


def _same_or_not(n: int, before: int, after: int) -> tuple[str, str]:
    """Axes of a dim before and after: one where the sizes are equal, so that what is added to it shares the factor."""
    return (f"s{n}", f"s{n}") if before == after else (f"i{n}", f"o{n}")


def with_windows(text: str, call: OpCall, windows: Mapping[int, Window], **more: Any) -> OpRule:
    """The rule `text` whose windows each are cut into ranges together with what they look into."""
    ranges = [(window.source, window.target) for window in windows.values()]
    return from_notation(text, call, ranges=ranges, windows=tuple(windows.values()), **more)
