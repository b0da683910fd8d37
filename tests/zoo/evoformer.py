"""AlphaFold's Evoformer block (supplement, algorithms 7 to 15) and the triangular block of `transformers`' ESMFold."""

from __future__ import annotations

import torch
from torch import nn


class GatedAttention(nn.Module):
    """Over dim -2 of [..., length, C]; biases are broadcast over the scores [..., heads, queries, keys]."""

    def __init__(self, channels, heads, dim):
        super().__init__()
        self.heads, self.dim = heads, dim
        self.linear_q = nn.Linear(channels, heads * dim, bias=False)
        self.linear_k = nn.Linear(channels, heads * dim, bias=False)
        self.linear_v = nn.Linear(channels, heads * dim, bias=False)
        self.linear_g, self.linear_o = nn.Linear(channels, heads * dim), nn.Linear(heads * dim, channels)

    def forward(self, x, biases):
        q, k, v = (
            linear(x).view(*x.shape[:-1], self.heads, self.dim).transpose(-2, -3)
            for linear in (self.linear_q, self.linear_k, self.linear_v)
        )
        scores = torch.matmul(q / self.dim**0.5, k.transpose(-1, -2))
        for bias in biases:
            scores = scores + bias
        out = torch.matmul(torch.softmax(scores, dim=-1), v).transpose(-2, -3)
        gate = torch.sigmoid(self.linear_g(x)).view(out.shape)
        return self.linear_o((out * gate).flatten(-2))


class MSARowAttentionWithPairBias(nn.Module):
    def __init__(self, c_m, c_z, heads, dim):
        super().__init__()
        self.layer_norm_m, self.layer_norm_z = nn.LayerNorm(c_m), nn.LayerNorm(c_z)
        self.linear_z = nn.Linear(c_z, heads, bias=False)
        self.attention = GatedAttention(c_m, heads, dim)

    def forward(self, m, z, mask):
        mask_bias = (1e9 * (mask - 1))[..., :, None, None, :]  # [B, S, 1, 1, R]
        pair_bias = self.linear_z(self.layer_norm_z(z)).permute(0, 3, 1, 2).unsqueeze(-4)  # [B, 1, heads, R, R]
        return self.attention(self.layer_norm_m(m), [mask_bias, pair_bias])


class MSAColumnAttention(nn.Module):
    def __init__(self, c_m, heads, dim):
        super().__init__()
        self.layer_norm = nn.LayerNorm(c_m)
        self.attention = GatedAttention(c_m, heads, dim)

    def forward(self, m, mask):
        m, mask = m.transpose(-2, -3), mask.transpose(-1, -2)
        out = self.attention(self.layer_norm(m), [(1e9 * (mask - 1))[..., :, None, None, :]])
        return out.transpose(-2, -3)


class OuterProductMean(nn.Module):
    def __init__(self, c_m, c_z, hidden):
        super().__init__()
        self.layer_norm = nn.LayerNorm(c_m)
        self.linear_1, self.linear_2 = nn.Linear(c_m, hidden), nn.Linear(c_m, hidden)
        self.linear_out = nn.Linear(hidden**2, c_z)

    def forward(self, m, mask):
        m, mask = self.layer_norm(m), mask.unsqueeze(-1)
        a, b = self.linear_1(m) * mask, self.linear_2(m) * mask
        outer = torch.einsum("bsic,bsjd->bijcd", a, b)
        norm = torch.einsum("bsic,bsjc->bijc", mask, mask)
        return self.linear_out(outer.flatten(-2)) / (1e-3 + norm)


class TriangleMultiplication(nn.Module):
    def __init__(self, c_z, hidden, outgoing):
        super().__init__()
        self.equation = "bikc,bjkc->bijc" if outgoing else "bkic,bkjc->bijc"
        self.linear_a_p, self.linear_a_g = nn.Linear(c_z, hidden), nn.Linear(c_z, hidden)
        self.linear_b_p, self.linear_b_g = nn.Linear(c_z, hidden), nn.Linear(c_z, hidden)
        self.linear_g, self.linear_z = nn.Linear(c_z, c_z), nn.Linear(hidden, c_z)
        self.layer_norm_in, self.layer_norm_out = nn.LayerNorm(c_z), nn.LayerNorm(hidden)

    def forward(self, z, mask):
        z, mask = self.layer_norm_in(z), mask.unsqueeze(-1)
        a = mask * torch.sigmoid(self.linear_a_g(z)) * self.linear_a_p(z)
        b = mask * torch.sigmoid(self.linear_b_g(z)) * self.linear_b_p(z)
        x = torch.einsum(self.equation, a, b)
        return self.linear_z(self.layer_norm_out(x)) * torch.sigmoid(self.linear_g(z))


