"""OpenSora's STDiT: flat tokens, adaLN, rotary time attention with QK norm, cross-attention to text."""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.nn import functional as F


class RMSNorm(nn.Module):
    """Over the last dim, in float32, the way the authors write it."""

    def __init__(self, dim):
        super().__init__()
        self.weight = nn.Parameter(torch.rand(dim) + 0.5)

    def forward(self, x):
        dtype = x.dtype
        x = x.to(torch.float32)
        x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)
        return self.weight * x.to(dtype)


def rotate_half(x):
    first, second = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((-second, first), dim=-1).flatten(-2)


class Rotary(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.register_buffer("freqs", 1.0 / 10000 ** (torch.arange(0, dim, 2).float() / dim), persistent=False)

    def forward(self, x):  # [rows, heads, length, D]
        positions = torch.arange(x.shape[-2], device=x.device, dtype=self.freqs.dtype)
        angles = torch.outer(positions, self.freqs).repeat_interleave(2, dim=-1)
        return x * angles.cos() + rotate_half(x) * angles.sin()


class Attention(nn.Module):
    def __init__(self, hidden, heads, rotary):
        super().__init__()
        self.heads, self.dim = heads, hidden // heads
        self.qkv, self.proj = nn.Linear(hidden, 3 * hidden), nn.Linear(hidden, hidden)
        self.q_norm, self.k_norm = RMSNorm(self.dim), RMSNorm(self.dim)
        self.rotary = Rotary(self.dim) if rotary else None

    def forward(self, x):  # [rows, length, C]
        rows, length, hidden = x.shape
        q, k, v = self.qkv(x).view(rows, length, 3, self.heads, self.dim).permute(2, 0, 3, 1, 4).unbind(0)
        q, k = self.q_norm(q), self.k_norm(k)
        if self.rotary is not None:
            q, k = self.rotary(q), self.rotary(k)
        scores = (q * self.dim**-0.5) @ k.transpose(-2, -1)
        x = scores.softmax(dim=-1) @ v
        return self.proj(x.transpose(1, 2).reshape(rows, length, hidden))


class CrossAttention(nn.Module):
    def __init__(self, hidden, heads):
        super().__init__()
        self.heads, self.dim = heads, hidden // heads
        self.q_linear, self.kv_linear = nn.Linear(hidden, hidden), nn.Linear(hidden, 2 * hidden)
        self.proj = nn.Linear(hidden, hidden)

    def forward(self, x, text, mask):  # [B, (T S), C], [B, L, C], [B, L] of bool
        batch, length, hidden = x.shape
        q = self.q_linear(x).view(batch, -1, self.heads, self.dim).transpose(1, 2)
        k, v = self.kv_linear(text).view(batch, -1, 2, self.heads, self.dim).permute(2, 0, 3, 1, 4).unbind(0)
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None, None, :])
        return self.proj(x.transpose(1, 2).reshape(batch, length, hidden))


def modulate(x, shift, scale):
    return x * (1 + scale) + shift


class Block(nn.Module):
    def __init__(self, hidden, heads, temporal):
        super().__init__()
        self.temporal = temporal
        self.norm1 = nn.LayerNorm(hidden, eps=1e-6, elementwise_affine=False)
        self.norm2 = nn.LayerNorm(hidden, eps=1e-6, elementwise_affine=False)
        self.attn, self.cross_attn = Attention(hidden, heads, rotary=temporal), CrossAttention(hidden, heads)
        self.mlp = nn.Sequential(nn.Linear(hidden, 2 * hidden), nn.GELU("tanh"), nn.Linear(2 * hidden, hidden))
        self.scale_shift_table = nn.Parameter(torch.randn(6, hidden) / hidden**0.5)

    def forward(self, x, text, mask, t, frames, tokens):
        batch, _, hidden = x.shape
        table = self.scale_shift_table[None] + t.reshape(batch, 6, -1)
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = table.chunk(6, dim=1)
        m = modulate(self.norm1(x), shift_msa, scale_msa)
        if self.temporal:
            m = m.view(batch, frames, tokens, hidden).transpose(1, 2).reshape(batch * tokens, frames, hidden)
            m = self.attn(m).view(batch, tokens, frames, hidden).transpose(1, 2).reshape(batch, -1, hidden)
        else:
            m = self.attn(m.view(batch * frames, tokens, hidden)).view(batch, -1, hidden)
        x = x + gate_msa * m
        x = x + self.cross_attn(x, text, mask)
        return x + gate_mlp * self.mlp(modulate(self.norm2(x), shift_mlp, scale_mlp))


