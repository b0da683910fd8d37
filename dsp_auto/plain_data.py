"""Plain data: what was read from a file, held against what it should look like.

A shape is written as data too: a type, a set of texts, `{"name": shape}` for these keys and no others ("name?" may be missing),
`{str: shape}` for a mapping from any text, `[shape]` for a list of any length, `(a, b)` for a list of so many entries, and
`Either(a, b)` for one of several.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from .errors import PlanError

# What is told of a wrong value.
LONGEST = 60


class Either(tuple):
    """One of several shapes."""

    def __new__(cls, *shapes: Any) -> Either:
        return super().__new__(cls, shapes)


NUMBER, COUNT, POSITIVE, NOTHING = Either(int, float), range(0, 2**63), range(1, 2**63), type(None)
_NAMES = {int: "a whole number", float: "a number", str: "a text", bool: "true or false", NOTHING: "null"}


def shorten(text: str, limit: int = 300) -> str:
    """What is told of a text that a file or a user may have made as long as he likes."""
    return text if len(text) <= limit else f"{text[:limit]}…"


def load_json(text: str, what: str) -> Any:
    """The data of a JSON text. Raises PlanError for what is none, numbers that are not finite included."""

    def refuse(constant: str) -> Any:
        raise ValueError(f"{constant} is no number")

    try:
        return json.loads(text, parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        raise PlanError(asked=f"this is no {what}", found=f"{type(error).__name__}: {error}") from error


def check(data: Any, shape: Any, what: str, place: str = "") -> None:
    """Raises PlanError where `data` has another shape: of which entry, and what it is instead."""
    if isinstance(shape, Either):
        _check_either(data, shape, what, place)
    elif isinstance(shape, (list, tuple)):
        if not isinstance(data, (list, tuple)) or (isinstance(shape, tuple) and len(data) != len(shape)):
            raise _wrong(what, place, data, "a list" if isinstance(shape, list) else f"a list of {len(shape)}")
        for number, entry in enumerate(data):
            check(entry, shape[0 if isinstance(shape, list) else number], what, f"{place}[{number}]")
    elif isinstance(shape, Mapping):
        _check_mapping(data, shape, what, place)
    elif isinstance(shape, range):
        if isinstance(data, bool) or not isinstance(data, int) or data not in shape:
            raise _wrong(what, place, data, f"a whole number of {shape.start} or more")
    elif isinstance(shape, frozenset):
        if not isinstance(data, str) or data not in shape:
            raise _wrong(what, place, data, f"one of {', '.join(sorted(shape))}")
    elif shape is not object and (not isinstance(data, shape) or (isinstance(data, bool) and shape is not bool)):
        raise _wrong(what, place, data, _NAMES[shape])
    elif isinstance(data, (int, float)) and not -(2.0**1000) < data < 2.0**1000:
        raise _wrong(what, place, data, "a finite number")


def _check_either(data: Any, shapes: Either, what: str, place: str) -> None:
    for number, shape in enumerate(shapes):
        try:
            check(data, shape, what, place)
            return
        except PlanError:
            if number == len(shapes) - 1:
                raise


def _check_mapping(data: Any, shape: Mapping[Any, Any], what: str, place: str) -> None:
    if not isinstance(data, Mapping):
        raise _wrong(what, place, data, "an object")
    if str in shape:
        for name, entry in data.items():
            check(name, str, what, f"a name in {place}")
            check(entry, shape[str], what, f"{place}.{name}")
        return
    known = {name.removesuffix("?"): (own, name.endswith("?")) for name, own in shape.items()}
    for name, (own, may_be_missing) in known.items():
        if name in data:
            check(data[name], own, what, f"{place}.{name}".lstrip("."))
        elif not may_be_missing:
            raise PlanError(asked=f"this is no {what}", found=f"{shorten(place) or 'it'} has no {name!r}")
    if unknown := [name for name in data if name not in known]:
        found = f"{shorten(place) or 'it'} has an entry {shorten(str(unknown[0]), LONGEST)!r} too many"
        raise PlanError(asked=f"this is no {what}", found=found)


def _wrong(what: str, place: str, data: Any, wanted: str) -> PlanError:
    found = f"{shorten(place) or 'it'} is {shorten(repr(data), LONGEST)}, not {wanted}"
    return PlanError(asked=f"this is no {what}", found=found)
