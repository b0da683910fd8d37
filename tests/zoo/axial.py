"""Axial attention: one attention over each of time, height and width in turn, on activations [B, T, H, W, C]."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F


class AxialAttention(nn.Module):
    """Self-attention over one dim of [B, T, H, W, C]; the other dims are rows."""

    def __init__(self, hidden, heads, axis):
        super().__init__()
        self.heads, self.axis = heads, axis
        self.norm = nn.LayerNorm(hidden)
        self.to_q, self.to_kv = nn.Linear(hidden, hidden, bias=False), nn.Linear(hidden, 2 * hidden, bias=False)
        self.to_out = nn.Linear(hidden, hidden)

    def forward(self, x):
        x = x.movedim(self.axis, -2)
        rows = x.shape[:-2]
        flat = self.norm(x).flatten(0, -3)  # [rows, length, C]
        q, (k, v) = self.to_q(flat), self.to_kv(flat).chunk(2, dim=-1)
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return self.to_out(out).unflatten(0, rows).movedim(-2, self.axis)


class AxialTransformer(nn.Module):
    """[B, T, H, W, C_in] to the same."""

    def __init__(self, layers, hidden, heads, channels, sizes):
        super().__init__()
        self.embed, self.head = nn.Linear(channels, hidden), nn.Linear(hidden, channels)
        self.positions = nn.ParameterList(
            nn.Parameter(torch.randn([size if n == axis else 1 for n, size in enumerate(sizes)] + [hidden]))
            for axis in range(len(sizes))
        )
        self.attentions = nn.ModuleList(
            AxialAttention(hidden, heads, axis) for _ in range(layers) for axis in range(1, len(sizes) + 1)
        )
        self.mlps = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(hidden), nn.Linear(hidden, 2 * hidden), nn.GELU(), nn.Linear(2 * hidden, hidden))
            for _ in range(layers)
        )

    def forward(self, x):
        x = self.embed(x)
        for position in self.positions:
            x = x + position
        for layer, mlp in enumerate(self.mlps):
            for attention in self.attentions[3 * layer : 3 * layer + 3]:
                x = x + attention(x)
            x = x + mlp(x)
        return self.head(x)


def axial(batch: int = 1, frames: int = 5, height: int = 6, width: int = 7, layers: int = 1, seed: int = 0):
    torch.manual_seed(seed)
    model = AxialTransformer(layers, hidden=12, heads=3, channels=3, sizes=(frames, height, width))
    return model, (torch.randn(batch, frames, height, width, 3),), {}
