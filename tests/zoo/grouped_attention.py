"""Grouped-query attention over space and multi-query attention over time."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F


class GroupedAttention(nn.Module):
    """`heads` queries share `kv_heads` keys and values; `repeat` says who repeats them: the kernel or the model."""

    def __init__(self, hidden, heads, kv_heads, repeat):
        super().__init__()
        self.heads, self.kv_heads, self.dim, self.repeat = heads, kv_heads, hidden // heads, repeat
        self.q_proj, self.o_proj = nn.Linear(hidden, hidden, bias=False), nn.Linear(hidden, hidden, bias=False)
        self.k_proj = nn.Linear(hidden, kv_heads * self.dim, bias=False)
        self.v_proj = nn.Linear(hidden, kv_heads * self.dim, bias=False)

    def forward(self, x):  # [rows, length, C]
        rows, length, hidden = x.shape
        q = self.q_proj(x).view(rows, length, self.heads, self.dim).transpose(1, 2)
        k = self.k_proj(x).view(rows, length, self.kv_heads, self.dim).transpose(1, 2)
        v = self.v_proj(x).view(rows, length, self.kv_heads, self.dim).transpose(1, 2)
        if self.repeat == "kernel":
            out = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
        else:
            groups = self.heads // self.kv_heads
            k, v = (
                t[:, :, None].expand(rows, self.kv_heads, groups, length, self.dim).reshape(q.shape) for t in (k, v)
            )
            out = F.scaled_dot_product_attention(q, k, v)
        return self.o_proj(out.transpose(1, 2).reshape(rows, length, hidden))


class SpaceTime(nn.Module):
    """[B, T, S, C] to the same."""

    def __init__(self, hidden, heads, kv_heads, repeat):
        super().__init__()
        self.norm1, self.norm2, self.norm3 = (nn.RMSNorm(hidden) for _ in range(3))
        self.space = GroupedAttention(hidden, heads, kv_heads, repeat)
        self.time = GroupedAttention(hidden, heads, kv_heads, repeat)
        self.gate_up, self.down = nn.Linear(hidden, 4 * hidden), nn.Linear(2 * hidden, hidden)

    def forward(self, x):
        x = x + self.space(self.norm1(x).flatten(0, 1)).view(x.shape)
        rows = self.norm2(x).transpose(1, 2)
        x = x + self.time(rows.flatten(0, 1)).view(rows.shape).transpose(1, 2)
        gate, up = self.gate_up(self.norm3(x)).chunk(2, dim=-1)
        return x + self.down(F.silu(gate) * up)


def grouped_attention(
    batch: int = 1,
    frames: int = 5,
    tokens: int = 7,
    heads: int = 6,
    kv_heads: int = 2,
    repeat: str = "kernel",
    seed: int = 0,
):
    torch.manual_seed(seed)
    hidden = 4 * heads
    return SpaceTime(hidden, heads, kv_heads, repeat), (torch.randn(batch, frames, tokens, hidden),), {}
