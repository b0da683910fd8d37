"""The lists in `docs` are those of the code."""

from __future__ import annotations

from docs import make_ops
from dsp_auto.passes.rules import registered


def test_ops_md_is_what_its_generator_writes():
    assert make_ops.PLACE.read_text() == make_ops.text(), "run `python -m docs.make_ops`"


def test_ops_md_has_a_line_for_every_rule():
    lines = make_ops.PLACE.read_text().splitlines()
    assert not [name for name in registered() if not any(line.startswith(f"| `{name}` |") for line in lines)]
