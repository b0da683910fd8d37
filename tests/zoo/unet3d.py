"""A 3-D UNet for video: frames through 2-D resnet blocks, time by (3, 1, 1) convolutions and temporal attention."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F


class ResnetBlock(nn.Module):
    """[(B T), C, H, W] with the timestep's embedding [B, C_emb], then a temporal convolution on [B, C, T, H, W]."""

    def __init__(self, in_channels, out_channels, embedding, groups=2):
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(groups, in_channels), nn.GroupNorm(groups, out_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.time_emb_proj = nn.Linear(embedding, out_channels)
        self.shortcut = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else nn.Identity()
        self.temporal_norm = nn.GroupNorm(groups, out_channels)
        self.temporal_conv = nn.Conv3d(out_channels, out_channels, (3, 1, 1), padding=(1, 0, 0))

    def forward(self, x, emb, frames):
        h = self.conv1(F.silu(self.norm1(x)))
        emb = self.time_emb_proj(F.silu(emb)).repeat_interleave(frames, dim=0)
        h = h + emb[:, :, None, None]
        h = self.shortcut(x) + self.conv2(F.silu(self.norm2(h)))
        video = h.unflatten(0, (-1, frames)).transpose(1, 2)  # [B, C, T, H, W]
        video = video + self.temporal_conv(F.silu(self.temporal_norm(video)))
        return video.transpose(1, 2).flatten(0, 1)


class TemporalAttention(nn.Module):
    def __init__(self, channels, heads, groups=2):
        super().__init__()
        self.heads = heads
        self.norm = nn.GroupNorm(groups, channels)
        self.to_qkv, self.to_out = nn.Linear(channels, 3 * channels), nn.Linear(channels, channels)

    def forward(self, x, frames):  # [(B T), C, H, W]
        rows, channels, height, width = x.shape
        h = self.norm(x).view(-1, frames, channels, height, width).permute(0, 3, 4, 1, 2)
        h = h.reshape(-1, frames, channels)  # [(B H W), T, C]
        q, k, v = self.to_qkv(h).view(-1, frames, 3, self.heads, channels // self.heads).permute(2, 0, 3, 1, 4)
        h = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(-1, frames, channels)
        h = self.to_out(h).view(-1, height, width, frames, channels).permute(0, 3, 4, 1, 2)
        return x + h.reshape(rows, channels, height, width)


class UNet3D(nn.Module):
    """Video [B, C_in, T, H, W] and timestep's embedding [B, C_emb] to [B, C_in, T, H, W]."""

    def __init__(self, in_channels, channels, embedding, heads):
        super().__init__()
        self.conv_in = nn.Conv2d(in_channels, channels, 3, padding=1)
        self.down_block = ResnetBlock(channels, channels, embedding)
        self.downsample = nn.Conv2d(channels, 2 * channels, 3, stride=2, padding=1)
        self.mid_block = ResnetBlock(2 * channels, 2 * channels, embedding)
        self.mid_attention = TemporalAttention(2 * channels, heads)
        self.upsample = nn.Conv2d(2 * channels, channels, 3, padding=1)
        self.up_block = ResnetBlock(2 * channels, channels, embedding)
        self.norm_out, self.conv_out = nn.GroupNorm(2, channels), nn.Conv2d(channels, in_channels, 3, padding=1)

    def forward(self, video, emb):
        frames = video.shape[2]
        x = self.conv_in(video.transpose(1, 2).flatten(0, 1))
        x = skip = self.down_block(x, emb, frames)
        x = self.downsample(x)
        x = self.mid_attention(self.mid_block(x, emb, frames), frames)
        x = self.upsample(F.interpolate(x, scale_factor=2.0, mode="nearest"))
        x = self.up_block(torch.cat([x, skip], dim=1), emb, frames)
        x = self.conv_out(F.silu(self.norm_out(x)))
        return x.unflatten(0, (-1, frames)).transpose(1, 2)


def unet3d(batch: int = 1, frames: int = 5, size: int = 12, seed: int = 0):
    torch.manual_seed(seed)
    model = UNet3D(in_channels=3, channels=6, embedding=5, heads=3)
    return model, (torch.randn(batch, 3, frames, size, size), torch.randn(batch, 5)), {}
