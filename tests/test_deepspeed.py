"""DeepSpeed's engine around a parallel module: ZeRO cuts the optimizer's state and gradients over all ranks, or over some."""

from __future__ import annotations

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh

import dsp_auto
from examples.transformer_2d import build as transformer_2d
from tests.parity import OUTPUT_TOLERANCE, deviation
from tests.test_examples import one_device, run_script
from tests.world import launched

pytest.importorskip("deepspeed", reason="DeepSpeed is not among the packages that the tests need")

SMALL = dict(layers=1, hidden=16, heads=2, frames=5, tokens=7, batch=4)


class Groups:
    """The groups of a mesh, as DeepSpeed asks for those that others have made."""

    def __init__(self, mesh):
        self.dp, self.sp = mesh["dp"], mesh["sp"]

    def get_data_parallel_group(self):
        return self.dp.get_group()

    def get_data_parallel_world_size(self):
        return self.dp.size()

    def get_data_parallel_rank(self):
        return self.dp.get_local_rank()

    def get_model_parallel_group(self):
        return self.sp.get_group()

    def get_model_parallel_world_size(self):
        return self.sp.size()

    def get_model_parallel_rank(self):
        return self.sp.get_local_rank()


def _script(rank, ranks, stage):
    with launched(rank, ranks):
        return run_script(rank, ranks, "train_deepspeed", "--stage", str(stage))


@pytest.mark.parametrize("stage", [1, 2])
def test_the_script_loses_what_one_device_loses_on_all_videos(world, stage):
    assert world(4).run(_script, stage) == [pytest.approx(one_device(3, 2, clipped=True), rel=1e-4)] * 4


def _trained(rank, ranks, stage, over, folder):
    """Deviations from one device after two steps of two batches each, and of what a checkpoint brings back."""
    import deepspeed

    (model, (videos,), _), (reference, _, _) = transformer_2d(**SMALL), transformer_2d(**SMALL)
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "sp"))
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 2,
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
        "gradient_clipping": 1.0,
    }
    parallel = dsp_auto.parallelize(model, mesh["sp"])
    optimizer, alone = (torch.optim.SGD(one.parameters(), lr=0.1, momentum=0.9) for one in (parallel, reference))
    with launched(rank, ranks):
        groups = {"mpu": Groups(mesh)} if over == "dp" else {}
        engine, *_ = deepspeed.initialize(model=parallel, optimizer=optimizer, config=config, **groups)
        at = mesh["dp"].get_local_rank()
        for _ in range(2):
            for n in range(2):
                engine.backward(engine(videos[2 * n + at : 2 * n + at + 1]).square().mean())
                engine.step()
            reference(videos).square().mean().backward()
            torch.nn.utils.clip_grad_norm_(reference.parameters(), 1.0)
            alone.step()
            alone.zero_grad()
        worst = max(deviation(own, other, 1e-3) for own, other in zip(model.parameters(), reference.parameters()))
        kept = parallel(videos).detach()
        engine.save_checkpoint(folder)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.zero_()
        engine.load_checkpoint(folder)
    deepspeed.utils.groups.mpu = None  # which it keeps for the next engine
    return worst, deviation(parallel(videos), kept)


def _stage_3(rank, ranks):
    import deepspeed

    model, (videos,), _ = transformer_2d(**SMALL)
    parallel = dsp_auto.parallelize(model, init_device_mesh("cpu", (ranks,)))
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": 3},
        "zero_allow_untested_optimizer": True,
    }
    optimizer = torch.optim.SGD(parallel.parameters(), lr=0.1)
    with launched(rank, ranks):
        engine, *_ = deepspeed.initialize(model=parallel, optimizer=optimizer, config=config)
        with pytest.raises(dsp_auto.CaptureError, match="embed: .* embed.weight belongs to DeepSpeed's ZeRO-3.* fully_shard"):
            engine(videos)
    return True


def test_parameters_that_stage_3_cuts_are_refused_with_what_to_use(world):
    assert all(world(2).run(_stage_3))


@pytest.mark.parametrize("over", ["all", "dp"])
@pytest.mark.parametrize("stage", [1, 2])
def test_parameters_become_those_of_one_device_and_come_back_from_a_checkpoint(world, tmp_path, stage, over):
    for trained, restored in world(4).run(_trained, stage, over, tmp_path):
        assert trained <= OUTPUT_TOLERANCE
        assert restored <= OUTPUT_TOLERANCE
