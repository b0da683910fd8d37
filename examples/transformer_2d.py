"""The Transformer-2D of the DSP paper (section 2.1, appendix A.1, table 5): video [B, T, S, channels].

A layer is two pre-norm transformer blocks, one attending over space S, one over time T, written in two habits with the
same parameters and function: between blocks, "4d" keeps activations [B, T, S, C], "flat" keeps tokens [B, T*S, C].
"""

import torch
from torch import nn
from torch.nn import functional as F


class Attention(nn.Module):
    def __init__(self, hidden, heads):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(hidden, 3 * hidden)
        self.proj = nn.Linear(hidden, hidden)

    def forward(self, x):  # [rows, length, C]
        rows, length, hidden = x.shape
        qkv = self.qkv(x).reshape(rows, length, 3, self.heads, hidden // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        out = F.scaled_dot_product_attention(q, k, v)
        return self.proj(out.transpose(1, 2).reshape(rows, length, hidden))


class Block(nn.Module):
    def __init__(self, hidden, heads, mlp_ratio, over):
        super().__init__()
        self.over = over
        self.norm1, self.norm2 = nn.LayerNorm(hidden), nn.LayerNorm(hidden)
        self.attn = Attention(hidden, heads)
        self.mlp = nn.Sequential(nn.Linear(hidden, mlp_ratio * hidden), nn.GELU(), nn.Linear(mlp_ratio * hidden, hidden))

    def attend(self, x, size):
        """Attention over one sequence dim; x is [B, T, S, C] or [B, T*S, C], and so is the result."""
        batch, frames, tokens = size
        if self.over == "space":
            return self.attn(x.reshape(batch * frames, tokens, -1)).reshape(x.shape)
        rows = x.reshape(batch, frames, tokens, -1).transpose(1, 2).reshape(batch * tokens, frames, -1)
        return self.attn(rows).reshape(batch, tokens, frames, -1).transpose(1, 2).reshape(x.shape)

    def forward(self, x, size):
        x = x + self.attend(self.norm1(x), size)
        return x + self.mlp(self.norm2(x))


class Transformer2D(nn.Module):
    def __init__(self, layers, hidden, heads, in_channels, habit, mlp_ratio):
        super().__init__()
        self.flat = {"4d": False, "flat": True}[habit]
        self.embed = nn.Linear(in_channels, hidden)
        self.blocks = nn.ModuleList(
            Block(hidden, heads, mlp_ratio, over) for _ in range(layers) for over in ("space", "time")
        )
        self.norm = nn.LayerNorm(hidden)
        self.head = nn.Linear(hidden, in_channels)

    def forward(self, video):  # [B, T, S, channels] -> the same
        x = self.embed(video.flatten(1, 2) if self.flat else video)
        for block in self.blocks:
            x = block(x, video.shape[:3])
        return self.head(self.norm(x)).reshape(video.shape)


def build(layers=2, hidden=64, heads=4, frames=8, tokens=16, batch=1, in_channels=4, habit="4d",
          dtype="float32", seed=0, mlp_ratio=4):  # fmt: skip
    """A model and its example call, (model, args, kwargs): args is (video,), video [B, T, S, in_channels]."""
    torch.manual_seed(seed)
    before = torch.get_default_dtype()
    torch.set_default_dtype(getattr(torch, dtype))  # and not .to(dtype), which fake parameters refuse
    try:
        model = Transformer2D(layers, hidden, heads, in_channels, habit, mlp_ratio)
        return model, (torch.randn(batch, frames, tokens, in_channels),), {}
    finally:
        torch.set_default_dtype(before)


# For people; `dsp-auto explain` reads it. (Type checkers know no attributes of functions.)
build.dim_names = {"video": "B T S C_in"}  # type: ignore[attr-defined]
