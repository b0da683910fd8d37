"""Recurrences along time beside attention along space: Mamba's selective scan, RWKV, and a gated linear recurrence."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F


class Mamba(nn.Module):
    """A selective state space along dim 1 of [rows, length, C], with a causal depthwise convolution before it."""

    def __init__(self, hidden, inner, state, kernel=4, rank=2):
        super().__init__()
        self.inner, self.state, self.rank = inner, state, rank
        self.in_proj = nn.Linear(hidden, 2 * inner, bias=False)
        self.conv1d = nn.Conv1d(inner, inner, kernel, groups=inner, padding=kernel - 1)
        self.x_proj = nn.Linear(inner, rank + 2 * state, bias=False)
        self.dt_proj = nn.Linear(rank, inner)
        self.A_log = nn.Parameter(torch.log(torch.arange(1, state + 1).float()).repeat(inner, 1))
        self.D = nn.Parameter(torch.ones(inner))
        self.out_proj = nn.Linear(inner, hidden, bias=False)

    def forward(self, x):
        rows, length, _ = x.shape
        x, z = self.in_proj(x).transpose(1, 2).chunk(2, dim=1)  # [rows, inner, length]
        x = F.silu(self.conv1d(x)[..., :length])
        dt, B, C = torch.split(self.x_proj(x.transpose(1, 2)), [self.rank, self.state, self.state], dim=-1)
        dt = F.softplus(self.dt_proj(dt)).transpose(1, 2)
        A = -torch.exp(self.A_log.float())
        decay = torch.exp(A[None, :, None, :] * dt[:, :, :, None])  # [rows, inner, length, state]
        update = dt[:, :, :, None] * B[:, None, :, :] * x[:, :, :, None]
        h = torch.zeros(rows, self.inner, self.state, device=x.device, dtype=x.dtype)
        outputs = []
        for step in range(length):
            h = decay[:, :, step] * h + update[:, :, step]
            outputs.append(torch.matmul(h, C[:, step, :].unsqueeze(-1))[:, :, 0])
        y = torch.stack(outputs, dim=-1) + x * self.D[None, :, None]
        return self.out_proj((y * F.silu(z)).transpose(1, 2))


class RWKV(nn.Module):
    """RWKV-4's time mixing along dim 1 of [rows, length, C], with the running maximum that keeps its exponentials small."""

    def __init__(self, hidden):
        super().__init__()
        self.time_shift = nn.ZeroPad2d((0, 0, 1, -1))
        self.time_decay, self.time_first = nn.Parameter(torch.randn(hidden)), nn.Parameter(torch.randn(hidden))
        self.mix_k, self.mix_v, self.mix_r = (nn.Parameter(torch.rand(1, 1, hidden)) for _ in range(3))
        self.key, self.value, self.receptance, self.output = (nn.Linear(hidden, hidden, bias=False) for _ in range(4))

    def forward(self, x):
        shifted = self.time_shift(x)
        k = self.key(x * self.mix_k + shifted * (1 - self.mix_k))
        v = self.value(x * self.mix_v + shifted * (1 - self.mix_v))
        r = torch.sigmoid(self.receptance(x * self.mix_r + shifted * (1 - self.mix_r)))
        decay = -torch.exp(self.time_decay)
        numerator = denominator = torch.zeros_like(k[:, 0])
        largest = torch.full_like(k[:, 0], -1e38)
        outputs = []
        for step in range(x.shape[1]):
            now, value = k[:, step], v[:, step]
            top = torch.maximum(largest, self.time_first + now)
            past, present = torch.exp(largest - top), torch.exp(self.time_first + now - top)
            outputs.append((past * numerator + present * value) / (past * denominator + present))
            top = torch.maximum(largest + decay, now)
            past, present = torch.exp(largest + decay - top), torch.exp(now - top)
            numerator, denominator = past * numerator + present * value, past * denominator + present
            largest = top
        return self.output(r * torch.stack(outputs, dim=1))


class LinearRecurrence(nn.Module):
    """h[t] = a[t] h[t-1] + b[t] along dim 1 of [rows, length, C] with no loop: cumulative sums in the logarithm of a."""

    def __init__(self, hidden):
        super().__init__()
        self.gate, self.value, self.output = (nn.Linear(hidden, hidden) for _ in range(3))

    def forward(self, x):
        log_a = F.logsigmoid(self.gate(x))
        b = (1 - log_a.exp()) * self.value(x)
        total = torch.cumsum(log_a, dim=1)
        return self.output(total.exp() * torch.cumsum(b * torch.exp(-total), dim=1))


class SpaceAttention(nn.Module):
    def __init__(self, hidden, heads):
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(hidden, 3 * hidden), nn.Linear(hidden, hidden)

    def forward(self, x):  # [rows, length, C]
        rows, length, hidden = x.shape
        q, k, v = self.qkv(x).reshape(rows, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(rows, length, hidden))


class SpaceTime(nn.Module):
    """[B, T, S, C_in] to the same: attention over S, then `mixer` along T, then an MLP."""

    def __init__(self, mixer, hidden, heads, channels):
        super().__init__()
        self.embed, self.head = nn.Linear(channels, hidden), nn.Linear(hidden, channels)
        self.norms = nn.ModuleList(nn.LayerNorm(hidden) for _ in range(3))
        self.space, self.time = SpaceAttention(hidden, heads), mixer
        self.mlp = nn.Sequential(nn.Linear(hidden, 2 * hidden), nn.GELU(), nn.Linear(2 * hidden, hidden))

    def forward(self, x):
        batch, frames, tokens, _ = x.shape
        x = self.embed(x)
        x = x + self.space(self.norms[0](x).reshape(batch * frames, tokens, -1)).reshape(x.shape)
        rows = self.norms[1](x).transpose(1, 2).reshape(batch * tokens, frames, -1)
        x = x + self.time(rows).reshape(batch, tokens, frames, -1).transpose(1, 2)
        return self.head(x + self.mlp(self.norms[2](x)))


def space_time(mixer: str, batch: int = 1, frames: int = 5, tokens: int = 7, seed: int = 0):
    torch.manual_seed(seed)
    hidden = 12
    made = {"mamba": lambda: Mamba(hidden, 2 * hidden, 4), "rwkv": lambda: RWKV(hidden)}
    made["linear"] = lambda: LinearRecurrence(hidden)
    return SpaceTime(made[mixer](), hidden, 3, 4), (torch.randn(batch, frames, tokens, 4),), {}
