"""A weather model in the style of Pangu and Swin: 3-D windows over pressure level, latitude and longitude, shifted in turn."""

from __future__ import annotations

import math

import torch
from torch import nn


def window_partition(x, window):
    """[B, Z, H, W, C] to [B * windows, positions of a window, C]."""
    batch, depth, height, width, channels = x.shape
    x = x.view(
        batch, depth // window[0], window[0], height // window[1], window[1], width // window[2], window[2], channels
    )
    return x.permute(0, 1, 3, 5, 2, 4, 6, 7).contiguous().view(-1, math.prod(window), channels)


def window_reverse(windows, window, size):
    """The inverse of `window_partition`; `size` is (Z, H, W)."""
    x = windows.view(-1, *(s // w for s, w in zip(size, window)), *window, windows.shape[-1])
    return x.permute(0, 1, 4, 2, 5, 3, 6, 7).contiguous().view(-1, *size, windows.shape[-1])


def relative_position_index(window):
    """[positions, positions]: which entry of the bias table belongs to a pair of positions."""
    grid = torch.stack(torch.meshgrid(*(torch.arange(w) for w in window), indexing="ij")).flatten(1)
    relative = grid[:, :, None] - grid[:, None, :]
    index = torch.zeros_like(relative[0])
    for axis, w in enumerate(window):
        index = index * (2 * w - 1) + relative[axis] + w - 1
    return index


def shift_mask(size, window, shift):
    """[windows, positions, positions]: keeps apart what the roll brought together; longitude is a circle."""
    region = torch.zeros(1, *size, 1)
    count = 0
    for levels in (slice(0, -window[0]), slice(-window[0], -shift[0]), slice(-shift[0], None)):
        for latitudes in (slice(0, -window[1]), slice(-window[1], -shift[1]), slice(-shift[1], None)):
            region[:, levels, latitudes] = count
            count += 1
    region = window_partition(region, window).squeeze(-1)
    return torch.zeros(()).where(region[:, None] == region[:, :, None], torch.tensor(-100.0))


class WindowAttention(nn.Module):
    def __init__(self, dim, heads, window):
        super().__init__()
        self.heads, self.scale = heads, (dim // heads) ** -0.5
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.bias_table = nn.Parameter(torch.randn(math.prod(2 * w - 1 for w in window), heads) * 0.2)
        self.register_buffer("index", relative_position_index(window))

    def forward(self, x, mask=None):  # [B * windows, positions, C], [windows, positions, positions]
        rows, positions, dim = x.shape
        q, k, v = self.qkv(x).reshape(rows, positions, 3, self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        scores = (q * self.scale) @ k.transpose(-2, -1)
        bias = self.bias_table[self.index.view(-1)].view(positions, positions, -1)
        scores = scores + bias.permute(2, 0, 1).contiguous().unsqueeze(0)
        if mask is not None:
            windows = mask.shape[0]
            scores = scores.view(rows // windows, windows, self.heads, positions, positions)
            scores = (scores + mask.unsqueeze(1).unsqueeze(0)).view(-1, self.heads, positions, positions)
        x = (scores.softmax(dim=-1) @ v).transpose(1, 2).reshape(rows, positions, dim)
        return self.proj(x)


class Block(nn.Module):
    def __init__(self, dim, heads, size, window, shifted):
        super().__init__()
        self.size, self.window = size, window
        self.shift = tuple(w // 2 for w in window) if shifted else None
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attn = WindowAttention(dim, heads, window)
        self.mlp = nn.Sequential(nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim))
        self.register_buffer("mask", shift_mask(size, window, self.shift) if shifted else None)

    def forward(self, x):  # [B, Z * H * W, C]
        batch, length, dim = x.shape
        y = self.norm1(x).view(batch, *self.size, dim)
        if self.shift is not None:
            y = torch.roll(y, shifts=[-s for s in self.shift], dims=(1, 2, 3))
        y = self.attn(window_partition(y, self.window), self.mask)
        y = window_reverse(y, self.window, self.size)
        if self.shift is not None:
            y = torch.roll(y, shifts=self.shift, dims=(1, 2, 3))
        x = x + y.view(batch, length, dim)
        return x + self.mlp(self.norm2(x))


class WeatherModel(nn.Module):
    """Upper air [B, variables, levels, latitude, longitude] to the same, one step later."""

    def __init__(self, variables, levels, latitudes, longitudes, dim, heads, patch, window):
        super().__init__()
        size = tuple(s // p for s, p in zip((levels, latitudes, longitudes), patch))
        self.size = size
        self.patch_embed = nn.Conv3d(variables, dim, kernel_size=patch, stride=patch)
        self.blocks = nn.ModuleList(Block(dim, heads, size, window, shifted) for shifted in (False, True))
        self.norm = nn.LayerNorm(dim)
        self.patch_recover = nn.ConvTranspose3d(dim, variables, kernel_size=patch, stride=patch)

    def forward(self, x):
        step = x
        x = self.patch_embed(x).flatten(2).transpose(1, 2)
        for block in self.blocks:
            x = block(x)
        x = self.norm(x).transpose(1, 2).unflatten(2, self.size)
        return step + self.patch_recover(x)


def weather(batch: int = 1, levels: int = 8, latitudes: int = 12, longitudes: int = 20, seed: int = 0):
    """By default windows 2 x 3 x 5 over levels, latitude and longitude: no number of ranks divides all of them."""
    torch.manual_seed(seed)
    model = WeatherModel(3, levels, latitudes, longitudes, dim=12, heads=3, patch=(2, 2, 2), window=(2, 2, 2))
    return model, (torch.randn(batch, 3, levels, latitudes, longitudes),), {}
