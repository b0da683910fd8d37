"""Attention: each query by itself, keys and values whole."""

from __future__ import annotations

from ..notation import OpCall, OpRule, from_notation
from . import rule


@rule("aten::scaled_dot_product_attention")
def scaled_dot_product_attention(call: OpCall) -> OpRule | None:
    """`q[... s d], k[... t d], v[... t e], mask[... s t]`: batch, heads and queries are parallel.

    With `is_causal` the mask is made from positions, which a shard of the queries would lose: s stays whole too.
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
    text = f"... {heads}s d, ... {group}t d, ... {group}t e, ... {mask_heads}s t -> ... {heads}s e"
    whole = {"t", "d", "e"} | ({"s"} if call["is_causal"] else set())
    return from_notation(text, call, whole=whole, sizes=sizes, is_random=call["dropout_p"] > 0)


@rule("aten::softmax", "aten::log_softmax", "aten::_softmax", "aten::_log_softmax")
def softmax(call: OpCall) -> OpRule:
    names = [f"d{position}" for position in range(len(call.operands[0].shape))]
    whole = [names[call.dim(call["dim"])]] if names else []
    return from_notation(f"{' '.join(names)} -> {' '.join(names)}", call, whole=whole)
