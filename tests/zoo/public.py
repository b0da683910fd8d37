"""Public models, unmodified, at small configurations."""

from __future__ import annotations

import torch


def latte(batch: int = 1, frames: int = 4, size: int = 8, layers: int = 1, seed: int = 0):
    """`diffusers.LatteTransformer3DModel`: spatial and temporal blocks in turn, adaLN, cross-attention to text."""
    from diffusers import LatteTransformer3DModel

    torch.manual_seed(seed)
    model = LatteTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        num_layers=layers,
        cross_attention_dim=16,
        sample_size=size,
        patch_size=2,
        caption_channels=12,
        video_length=frames,
        norm_type="ada_norm_single",
        num_embeds_ada_norm=1000,
        norm_elementwise_affine=False,
        attention_bias=True,
        activation_fn="gelu-approximate",
    )
    video = torch.randn(batch, 4, frames, size, size)
    text = torch.randn(batch, 7, 12)
    timestep = torch.arange(batch) + 3
    return model, (video,), {"timestep": timestep, "encoder_hidden_states": text, "return_dict": False}


def timesformer(batch: int = 1, frames: int = 4, size: int = 16, layers: int = 2, seed: int = 0):
    """`transformers.TimesformerModel`: divided space-time attention with a class token, matmul + softmax."""
    from transformers import TimesformerConfig, TimesformerModel

    torch.manual_seed(seed)
    config = TimesformerConfig(
        image_size=size,
        patch_size=4,
        num_frames=frames,
        hidden_size=16,
        num_hidden_layers=layers,
        num_attention_heads=2,
        intermediate_size=32,
    )
    return TimesformerModel(config), (torch.randn(batch, frames, 3, size, size),), {}
