"""Unmodified public models on 2 and 4 ranks: outputs and every gradient of one device, and the bytes that were predicted."""

from __future__ import annotations

import pytest

from examples.transformer_2d import build as transformer_2d
from tests.parity import GRADIENT_TOLERANCE, OUTPUT_TOLERANCE, compare
from tests.zoo.public import latte, timesformer

EVEN = {"frames": 8, "tokens": 16}
UNEVEN = {"frames": 7, "tokens": 9}
CASES = {
    "transformer_2d 4d even": (transformer_2d, {"habit": "4d", **EVEN}),
    "transformer_2d 4d uneven": (transformer_2d, {"habit": "4d", **UNEVEN}),
    "transformer_2d flat even": (transformer_2d, {"habit": "flat", **EVEN}),
    "transformer_2d flat uneven": (transformer_2d, {"habit": "flat", **UNEVEN}),
    "latte even": (latte, {"frames": 4, "size": 8}),
    "latte uneven": (latte, {"frames": 5, "size": 10}),
    "timesformer even": (timesformer, {"frames": 4, "size": 16}),
    "timesformer uneven": (timesformer, {"frames": 5, "size": 20}),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("ranks", [2, 4])
def test_outputs_gradients_and_bytes_are_those_of_one_device_and_of_the_plan(world, case, ranks, batch, train):
    build, arguments = CASES[case]
    results = world(ranks).run(compare, build, {**arguments, "batch": batch}, train=train)
    for result in results:
        assert result["output"] <= OUTPUT_TOLERANCE
        assert result["gradient"] <= GRADIENT_TOLERANCE, result["worst"]
    plan = results[0]["plan"]
    assert plan["without_rule"] == []
    predicted = plan["communication"]["by_primitive"]
    for direction in ("forward", "backward"):
        for primitive, entry in predicted.items():
            key, bytes_key = f"{primitive} {direction}", f"{direction}_bytes"
            measured = [result["measured"].get(key, (0, 0.0)) for result in results]
            # Bytes are the mean over devices.
            assert sum(sent for _, sent in measured) / ranks == pytest.approx(entry[bytes_key]), key
            counts = {count for count, _ in measured}
            # A split or a gather has a backward only where a gradient that needs it comes back.
            always = primitive == "switch" or (primitive in ("split", "replicate")) == (direction == "backward")
            if entry[bytes_key] and always and primitive != "split":
                assert counts == {entry["count"]}, key
            else:
                assert max(counts) <= entry["count"], key
    measured_keys = {key.split()[0] for result in results for key in result["measured"]}
    assert measured_keys <= set(predicted)
    assert any(stage["layout"]["sp"] != "R" for stage in plan["stages"])
