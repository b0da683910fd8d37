"""Recurrent networks: samples are parallel, time and features stay whole."""

from __future__ import annotations

from ..notation import OpCall, OpRule, from_notation
from . import rule


@rule("aten::lstm.input", "aten::gru.input", "aten::rnn_tanh.input", "aten::rnn_relu.input")
def recurrent(call: OpCall) -> OpRule:
    """`t b f` (or `b t f`) and states `l b h` (an LSTM has two) with the layers' weights: a state each layer leaves."""
    time = "b t" if call["batch_first"] else "t b"
    states = len(call.outputs) - 1
    weights = [
        " ".join(f"w{n}_{dim}" for dim in range(len(x.shape))) for n, x in enumerate(call.operands[1 + states :])
    ]
    # A projection makes the hidden state smaller than the cell's.
    layers = [f"l b h{n}" for n in range(states)]
    text = f"{', '.join([f'{time} f', *layers, *weights])} -> {', '.join([f'{time} o', *layers])}"
    whole = {"t", "f", "o", "l", *(f"h{n}" for n in range(states)), *" ".join(weights).split()}
    return from_notation(text, call, whole=whole, is_random=call["dropout"] > 0 and call["train"])


@rule("aten::lstm_cell", "aten::gru_cell", "aten::rnn_tanh_cell", "aten::rnn_relu_cell")
def cell(call: OpCall) -> OpRule:
    """One step: the weights of four gates (three, one) are merged in their first dim, which stays whole."""
    batch = "b " * (len(call.operands[0].shape) - 1)
    states = [f"{batch}h"] * len(call.outputs)
    weights = "g f, g h, g, g"
    return from_notation(f"{batch}f, {', '.join(states)}, {weights} -> {', '.join(states)}", call, whole="fgh")
