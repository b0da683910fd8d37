"""Latte in the pipeline of diffusers: torchrun --nproc-per-node 2 -m dsp_auto.examples.latte

The transformer has small random weights. A pipeline from `LattePipeline.from_pretrained` is made parallel by the same line; its
text encoder and VAE go on running whole on every rank.
"""

import math

import torch
import torch.distributed as dist
from diffusers import DPMSolverMultistepScheduler, LattePipeline, LatteTransformer3DModel
from torch.distributed.device_mesh import init_device_mesh

import dsp_auto
from dsp_auto.examples.launch import options, start, stop

TEXT_CHANNELS = 32


def pipeline(kind, sizes):
    """A pipeline that takes texts as embeddings and gives latents, alike on every rank."""
    torch.manual_seed(0)
    transformer = LatteTransformer3DModel(
        num_layers=sizes["layers"],
        num_attention_heads=sizes["heads"],
        attention_head_dim=sizes["hidden"] // sizes["heads"],
        cross_attention_dim=sizes["hidden"],
        caption_channels=TEXT_CHANNELS,
        video_length=sizes["frames"],
        sample_size=2 * math.isqrt(sizes["tokens"]),
        **dict(patch_size=2, in_channels=4, out_channels=8, activation_fn="gelu-approximate", attention_bias=True),
        **dict(norm_type="ada_norm_single", num_embeds_ada_norm=1000, norm_elementwise_affine=False),
    )
    scheduler = DPMSolverMultistepScheduler()
    pipe = LattePipeline(tokenizer=None, text_encoder=None, vae=None, transformer=transformer.eval(), scheduler=scheduler)
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(kind)


def generate(pipe, kind, sizes, steps, length):
    """Latents [B, 4, T, H, W] for texts of `length` tokens, with guidance: the transformer sees 2 B videos at once."""
    draw = torch.Generator().manual_seed(length)  # the same numbers on every rank
    texts, empty = torch.randn(2, sizes["batch"], length, TEXT_CHANNELS, generator=draw).to(kind)
    side = 2 * math.isqrt(sizes["tokens"]) * pipe.vae_scale_factor
    made = pipe(
        prompt_embeds=texts,
        negative_prompt=None,
        negative_prompt_embeds=empty,
        guidance_scale=4.0,
        video_length=sizes["frames"],
        height=side,
        width=side,
        num_inference_steps=steps,
        generator=draw,
        output_type="latent",
    )
    return made.frames


def main(argv=None, lengths=(20, 12, 20)):
    """For each text, of `lengths` tokens, the latents and how many plans there are by then: one for each length."""
    chosen, sizes = options(argv)
    kind = start()
    mesh = init_device_mesh(kind, (dist.get_world_size(),), mesh_dim_names=("sp",))
    pipe = pipeline(kind, sizes)
    pipe.transformer = dsp_auto.parallelize(pipe.transformer, mesh)
    made = []
    for length in lengths:
        latents = generate(pipe, kind, sizes, chosen.steps, length)
        made.append((latents, len(pipe.transformer.plans)))
        if dist.get_rank() == 0:
            print(f"text of {length} tokens: latents {list(latents.shape)}, {made[-1][1]} plans so far")
    return made


if __name__ == "__main__":
    main()
    stop()
