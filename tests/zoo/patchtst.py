"""`transformers.PatchTSTModel`: a multivariate series, attention over its patches and over its channels."""

from __future__ import annotations

import torch


def patchtst(batch: int = 1, channels: int = 5, length: int = 28, seed: int = 0):
    """Series [B, length, channels]; 7 patches of 4 by default. Batch norm, as the model's authors have it."""
    from transformers import PatchTSTConfig, PatchTSTModel

    torch.manual_seed(seed)
    config = PatchTSTConfig(
        num_input_channels=channels,
        context_length=length,
        patch_length=4,
        patch_stride=4,
        num_hidden_layers=1,
        d_model=12,
        num_attention_heads=3,
        ffn_dim=16,
        channel_attention=True,
    )
    return PatchTSTModel(config), (torch.randn(batch, length, channels),), {"return_dict": False}
