"""Build: what a user's factory makes, as shapes without weights."""

from __future__ import annotations

import inspect
import sys
import warnings
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any

from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from .errors import DspError
from .units import counted


def build(
    factory: Callable[..., Any], name: str, arguments: Mapping[str, Any], real: bool = False
) -> tuple[nn.Module, tuple, dict]:
    """What `factory(**arguments)` returns, (model, args, kwargs), on fake tensors; for real where that is asked for, and where
    it does not run under those, which is said on stderr. name: of the factory, for errors.

    Raises DspError where it does not take the arguments, fails, or returns something else.
    """
    try:
        inspect.signature(factory).bind(**arguments)
    except TypeError as error:
        remedy = f"it takes {inspect.signature(factory)}"
        raise DspError(asked=f"cannot call {name}", found=str(error), remedy=remedy) from error
    try:
        with nullcontext() if real else FakeTensorMode(allow_non_fake_inputs=True), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Accessing the data pointer of FakeTensor")  # deepcopy of a module does
            built = factory(**arguments)
    except Exception as fake_error:  # whatever the user's code raises under fake tensors
        if real:
            raise DspError(asked=f"{name} fails", found=reason(fake_error)) from fake_error
        print(f"dsp-auto: building {name} for real: under fake tensors {reason(fake_error)}", file=sys.stderr)
        try:
            built = factory(**arguments)
        except Exception as error:
            raise DspError(asked=f"{name} fails", found=reason(error)) from error
    wanted = "(model, args, kwargs)"
    if not isinstance(built, tuple) or len(built) != 3:
        shown = counted(len(built), "value") if isinstance(built, tuple) else f"a {type(built).__name__}"
        raise DspError(asked=f"{name} must return {wanted}", found=f"it returns {shown}")
    for value, kind, what in zip(built, (nn.Module, tuple, Mapping), ("a Module", "a tuple", "a dict")):
        if not isinstance(value, kind):
            raise DspError(
                asked=f"{name} must return {wanted}", found=f"it returns a {type(value).__name__} in place of {what}"
            )
    return built


def reason(error: BaseException) -> str:
    """Kind and first line of an error."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
