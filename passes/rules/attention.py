"""Attention: each query by itself, keys and values whole."""

from __future__ import annotations

import torch

from dsp_auto.ring_attention import ring_traffic

from ..notation import Local, OpCall, OpRule, Ring, from_notation, value_of
from . import rule

aten = torch.ops.aten


@rule("aten::scaled_dot_product_attention")
def scaled_dot_product_attention(call: OpCall) -> OpRule | None:
    """`q[... s d], k[... t d], v[... t e], mask[... s u]`: batch, heads and queries are parallel, or queries and keys are cut
    together and keys and values go round. The mask's keys (u) are whole in either way.

    With `is_causal` the mask is made from positions: a range of the queries sees the keys up to its last query.
    With `enable_gqa` the query heads are `(g r)`, r of them for each of the g key heads.
    """
    heads, group = "", ""
    sizes = {}
    if call["enable_gqa"]:
        query, key = call.operands[0].shape, call.operands[1].shape
        if key[-3] != call.operands[2].shape[-3]:
            return None
        heads, group = "(g r) ", "g "
        sizes = {"g": key[-3], "r": query[-3] // key[-3]}
    mask_heads = heads
    if len(call.operands) > 3:
        mask = call.operands[3].shape
        if heads and (len(mask) < 3 or mask[-3] == 1):
            mask_heads = "1 " if len(mask) > 2 else ""
    text = f"... {heads}s d, ... {group}t d, ... {group}t e, ... {mask_heads}s u -> ... {heads}s e"
    causal, has_mask = call["is_causal"], len(call.operands) > 3

    def local(emit, target, args, kwargs, here: Local):
        if "t" in here.sites:
            queries, keys = here.sites["s"], here.sites["t"]
            lengths = [[b - a for a, b in site.ranges] for site in (queries, keys)]
            mask = args[3] if has_mask else None
            rest = (causal, call["scale"], call["enable_gqa"], queries.ranks, queries.rank, queries.group)
            return emit(torch.ops.dsp.ring_attention.default, *args[:3], mask, *lengths, *rest)
        if not causal or "s" not in here.sites:
            return emit(target, *args, **kwargs)
        start, stop = here.range("s")
        query, *rest = args[:3]
        seen = min(stop, here.whole_sizes.get("t", 1))
        rest = [emit(aten.slice.Tensor, x, len(call.operands[1].shape) - 2, 0, seen) for x in rest]
        mask = emit(aten.ones.default, [stop - start, seen], dtype=torch.bool, device=value_of(query).device)
        mask = emit(aten.tril.default, mask, start)
        named = {name: call[name] for name in ("scale", "enable_gqa")}
        return emit(target, query, *rest, mask, call["dropout_p"], False, **named)

    def traffic(queries, keys, nbytes, grads):
        q, k, v, *_, o = nbytes
        return ring_traffic(
            queries,
            keys,
            q_row=q / sum(queries),
            k_row=k / sum(keys),
            v_row=v / sum(keys),
            o_row=o / sum(queries),
            is_causal=causal,
            grads=grads[:3],
            mask_grad=any(grads[3:]),
        )

    can_go_round = call["dropout_p"] == 0 and not (causal and has_mask)
    return from_notation(
        text,
        call,
        whole={"t", "u", "d", "e"},
        ranges=[("s",)] if causal else (),
        rings=[Ring("s", "t", traffic)] if can_go_round else (),
        sizes=sizes,
        is_random=call["dropout_p"] > 0,
        local=local if causal or can_go_round else None,
    )


@rule("aten::_scaled_dot_product_flash_attention_for_cpu", "aten::_scaled_dot_product_attention_math")
def attention_kernel(call: OpCall) -> OpRule | None:
    """What attention lowers to on the CPU gives besides what the softmax was: its scale for each query, or all of it."""
    if call.bound.get("enable_gqa") or call.bound.get("dropout_mask") is not None:
        return None
    is_math = call.target._schema.name == "aten::_scaled_dot_product_attention_math"
    second = "... s t" if is_math else "... s"
    return from_notation(
        f"... s d, ... t d, ... t e, ... s t -> ... s e, {second}",
        call,
        whole={"t", "d", "e"} | ({"s"} if call["is_causal"] else set()),
        is_random=call["dropout_p"] > 0,
    )


@rule("aten::softmax", "aten::log_softmax", "aten::_softmax", "aten::_log_softmax")
def softmax(call: OpCall) -> OpRule:
    names = [f"d{position}" for position in range(len(call.operands[0].shape))]
    whole = [names[call.dim(call["dim"])]] if names else []
    return from_notation(f"{' '.join(names)} -> {' '.join(names)}", call, whole=whole)
