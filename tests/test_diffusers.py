"""A parallel module as the transformer of a diffusers pipeline: its denoising loop, and what pipelines ask of a model."""

from __future__ import annotations

import torch
from diffusers import LattePipeline, LatteTransformer3DModel

import dsp_auto
from examples.latte import generate, pipeline
from tests.parity import OUTPUT_TOLERANCE, deviation, sp_mesh

SIZES = dict(layers=1, hidden=16, heads=2, frames=5, tokens=16, batch=1)


def _parallel(ranks):
    pipe = pipeline("cpu", SIZES)
    pipe.transformer = dsp_auto.parallelize(pipe.transformer, sp_mesh(ranks))
    return pipe


def _loops(rank, ranks):
    """Of texts of several lengths, in turn in both modes without gradients: deviations, and the plans that ran."""
    pipe, alone = _parallel(ranks), pipeline("cpu", SIZES)
    found = []
    for length, inference in ((7, True), (4, True), (7, True), (4, False), (7, False)):
        with torch.inference_mode(inference):
            latents, expected = (generate(one, "cpu", SIZES, 4, length) for one in (pipe, alone))
        assert latents.is_inference() == expected.is_inference() == inference
        found.append((deviation(latents, expected), id(pipe.transformer.plan)))
    assert any(stage.layout["sp"] != "R" for stage in pipe.transformer.plan.stages)
    return found


def test_the_loop_makes_one_devices_latents_and_plans_once_for_each_length_of_text(world):
    for found in world(2).run(_loops):
        assert max(worst for worst, _ in found) <= OUTPUT_TOLERANCE
        first, second, *later = (plan for _, plan in found)
        assert first != second
        assert later == [first, second, first]


def _asks(rank, ranks, folder):
    pipe = _parallel(ranks)
    parallel = pipe.transformer
    assert parallel.config.patch_size == 2
    again = LattePipeline(**pipe.components)
    assert again.transformer is parallel
    latents = generate(pipe, "cpu", SIZES, 2, 5)
    if rank == 0:
        parallel.save_pretrained(folder)
    generate(pipe.to(torch.bfloat16), "cpu", SIZES, 2, 5)
    assert pipe.dtype == parallel.dtype == torch.bfloat16 and pipe.device == parallel.device
    return latents, len(parallel.plans)


def test_pipelines_find_in_it_what_they_ask_of_the_model(world, tmp_path):
    (latents, plans), _ = world(2).run(_asks, tmp_path)
    assert plans == 2  # one for each dtype
    alone = pipeline("cpu", SIZES)
    alone.transformer = LatteTransformer3DModel.from_pretrained(tmp_path)
    assert deviation(latents, generate(alone, "cpu", SIZES, 2, 5)) <= OUTPUT_TOLERANCE