class TriangleAttention(nn.Module):
    def __init__(self, c_z, heads, dim, starting):
        super().__init__()
        self.starting = starting
        self.layer_norm = nn.LayerNorm(c_z)
        self.linear = nn.Linear(c_z, heads, bias=False)
        self.attention = GatedAttention(c_z, heads, dim)

    def forward(self, z, mask):
        if not self.starting:
            z, mask = z.transpose(-2, -3), mask.transpose(-1, -2)
        z = self.layer_norm(z)
        mask_bias = (1e9 * (mask - 1))[..., :, None, None, :]  # [B, R, 1, 1, R]
        triangle_bias = self.linear(z).permute(0, 3, 1, 2).unsqueeze(-4)  # [B, 1, heads, R, R]
        out = self.attention(z, [mask_bias, triangle_bias])
        return out if self.starting else out.transpose(-2, -3)


class Transition(nn.Module):
    def __init__(self, channels, factor):
        super().__init__()
        self.layer_norm = nn.LayerNorm(channels)
        self.linear_1, self.linear_2 = nn.Linear(channels, factor * channels), nn.Linear(factor * channels, channels)

    def forward(self, x):
        return self.linear_2(torch.relu(self.linear_1(self.layer_norm(x))))


class EvoformerBlock(nn.Module):
    """MSA [B, S, R, c_m], pair [B, R, R, c_z], their masks [B, S, R] and [B, R, R]."""

    def __init__(self, c_m, c_z, heads, dim):
        super().__init__()
        self.msa_row = MSARowAttentionWithPairBias(c_m, c_z, heads, dim)
        self.msa_column = MSAColumnAttention(c_m, heads, dim)
        self.msa_transition = Transition(c_m, 2)
        self.outer_product_mean = OuterProductMean(c_m, c_z, 4)
        self.triangle_out = TriangleMultiplication(c_z, c_z, outgoing=True)
        self.triangle_in = TriangleMultiplication(c_z, c_z, outgoing=False)
        self.triangle_start = TriangleAttention(c_z, heads, dim, starting=True)
        self.triangle_end = TriangleAttention(c_z, heads, dim, starting=False)
        self.pair_transition = Transition(c_z, 2)

    def forward(self, m, z, msa_mask, pair_mask):
        m = m + self.msa_row(m, z, msa_mask)
        m = m + self.msa_column(m, msa_mask)
        m = m + self.msa_transition(m)
        z = z + self.outer_product_mean(m, msa_mask)
        z = z + self.triangle_out(z, pair_mask)
        z = z + self.triangle_in(z, pair_mask)
        z = z + self.triangle_start(z, pair_mask)
        z = z + self.triangle_end(z, pair_mask)
        return m, z + self.pair_transition(z)


def evoformer(batch: int = 1, rows: int = 5, columns: int = 7, seed: int = 0):
    torch.manual_seed(seed)
    model = EvoformerBlock(c_m=12, c_z=10, heads=3, dim=4)
    m, z = torch.randn(batch, rows, columns, 12), torch.randn(batch, columns, columns, 10)
    masks = torch.ones(batch, rows, columns), torch.ones(batch, columns, columns)
    masks[0][:, 1, 2:4], masks[1][:, 3] = 0, 0
    return model, (m, z, *masks), {}


def esmfold(batch: int = 1, length: int = 7, seed: int = 0):
    """`transformers`' block: a sequence state and a pair state, triangle products by permute and matmul."""
    from transformers.models.esm.configuration_esm import EsmFoldConfig
    from transformers.models.esm.modeling_esmfold import EsmFoldTriangularSelfAttentionBlock

    torch.manual_seed(seed)
    config = EsmFoldConfig().trunk
    config.sequence_state_dim, config.sequence_head_width = 12, 4
    config.pairwise_state_dim, config.pairwise_head_width = 8, 4
    config.dropout = 0.0
    model = EsmFoldTriangularSelfAttentionBlock(config)
    for parameter in model.parameters():  # some start at zero, and then much of the block has no gradient
        nn.init.normal_(parameter, std=0.3)
    mask = (torch.arange(length) < length - 1).expand(batch, length)
    return model, (torch.randn(batch, length, 12), torch.randn(batch, length, length, 8)), {"mask": mask.float()}
