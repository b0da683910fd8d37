"""Language models: one sequence, causal attention with rotary embeddings over all of it."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F


def rotary_tables(length, dim, base=10000.0):
    angles = torch.outer(torch.arange(length).float(), 1.0 / base ** (torch.arange(0, dim, 2).float() / dim))
    return torch.cat((angles, angles), dim=-1).cos(), torch.cat((angles, angles), dim=-1).sin()


def rotate(x, cos, sin):
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


class DecoderLayer(nn.Module):
    def __init__(self, hidden, heads):
        super().__init__()
        self.heads = heads
        self.input_norm, self.post_norm = nn.RMSNorm(hidden), nn.RMSNorm(hidden)
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(hidden, hidden, bias=False) for _ in range(4))
        self.gate_proj = nn.Linear(hidden, 2 * hidden, bias=False)
        self.up_proj = nn.Linear(hidden, 2 * hidden, bias=False)
        self.down_proj = nn.Linear(2 * hidden, hidden, bias=False)

    def forward(self, x, cos, sin):  # [B, L, C]
        batch, length, hidden = x.shape
        y = self.input_norm(x)
        q = self.q_proj(y).view(batch, length, self.heads, -1).transpose(1, 2)
        k = self.k_proj(y).view(batch, length, self.heads, -1).transpose(1, 2)
        v = self.v_proj(y).view(batch, length, self.heads, -1).transpose(1, 2)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.o_proj(y.transpose(1, 2).reshape(batch, length, hidden))
        y = self.post_norm(x)
        return x + self.down_proj(F.silu(self.gate_proj(y)) * self.up_proj(y))


class Decoder(nn.Module):
    """Token ids [B, L] to logits [B, L, vocabulary]."""

    def __init__(self, vocabulary, layers, hidden, heads, longest):
        super().__init__()
        self.embed_tokens = nn.Embedding(vocabulary, hidden)
        self.layers = nn.ModuleList(DecoderLayer(hidden, heads) for _ in range(layers))
        self.norm, self.lm_head = nn.RMSNorm(hidden), nn.Linear(hidden, vocabulary, bias=False)
        cos, sin = rotary_tables(longest, hidden // heads)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    def forward(self, ids):
        length = ids.shape[1]
        x = self.embed_tokens(ids)
        for layer in self.layers:
            x = layer(x, self.cos[:length], self.sin[:length])
        return self.lm_head(self.norm(x))


def decoder(batch: int = 1, length: int = 11, layers: int = 1, heads: int = 3, seed: int = 0):
    torch.manual_seed(seed)
    model = Decoder(vocabulary=17, layers=layers, hidden=8 * heads, heads=heads, longest=16)
    return model, (torch.randint(17, (batch, length)),), {}


def llama(batch: int = 1, length: int = 11, layers: int = 1, seed: int = 0):
    """`transformers.LlamaForCausalLM`: grouped queries, causal mask and rotary tables made from positions."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=17,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=16,
        use_cache=False,
    )
    return LlamaForCausalLM(config), (torch.randint(17, (batch, length)),), {"return_dict": False}