class TimestepEmbedder(nn.Module):
    def __init__(self, hidden, frequencies):
        super().__init__()
        self.frequencies = frequencies
        self.mlp = nn.Sequential(nn.Linear(frequencies, hidden), nn.SiLU(), nn.Linear(hidden, hidden))

    def forward(self, t):
        half = self.frequencies // 2
        freqs = torch.exp(-math.log(10000) * torch.arange(half, dtype=torch.float32, device=t.device) / half)
        angles = t[:, None].float() * freqs[None]
        return self.mlp(torch.cat([torch.cos(angles), torch.sin(angles)], dim=-1))


class STDiT(nn.Module):
    """Video [B, C_in, T, H, W], timestep [B], text [B, L, C_text], mask [B, L] of bool to [B, C_in, T, H, W]."""

    def __init__(self, depth, hidden, heads, in_channels, text_channels, height, width, patch=(1, 2, 2)):
        super().__init__()
        self.patch, self.in_channels = patch, in_channels
        self.x_embedder = nn.Conv3d(in_channels, hidden, kernel_size=patch, stride=patch)
        self.t_embedder = TimestepEmbedder(hidden, 8)
        self.t_block = nn.Sequential(nn.SiLU(), nn.Linear(hidden, 6 * hidden))
        self.y_embedder = nn.Sequential(nn.Linear(text_channels, hidden), nn.GELU("tanh"), nn.Linear(hidden, hidden))
        self.register_buffer("pos_embed", torch.randn(1, height // patch[1] * (width // patch[2]), hidden))
        self.spatial_blocks = nn.ModuleList(Block(hidden, heads, temporal=False) for _ in range(depth))
        self.temporal_blocks = nn.ModuleList(Block(hidden, heads, temporal=True) for _ in range(depth))
        self.norm_final = nn.LayerNorm(hidden, eps=1e-6, elementwise_affine=False)
        self.final_table = nn.Parameter(torch.randn(2, hidden) / hidden**0.5)
        self.linear = nn.Linear(hidden, math.prod(patch) * in_channels)

    def forward(self, x, timestep, text, mask):
        batch = x.shape[0]
        x = self.x_embedder(x)
        frames, height, width = x.shape[2:]
        tokens = height * width
        x = x.flatten(3).permute(0, 2, 3, 1) + self.pos_embed  # [B, T, S, C]
        x = x.flatten(1, 2)
        t = self.t_embedder(timestep)
        t_mlp, text = self.t_block(t), self.y_embedder(text)
        for spatial, temporal in zip(self.spatial_blocks, self.temporal_blocks):
            x = spatial(x, text, mask, t_mlp, frames, tokens)
            x = temporal(x, text, mask, t_mlp, frames, tokens)
        shift, scale = (self.final_table[None] + t[:, None]).chunk(2, dim=1)
        x = self.linear(modulate(self.norm_final(x), shift, scale))
        x = x.view(batch, frames, height, width, *self.patch, self.in_channels)
        x = x.permute(0, 7, 1, 4, 2, 5, 3, 6)
        return x.reshape(batch, self.in_channels, frames * self.patch[0], height * self.patch[1], width * self.patch[2])


def stdit(batch: int = 1, frames: int = 5, height: int = 6, width: int = 10, layers: int = 1, seed: int = 0):
    torch.manual_seed(seed)
    model = STDiT(layers, hidden=24, heads=3, in_channels=4, text_channels=6, height=height, width=width)
    mask = torch.arange(7).expand(batch, 7) < 5
    return model, (torch.randn(batch, 4, frames, height, width), torch.arange(batch) + 3), {
        "text": torch.randn(batch, 7, 6),
        "mask": mask,
    }  # fmt: skip
