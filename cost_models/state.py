"""What a training step holds on a device beside activations: parameters, gradients, and what the optimizer keeps.

For a parameter of which a device holds n elements of b bytes each (after a plan has cut it), on each of `data_parallel` ranks:

                     held                                                              shared out over the ranks by
    parameters       n b                                                               ZeRO-3
    gradients        n b, in the parameter's dtype                                     ZeRO-2, 3
    optimizer        Adam, AdamW: two moments, and a step count of 4 bytes;            ZeRO-1, 2, 3
                     SGD with momentum: one buffer; SGD: nothing
    master weights   4 n, where b = 2; then moments and buffers have 4 bytes an        ZeRO-1, 2, 3
                     element too

so 2 + 2 + 12 bytes an element for bfloat16 with float32 copies and Adam (Rajbhandari et al., "ZeRO: Memory Optimizations Toward
Training Trillion Parameter Models", SC 2020, sections 3 and 5). A frozen parameter has neither gradient nor state.

While the optimizer steps it takes more: PyTorch's `foreach=True`, the default on CUDA, makes the temporaries of all parameters
at once. This is assumed here; `foreach=False`, the default on CPU, and `fused=True` take less. Measured on torch 2.13 with its
CPU allocator and with MemTracker:

    Adam, AdamW      the square roots of the second moments, one copy; weight decay adds nothing to the peak
    SGD              nothing; with weight decay, a copy of the gradients
    master weights   the gradients as float32, one copy more

torch steps on parameters of one dtype after the other, and holds at most the copies of two dtypes: where a model has more, or
its parameters are in several groups, what is said here is above what is allocated, never below.

Everything is linear in n, but for Adam's step count and for rounding where n does not divide. Bytes per device.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple, dataclass
from typing import Any

from dsp_auto.errors import StrategyError

# Parameters' gradients are all-reduced in buckets of this size, as DDP does: large enough for bandwidth, small enough that the
# all-reduce starts while backward still runs.
BUCKET_BYTES = 25 * 2**20
_MOMENTS = {"adam": 2, "adamw": 2, "sgd": 0, "sgd-momentum": 1, "none": 0}
_ADAMS = ("adam", "adamw")
OPTIMIZERS = tuple(_MOMENTS)
# torch keeps Adam's step count of each parameter as one float32: in the host's memory, unless capturable or fused.
_STEP_COUNT = 4
_FP32 = 4


@dataclass(frozen=True)
class TrainingState:
    """How a model is trained, as far as memory goes. Raises StrategyError when made of what does not exist.

    optimizer: one of `OPTIMIZERS`; "none" keeps gradients only.
    master_weights: the optimizer steps on float32 copies of 16-bit parameters; gradients stay in the parameter's dtype.
    zero: what data-parallel ranks share out: 1 the optimizer's state and float32 copies, 2 gradients too, 3 parameters too.
    data_parallel: these ranks, each with its own batch.
    weight_decay: SGD copies the gradients for it; Adam's step needs no more than without.
    """

    optimizer: str = "adam"
    master_weights: bool = False
    zero: int = 0
    data_parallel: int = 1
    weight_decay: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.optimizer, str) or self.optimizer not in OPTIMIZERS:
            raise StrategyError(
                asked=f"optimizer {self.optimizer!r}",
                found=f"the optimizers are {', '.join(OPTIMIZERS)}",
                remedy="use one of them: the one that keeps as much per parameter as yours",
            )
        for name in ("master_weights", "weight_decay"):
            if not isinstance(getattr(self, name), bool):
                raise _refused(name, getattr(self, name), "it is True or False")
        if not _is_int(self.zero) or not 0 <= self.zero <= 3:
            raise _refused("zero", self.zero, "ZeRO has the stages 0 to 3")
        if not _is_int(self.data_parallel) or self.data_parallel < 1:
            raise _refused("data_parallel", self.data_parallel, "it is a number of ranks, 1 or more")
        if self.zero and self.data_parallel == 1:
            raise StrategyError(
                asked=f"ZeRO-{self.zero}",
                found="data_parallel is 1, so there is no rank to share anything out to",
                remedy="give data_parallel=, the number of ranks that share, or zero=0",
            )

    def __str__(self) -> str:
        """`adam, float32 copies of 16-bit parameters, ZeRO-2 over 8 ranks`."""
        optimizer = "no optimizer" if self.optimizer == "none" else self.optimizer
        parts = [optimizer + (" with weight decay" if self.weight_decay else "")]
        if self.master_weights:
            parts.append("float32 copies of 16-bit parameters")
        if self.zero:
            parts.append(f"ZeRO-{self.zero} over {self.data_parallel} ranks")
        return ", ".join(parts)


@dataclass(frozen=True)
class StateBytes:
    """Bytes on a device; those of several parameters are their sum.

    parameters, optimizer: held all the time, the latter from the first step on. optimizer: float32 copies as well.
    gradients: from a parameter's backward until `zero_grad`.
    step: besides all of these, while the optimizer steps.
    gathered: besides `parameters`, the whole parameter while its module computes (ZeRO-3): of the modules gathered at one time.
    unreduced: besides `gradients`, the whole gradient until the ranks have summed it and kept their parts (ZeRO-2 and 3): of
        the modules whose gradients are summed at one time.
    """

    parameters: int = 0
    gradients: int = 0
    optimizer: int = 0
    step: int = 0
    gathered: int = 0
    unreduced: int = 0

    def __add__(self, other: StateBytes) -> StateBytes:
        return StateBytes(*(one + more for one, more in zip(astuple(self), astuple(other))))

    @property
    def held(self) -> int:
        """From one step to the next, before `zero_grad`."""
        return self.parameters + self.gradients + self.optimizer


def as_state(state: str | TrainingState | None) -> TrainingState:
    """A state as it is, or with an optimizer by name; None: no optimizer. Raises StrategyError for what is neither."""
    if isinstance(state, TrainingState):
        return state
    if state is None:
        return TrainingState("none")
    if isinstance(state, str):
        return TrainingState(state)
    raise StrategyError(
        asked=f"training state {state!r}",
        found=f"a {type(state).__name__}",
        remedy=f"give the optimizer ({', '.join(OPTIMIZERS)}), or a TrainingState",
    )


def of_parameter(nbytes: int, itemsize: int, is_floating: bool, requires_grad: bool, state: TrainingState) -> StateBytes:
    """What one parameter takes on a device.

    nbytes: of the device's part of it. A parameter used twice counts once.
    itemsize: bytes of an element.
    is_floating: real floating point: complex parameters get no float32 copy.
    requires_grad: it is trained; False in inference.

    Under ZeRO, the largest part of any rank, in whole elements. FSDP2 cuts dim 0: its largest part is up to a row more.
    """
    elements = -(-nbytes // itemsize)
    part = -(-elements // state.data_parallel)
    parameters = part * itemsize if state.zero >= 3 else nbytes
    gathered = nbytes if state.zero >= 3 else 0
    if not requires_grad:
        return StateBytes(parameters=parameters, gathered=gathered)

    stepped = part if state.zero >= 1 else elements  # what the optimizer of this rank steps on
    copied = state.master_weights and is_floating and itemsize == 2
    width = _FP32 if copied else itemsize
    adam = state.optimizer in _ADAMS
    optimizer = stepped * width * _MOMENTS[state.optimizer] + (_STEP_COUNT if adam else 0)
    copies = 0 if state.optimizer == "none" else int(adam or state.weight_decay) + int(copied)
    return StateBytes(
        parameters=parameters,
        gradients=part * itemsize if state.zero >= 2 else nbytes,
        optimizer=optimizer + (stepped * _FP32 if copied else 0),
        step=stepped * width * copies,
        gathered=gathered,
        unreduced=nbytes if state.zero >= 2 else 0,
    )


def packed(gradients: Sequence[tuple[Any, int]], together: bool = True) -> list[list[int]]:
    """Which gradients are all-reduced together: buckets of one kind each, filled in order up to `BUCKET_BYTES`.

    gradients: kind (what may not be mixed: a dtype) and bytes of each; the answer has their positions. together: if not, each
    is alone.
    """
    open_: dict[Any, list[int]] = {}
    filled: dict[Any, int] = {}
    found: list[list[int]] = []
    for n, (kind, nbytes) in enumerate(gradients):
        if together and kind in open_ and filled[kind] + nbytes <= BUCKET_BYTES:
            open_[kind].append(n)
            filled[kind] += nbytes
        else:
            open_[kind], filled[kind] = [n], nbytes
            found.append(open_[kind])
    return found


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _refused(name: str, value: object, wanted: str) -> StrategyError:
    return StrategyError(asked=f"{name}={value!r} in a training state", found=wanted, remedy="give such a value")
