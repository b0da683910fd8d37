"""The encoder of a causal video VAE: 3-D convolutions that see no later frame, and spatial attention in the middle."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F


class CausalConv3d(nn.Module):
    """Pads time on the left with the first frame, space with zeros on both sides."""

    def __init__(self, in_channels, out_channels, kernel=3, stride=(1, 1, 1)):
        super().__init__()
        self.time_pad, self.space_pad = kernel - 1, kernel // 2
        self.conv = nn.Conv3d(in_channels, out_channels, kernel, stride=stride)

    def forward(self, x):  # [B, C, T, H, W]
        x = F.pad(x, (0, 0, 0, 0, self.time_pad, 0), mode="replicate")
        return self.conv(F.pad(x, (self.space_pad,) * 4))


class ResnetBlock(nn.Module):
    def __init__(self, in_channels, out_channels, groups=2):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, in_channels, eps=1e-6)
        self.norm2 = nn.GroupNorm(groups, out_channels, eps=1e-6)
        self.conv1, self.conv2 = CausalConv3d(in_channels, out_channels), CausalConv3d(out_channels, out_channels)
        self.shortcut = nn.Conv3d(in_channels, out_channels, 1) if in_channels != out_channels else nn.Identity()

    def forward(self, x):
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return self.shortcut(x) + h


class SpatialDownsample(nn.Module):
    """Frame by frame, the way 2-D autoencoders do: one row and one column of zeros, then a stride of 2."""

    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x):
        batch, channels, frames, height, width = x.shape
        x = x.permute(0, 2, 1, 3, 4).reshape(batch * frames, channels, height, width)
        x = self.conv(F.pad(x, (0, 1, 0, 1)))
        return x.reshape(batch, frames, *x.shape[1:]).permute(0, 2, 1, 3, 4)


class SpatialAttention(nn.Module):
    def __init__(self, channels, groups=2):
        super().__init__()
        self.norm = nn.GroupNorm(groups, channels, eps=1e-6)
        self.to_q, self.to_k, self.to_v = (nn.Conv2d(channels, channels, 1) for _ in range(3))
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x):
        batch, channels, frames, height, width = x.shape
        h = x.transpose(1, 2).reshape(batch * frames, channels, height, width)
        h = self.norm(h)
        q, k, v = (to(h).flatten(2) for to in (self.to_q, self.to_k, self.to_v))  # [(B T), C, (H W)]
        scores = torch.bmm(q.transpose(1, 2), k) * channels**-0.5
        h = torch.bmm(v, scores.softmax(dim=-1).transpose(1, 2)).view(-1, channels, height, width)
        h = self.proj_out(h).view(batch, frames, channels, height, width).transpose(1, 2)
        return x + h


class VideoEncoder(nn.Module):
    """Video [B, 3, T, H, W] to mean and log-variance, each [B, C_latent, ceil(T / 2), H / 4, W / 4]."""

    def __init__(self, channels, latent):
        super().__init__()
        self.conv_in = CausalConv3d(3, channels)
        self.block1, self.down1 = ResnetBlock(channels, channels), SpatialDownsample(channels)
        self.down2 = CausalConv3d(channels, 2 * channels, stride=(2, 2, 2))
        self.attention, self.block2 = SpatialAttention(2 * channels), ResnetBlock(2 * channels, channels)
        self.norm_out, self.conv_out = nn.GroupNorm(2, channels, eps=1e-6), CausalConv3d(channels, 2 * latent)
        self.quant_conv = nn.Conv3d(2 * latent, 2 * latent, 1)

    def forward(self, video):
        x = self.down1(self.block1(self.conv_in(video)))
        x = self.block2(self.attention(self.down2(x)))
        moments = self.quant_conv(self.conv_out(F.silu(self.norm_out(x))))
        mean, log_variance = torch.chunk(moments, 2, dim=1)
        return mean, torch.clamp(log_variance, -30.0, 20.0)


def video_vae(batch: int = 1, frames: int = 7, height: int = 12, width: int = 20, seed: int = 0):
    torch.manual_seed(seed)
    return VideoEncoder(channels=4, latent=2), (torch.randn(batch, 3, frames, height, width),), {}
