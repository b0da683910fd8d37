"""What each factor is to the model: which are heads and hidden dims, and which factors are pieces of one sequence."""

from __future__ import annotations

import torch
from torch import nn

from dsp_auto.passes.capture import capture
from dsp_auto.passes.factorize import factorize
from examples.transformer_2d import build
from tests.zoo.grouped_attention import grouped_attention
from tests.zoo.language import llama


def sizes_of(factors, which) -> list[int]:
    return sorted(factors.sizes[factor] for factor in which)


def test_hidden_dims_and_heads_are_inner_and_the_width_of_the_residual_stream_is_not():
    model, args, kwargs = build(layers=1, hidden=48, heads=3, frames=5, tokens=7)
    factors = factorize(capture(model, args, kwargs))
    assert sizes_of(factors, factors.inner) == [3, 3, 192, 192]  # of two blocks
    assert sizes_of(factors, factors.heads) == [3, 3]


def test_a_model_whose_norm_is_written_out_has_no_more_inner_factors():
    model, args, kwargs = llama(length=12)  # an RMSNorm is a mean over the width
    factors = factorize(capture(model, args, kwargs))
    assert sizes_of(factors, factors.inner) == [2, 2, 48]  # groups of query heads, and the hidden dim


def test_heads_of_keys_that_several_queries_share_are_heads_too():
    factors = factorize(capture(*grouped_attention()))
    heads = {factors.names[factor] for factor in factors.heads}
    assert heads and all(name.startswith("q_proj") for name in heads)


def test_pieces_of_a_sequence_and_what_they_are_joined_to_are_one_sequence():
    class Joined(nn.Module):
        def forward(self, text: torch.Tensor, video: torch.Tensor) -> torch.Tensor:
            both = torch.cat((text, video), 1)
            return both.softmax(1)[:, text.shape[1] :]

    factors = factorize(capture(Joined(), (torch.randn(2, 5, 4), torch.randn(2, 7, 4))))
    (group,) = factors.sequences
    assert sizes_of(factors, group) == [5, 7, 7, 12]  # text, video, its part of the result, and both


def test_two_attentions_in_turn_are_two_sequences():
    model, args, kwargs = build(layers=1, frames=5, tokens=7)
    factors = factorize(capture(model, args, kwargs))
    assert [sizes_of(factors, group) for group in factors.sequences] in ([[5], [7]], [[7], [5]])
