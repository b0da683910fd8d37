"""The rules that were found, kept on disk: one small file for each, so that processes need not wait for each other.

`DSP_AUTO_CACHE` names another folder than `$XDG_CACHE_HOME/dsp_auto` (`~/.cache/dsp_auto`); `off` keeps nothing.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
import logging
import marshal
import os
import re
import sys
import tempfile
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch

_log = logging.getLogger(__name__)
# Of the search: what an older one found is not read.
_FORMAT = 1


def folder() -> Path | None:
    """Where rules are kept; None where they are not."""
    named = os.environ.get("DSP_AUTO_CACHE")
    if named is not None:
        return None if named in ("", "off") else Path(named).expanduser() / "rules"
    home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(home).expanduser() / "dsp_auto" / "rules"


def read(key: str) -> dict[str, Any] | None:
    """What `write` kept for `key`; None, with a warning, where the file is damaged."""
    place = folder()
    return None if place is None else _load(place / _file(key), key)


def write(key: str, record: Mapping[str, Any]) -> None:
    """Keep `record` for `key`. A folder that cannot be written costs a search the next time, no more."""
    place = folder()
    if place is None:
        return
    try:
        place.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=place, suffix=".tmp", delete=False) as file:
            json.dump({"format": _FORMAT, "key": key, **record}, file, indent=1)
        os.replace(file.name, place / _file(key))
    except OSError as error:
        _log.warning("cannot keep a rule in %s: %s", place, error)


def entries() -> Iterator[dict[str, Any]]:
    """All that is kept and can be read."""
    place = folder()
    for path in sorted(place.glob("*.json")) if place is not None and place.is_dir() else ():
        found = _load(path, None)
        if found is not None:
            yield found


def _file(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()[:32] + ".json"


def _load(path: Path, key: str | None) -> dict[str, Any] | None:
    try:
        found = json.loads(path.read_text())
        if (
            not isinstance(found, dict)
            or not isinstance(found["key"], str)
            or not isinstance(found["rule"], str | None)
        ):
            raise ValueError("not what was written there")
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError) as error:
        _log.warning("ignoring the damaged rule in %s: %s: %s", path, type(error).__name__, error)
        return None
    return found if found.get("format") == _FORMAT and key in (None, found["key"]) else None


@cache
def library(target: torch._ops.OpOverload) -> str:
    """The version of what defines the op: of its distribution where that can be told, and of the code that defines it."""
    made = torch._library.custom_ops.OPDEFS.get(target._schema.name)
    if made is not None:
        path, code = made._init_fn.__code__.co_filename, marshal.dumps(made._init_fn.__code__)
    else:
        registrations = re.findall(r"registered at (\S+?\.py):\d+", torch._C._dispatch_dump(target._schema.name))
        path, code = next((path for path in registrations if Path(path).is_file()), ""), b""
    if Path(path).is_file():
        code = Path(path).read_bytes()
    modules = [name for name, module in list(sys.modules.items()) if path and getattr(module, "__file__", None) == path]
    versions = []
    for name in sorted({target.namespace, *(name.partition(".")[0] for name in modules)}):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions.append(f"{name} {importlib.metadata.version(name)}")
    if code:
        versions.append(f"code {hashlib.sha256(code).hexdigest()[:16]}")
    return ", ".join(versions)
