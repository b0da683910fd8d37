"""Ring attention: scaled_dot_product_attention where queries, keys and values are sharded along the sequence.

    torch.ops.dsp.ring_attention(q, k, v, mask, queries, keys, is_causal, scale, enable_gqa, ranks, rank, group)

Every rank holds a range of the queries and a range of the keys. Keys and values go round the ranks, rank r sends to
r + 1; each rank computes its queries' attention to the keys at hand while the next ones are under way, and merges what
it has by log-sum-exp. So a rank never holds more keys than its own, those at hand and those under way, and the result is
attention's, not an estimate.
In the backward they go round again, and what a rank finds for another one's keys and values is sent straight home.

With `is_causal`, ranges as they come would give the last rank nearly all the work. So the sequence is cut into 2N chunks,
and rank r computes those of numbers 2r and 2N-1-2r: for every rank the same area under the mask, but for what chunks
differ in length. The first of the two it mostly holds; the other is fetched before, and its result sent home. (Pairing r
with 2N-1-r is as even, but moves about twice as many rows.) Keys travel as far as somebody needs them, and no
block is computed that the mask hides. Where queries and keys are not equally many, the pairs would not balance: ranges
stay as they are (`torch`'s causal mask counts both from the start, which only self-attention is known to use).

`ring_traffic` says what all this sends, from sizes alone.

The kernels that give log-sum-exp beside the output, and take it in their backward, have no public name: this file calls
private aten ops, and only this one. With the log-sum-exp and the output over all keys, a kernel's backward gives exactly
what one block adds to the gradients. Where no kernel takes a case, `_plain` and `_plain_backward` do.
"""

from __future__ import annotations

import bisect
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dsp_auto.collectives import At, c10d, exchange, issue, site, wait
from dsp_auto.errors import DspError, LayoutError
from dsp_auto.moves import Ways, resized
from dsp_auto.primitives import wants_grad
from dsp_auto.shards import exchanged, shard_sizes

_library = torch.library.Library("dsp", "FRAGMENT")  # unregisters its op when collected, so it must live
_aten = torch.ops.aten
_INF = math.inf
_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class RingTraffic(NamedTuple):
    """What one ring attention sends: wire bytes per device, the mean over the ranks, and the number of collectives."""

    forward_bytes: float
    backward_bytes: float
    forward_collectives: int
    backward_collectives: int


def ring_traffic(
    queries: Sequence[int],
    keys: Sequence[int],
    *,
    q_row: int,
    k_row: int,
    v_row: int,
    o_row: int,
    is_causal: bool,
    grads: tuple[bool, bool, bool],
    mask_grad: bool = False,
) -> RingTraffic:
    """What `ring_attention` sends where rank r holds `queries[r]` queries and `keys[r]` keys.

    q_row, k_row, v_row, o_row: bytes of one place of the sequence in the queries, keys, values and the output that a rank
    holds: batch x heads x dim x itemsize. grads: which of q, k and v want a gradient; mask_grad: whether the mask does.
    Raises LayoutError where the two lists differ in length, are empty, or hold a negative number.
    """
    _check_lengths(queries, keys)
    schedule = _schedule(tuple(queries), tuple(keys), is_causal)
    ranks, moved_q, moved_k = len(queries), schedule.queries.moved, schedule.keys.moved
    rotated, home, home_hops = schedule.rotated_rows * (k_row + v_row), 0, 0
    if any(grads[1:]):
        home, home_hops = schedule.home_rows * (grads[1] * k_row + grads[2] * v_row), schedule.home_hops
    forward = moved_q * (q_row + o_row) + moved_k * (k_row + v_row) + rotated
    deals = bool(moved_q or moved_k) + bool(moved_q)
    if not any((*grads, mask_grad)):
        return RingTraffic(forward / ranks, 0.0, deals + schedule.hops, 0)
    gathered = grads[0] * moved_q * q_row + moved_k * (grads[1] * k_row + grads[2] * v_row)
    backward = moved_q * o_row + rotated + home + gathered
    deals_back = bool(moved_q) + bool(gathered)
    return RingTraffic(forward / ranks, backward / ranks, deals + schedule.hops, deals_back + schedule.hops + home_hops)


# Who computes and sends what: from sizes alone, so that what runs and `ring_traffic` agree.

_Span = tuple[int, int]  # start and stop, counted over the whole sequence


class _Deal(NamedTuple):
    """Who holds which rows of a sequence, and which chunks of it every rank computes with: one `Ways` per chunk."""

    held: tuple[int, ...]
    chunks: tuple[Ways, ...]

    @classmethod
    def of(cls, held: tuple[int, ...], is_balanced: bool) -> _Deal:
        ranks = len(held)
        cuts = [0, *itertools.accumulate(shard_sizes(sum(held), 2 * ranks) if is_balanced else held)]
        even = range(0, 2 * ranks, 2)
        numbers = (even, [2 * ranks - 1 - n for n in even]) if is_balanced else (range(ranks),)
        ways = (Ways(held, tuple(cuts[n] for n in each), tuple(cuts[n + 1] for n in each)) for each in numbers)
        return cls(held, tuple(ways))

    def spans(self, rank: int) -> list[_Span]:
        return [(way.starts[rank], way.stops[rank]) for way in self.chunks]

    @property
    def moved(self) -> int:
        """Rows that change ranks."""
        return sum(exchanged(*way) for way in self.chunks)


class _Schedule(NamedTuple):
    """reach[rank]: that rank's queries see keys before this place. travels[rank][i]: over how many hops chunk i of that
    rank's keys is sent."""

    queries: _Deal
    keys: _Deal
    is_causal: bool
    reach: tuple[int, ...]
    travels: tuple[tuple[int, ...], ...]

    @property
    def hops(self) -> int:
        return max(itertools.chain.from_iterable(self.travels))

    def coming(self, rank: int, hop: int) -> list[int]:
        """Which chunks of keys reach `rank` with this hop, of those of rank - hop."""
        return [i for i, far in enumerate(self.travels[(rank - hop) % len(self.travels)]) if far >= hop]

    def seen(self, rank: int, origin: int) -> list[int]:
        """Which chunks of origin's keys some query of `rank` sees."""
        return [i for i, (a, b) in enumerate(self.keys.spans(origin)) if a < min(b, self.reach[rank])]

    def sees(self, query: _Span, key: _Span) -> bool:
        return query[0] < query[1] and key[0] < key[1] and (not self.is_causal or key[0] < query[1])

    @property
    def rotated_rows(self) -> int:
        """Rows of keys that all ranks send in a round."""
        return sum(
            (b - a) * far
            for rank, travels in enumerate(self.travels)
            for (a, b), far in zip(self.keys.spans(rank), travels)
        )

    @property
    def home_rows(self) -> int:
        """Rows of keys whose gradients all ranks send home."""
        reach, rows = sorted(self.reach), 0
        for rank in range(len(reach)):
            for a, b in self.keys.spans(rank):
                rows += (b - a) * (len(reach) - bisect.bisect_right(reach, a) - (a < self.reach[rank]))
        return rows

    def brings_home(self, hop: int) -> bool:
        """Whether any rank sends gradients home after this hop."""
        ranks = len(self.reach)
        return any(self.seen(rank, (rank - hop) % ranks) for rank in range(ranks))

    @property
    def home_hops(self) -> int:
        return sum(map(self.brings_home, range(1, self.hops + 1)))


@lru_cache(maxsize=1024)
def _schedule(queries: tuple[int, ...], keys: tuple[int, ...], is_causal: bool) -> _Schedule:
    ranks, is_balanced = len(queries), is_causal and sum(queries) == sum(keys)
    rows, columns = _Deal.of(queries, is_balanced), _Deal.of(keys, is_balanced)
    stops = [max((b for a, b in rows.spans(rank) if a < b), default=0) for rank in range(ranks)]
    reach = tuple(stop if is_causal else sum(keys) * (stop > 0) for stop in stops)
    travels = tuple(
        tuple(
            next((hop for hop in range(ranks - 1, 0, -1) if a < min(b, reach[(rank + hop) % ranks])), 0)
            for a, b in columns.spans(rank)
        )
        for rank in range(ranks)
    )
    return _Schedule(rows, columns, is_causal, reach, travels)


# The op.


def _ring_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    queries: list[int],
    keys: list[int],
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
    ranks: int,
    rank: int,
    group: str,
    *,
    where: str = "",
) -> Tensor:
    at = site("ring", ranks, rank, group, where)
    _check(q, k, v, mask, queries, keys, is_causal, enable_gqa, at)
    if ranks == 1:
        return F.scaled_dot_product_attention(q, k, v, mask, 0.0, is_causal, scale=scale, enable_gqa=enable_gqa)
    how = _How(
        _schedule(tuple(queries), tuple(keys), is_causal),
        q.shape[-1] ** -0.5 if scale is None else scale,
        q.shape[-3] // k.shape[-3] if enable_gqa else 1,
        _leading(q, k, v, enable_gqa),
    )
    if any(x is not None and wants_grad(x) for x in (q, k, v, mask)):
        return _Ring.apply(q, k, v, mask, how, at)
    return _run_ring(q, k, v, mask, how, at)[0]


# What comes, what is there, what goes, and one more: a longer ring takes no more memory at once.
_SHORT = 4


def short_ring(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, queries: list[int], keys: list[int], *rest: Any
) -> tuple:
    """Arguments of `ring_attention` for the first of a few ranks, on which it takes the memory that it takes in the whole ring.
    With a mask, which is as wide as all keys, the same ones."""
    *how, ranks, rank, group = rest
    if mask is not None or rank != 0 or ranks <= _SHORT:
        return q, k, v, mask, queries, keys, *rest
    return q, k, v, mask, queries[:_SHORT], keys[:_SHORT], *how, _SHORT, rank, group


_library.impl(
    _library.define(
        "ring_attention(Tensor q, Tensor k, Tensor v, Tensor? mask, int[] queries, int[] keys, bool is_causal, "
        "float? scale, bool enable_gqa, int ranks, int rank, str group, *, str where='') -> Tensor"
    ),
    _ring_attention,
    "CompositeImplicitAutograd",
)


class _How(NamedTuple):
    """repeats: query heads per head of keys. leading: the batch and head dims of the output."""

    schedule: _Schedule
    scale: float
    repeats: int
    leading: tuple[int, ...]

    @property
    def flat(self) -> tuple[int, int]:
        """`leading` as the two dims that kernels take: batch and heads."""
        return math.prod(self.leading[:-1]), self.leading[-1] if self.leading else 1


class _Ring(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, how: _How, at: At) -> Tensor:
        out, saved = _run_ring(q, k, v, mask, how, at)
        ctx.save_for_backward(mask, *itertools.chain.from_iterable(saved))
        ctx.how, ctx.at, ctx.chunks = how, at, len(saved[0])
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple:
        # torch's once_differentiable looks at `grad` alone, but the gradients depend on q, k, v and the mask too.
        if torch.is_grad_enabled():
            raise DspError(
                asked="cannot make gradients of ring attention that can be differentiated (create_graph=True)",
                found="its backward is exact, but has no backward of its own",
                remedy="where gradients of gradients are needed, make a plan without ring attention",
            )
        mask, *flat = ctx.saved_tensors
        saved = [flat[i : i + ctx.chunks] for i in range(0, len(flat), ctx.chunks)]
        return *_run_ring_back(grad, mask, saved, ctx.needs_input_grad[:4], ctx.how, ctx.at.backward()), None, None


def _run_ring(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, how: _How, at: At
) -> tuple[Tensor, tuple[list[Tensor], ...]]:
    """The output, and per chunk what its backward wants: queries, keys, values, output, log-sum-exp."""
    rows, columns = how.schedule.queries, how.schedule.keys
    q_chunks, k_chunks, v_chunks = _deal([q, k, v], [rows, columns, columns], at)
    spans, asking = rows.spans(at.rank), [_four_dims(chunk, how) for chunk in q_chunks]
    mask, asking = _steadied(mask, asking, how)
    merged = [_Merged.empty(x, v.shape[-1]) for x in asking]
    for origin, here in _round(k_chunks, v_chunks, how.schedule, at):
        for i, (key, value) in here.items():
            span = how.schedule.keys.spans(origin)[i]
            seeing = [c for c, own in enumerate(spans) if how.schedule.sees(own, span)]
            if seeing:
                key, value = _four_dims(key, how, how.repeats), _four_dims(value, how, how.repeats)
            for c in seeing:
                bias, triangle = _bias(mask, spans[c], span, asking[c], how)
                merged[c] = merged[c].with_block(*_attend(asking[c], key, value, bias, triangle, how.scale))
    outs = [one.out.to(q.dtype).reshape(*how.leading, *one.out.shape[-2:]) for one in merged]
    (out,) = _bring_home([outs], [rows], at)
    return out, (q_chunks, k_chunks, v_chunks, outs, [_finite(one.lse) for one in merged])


def _run_ring_back(
    grad: Tensor, mask: Tensor | None, saved: list[list[Tensor]], wanted: Sequence[bool], how: _How, at: At
) -> tuple[Tensor | None, ...]:
    q_chunks, k_chunks, v_chunks, outs, lse = saved
    schedule, wide = how.schedule, _accumulator(grad.dtype)
    spans = schedule.queries.spans(at.rank)
    (grads,) = _deal([grad], [schedule.queries], at)
    asking, outs, grads = ([_four_dims(x, how) for x in xs] for xs in (q_chunks, outs, grads))
    mask_grad = None if mask is None or not wanted[3] else torch.zeros_like(_mask_four_dims(mask, how), dtype=wide)
    steady, asking = _steadied(mask, asking, how)
    q_grads = [torch.zeros_like(x, dtype=wide) for x in asking]
    # Of every chunk of keys that was its own, the gradients of k and v as far as they have come home.
    own = [[torch.zeros_like(x, dtype=wide) for x in pair] for pair in zip(k_chunks, v_chunks)]
    arriving: Callable[[], None] = _nothing
    for hop, (origin, here) in enumerate(_round(k_chunks, v_chunks, schedule, at)):
        found: list[list[Tensor]] = []  # for every chunk that is seen here: the gradients of k and v
        for i in schedule.seen(at.rank, origin):
            span, shapes = schedule.keys.spans(origin)[i], [x.shape for x in here[i]]
            key, value = (_four_dims(x, how, how.repeats) for x in here[i])
            sums = [torch.zeros_like(x, dtype=wide) for x in (key, value)]
            for c in (c for c, query in enumerate(spans) if schedule.sees(query, span)):
                bias, triangle = _bias(steady, spans[c], span, asking[c], how)
                block = (grads[c], asking[c], key, value, outs[c], lse[c], bias, triangle, how.scale)
                if mask_grad is None:
                    of_q, *of_kv = _attend_backward(*block)
                else:
                    of_q, *of_kv, of_scores = _plain_backward(*block)
                    part = mask_grad if mask_grad.shape[-1] == 1 else mask_grad[..., span[0] : span[1]]
                    part += of_scores.sum_to_size(part.shape)
                q_grads[c] += of_q
                for total, part in zip(sums, of_kv):
                    total += part
            found.append([_undo_four_dims(x, shape, how, how.repeats) for x, shape in zip(sums, shapes)])
        arriving()
        arriving = _nothing
        if hop == 0:
            for i, pair in zip(schedule.seen(at.rank, origin), found):
                own[i] = pair
        elif any(wanted[1:3]) and schedule.brings_home(hop):
            arriving = _send_home(found, own, hop, wanted[1:3], grad.dtype, schedule, at)
    arriving()
    of_q = [_undo_four_dims(x, chunk.shape, how) for x, chunk in zip(q_grads, q_chunks)]
    of_k, of_v = ([pair[n] for pair in own] for n in (0, 1))
    # Gathered in the tensors' own dtype: each element is one rank's, nothing is added on the way.
    deals = [(of_q, schedule.queries), (of_k, schedule.keys), (of_v, schedule.keys)]
    kept = [([x.to(grad.dtype) for x in xs], deal) for (xs, deal), want in zip(deals, wanted) if want]
    home = iter(_bring_home([xs for xs, _ in kept], [deal for _, deal in kept], at) if kept else [])
    of_mask = None
    if mask is not None and mask_grad is not None:
        of_mask = _undo_mask_four_dims(mask_grad, mask.shape, how).to(mask.dtype)
    return *(next(home) if want else None for want in wanted[:3]), of_mask


# What travels.


def _round(
    k_chunks: list[Tensor], v_chunks: list[Tensor], schedule: _Schedule, at: At
) -> Iterator[tuple[int, dict[int, tuple[Tensor, Tensor]]]]:
    """Hop by hop: whose keys are here, and its chunks of keys and values by number. The next are under way meanwhile."""
    here = dict(enumerate(zip(k_chunks, v_chunks)))
    templates = k_chunks[0], v_chunks[0]
    for hop in range(schedule.hops + 1):
        origin = (at.rank - hop) % at.ranks
        arriving: Callable[[], list[Tensor]] = list
        if hop < schedule.hops:
            going = [x for i in schedule.coming((at.rank + 1) % at.ranks, hop + 1) for x in here[i]]
            coming = schedule.coming(at.rank, hop + 1)
            spans = schedule.keys.spans((origin - 1) % at.ranks)
            shapes = [resized(x.shape, -2, spans[i][1] - spans[i][0]) for i in coming for x in templates]
            arriving = _send(going, shapes, (at.rank + 1) % at.ranks, (at.rank - 1) % at.ranks, templates[0], at)
        yield origin, here
        if hop < schedule.hops:
            received = arriving()
            here = {i: (received[2 * n], received[2 * n + 1]) for n, i in enumerate(coming)}


def _send_home(
    found: list[list[Tensor]],
    own: list[list[Tensor]],
    hop: int,
    wanted: Sequence[bool],
    dtype: torch.dtype,
    schedule: _Schedule,
    at: At,
) -> Callable[[], None]:
    """Sends rank - hop the gradients of its keys and values. What is returned waits for ours and adds them."""
    source = (at.rank + hop) % at.ranks
    totals = [x for i in schedule.seen(source, at.rank) for x, want in zip(own[i], wanted) if want]
    parts = [x.to(dtype) for pair in found for x, want in zip(pair, wanted) if want]
    like = own[0][0].new_empty(0, dtype=dtype)
    arriving = _send(parts, [list(x.shape) for x in totals], (at.rank - hop) % at.ranks, source, like, at)

    def add() -> None:
        for total, part in zip(totals, arriving()):
            total += part

    return add


def _send(
    parts: list[Tensor], shapes: list[list[int]], to: int, source: int, like: Tensor, at: At
) -> Callable[[], list[Tensor]]:
    """Sends tensors to one rank in one collective; the result waits for those of the given shapes from another."""
    sizes = [math.prod(shape) for shape in shapes]
    flat = [part.reshape(-1) for part in parts] or [like.new_empty(0)]
    wire = torch.cat(flat) if len(flat) > 1 else flat[0].contiguous()
    sends, receives = [0] * at.ranks, [0] * at.ranks
    sends[to], receives[source] = wire.numel(), sum(sizes)
    issued = issue(c10d.all_to_all_single, at, wire, receives, sends, at.group)

    def received() -> list[Tensor]:
        flat = wait(issued, at)
        return [part.view(shape) for part, shape in zip(flat.split(sizes), shapes)] if sizes else []

    return received


def _nothing() -> None:
    """Nothing is under way."""


def _deal(xs: list[Tensor], deals: list[_Deal], at: At) -> list[list[Tensor]]:
    """Every tensor's chunks for this rank, fetched in one collective; rows are dim -2."""
    sends: list[tuple[int, Tensor]] = []
    receives: list[tuple[int, list[int]]] = []
    for x, deal in zip(xs, deals):
        for way in deal.chunks:
            sends += [(to, x.narrow(-2, a, b - a)) for to, a, b in way.from_rank(at.rank) if to != at.rank]
            receives += [(r, resized(x.shape, -2, b - a)) for r, a, b in way.of(at.rank) if r != at.rank]
    received = iter(exchange(xs[0], sends, receives, at, any(deal.moved for deal in deals)))
    return [
        [
            _joined([x.narrow(-2, a, b - a) if r == at.rank else next(received) for r, a, b in way.of(at.rank)], x)
            for way in deal.chunks
        ]
        for x, deal in zip(xs, deals)
    ]


def _bring_home(xs: list[list[Tensor]], deals: list[_Deal], at: At) -> list[Tensor]:
    """The inverse of `_deal`: of every tensor the rows that this rank holds."""
    sends: list[tuple[int, Tensor]] = []
    receives: list[tuple[int, list[int]]] = []
    kept: list[list[Tensor]] = []
    for chunks, deal in zip(xs, deals):
        for chunk, way in zip(chunks, deal.chunks):
            own = way.of(at.rank)
            parts = chunk.split([b - a for _, a, b in own], -2) if own else ()
            sends += [(r, part) for (r, _, _), part in zip(own, parts) if r != at.rank]
            kept.append([part for (r, _, _), part in zip(own, parts) if r == at.rank])
            receives += [(to, resized(chunk.shape, -2, b - a)) for to, a, b in way.from_rank(at.rank) if to != at.rank]
    received = iter(exchange(xs[0][0], sends, receives, at, any(deal.moved for deal in deals)))
    staying, home = iter(kept), []
    for chunks, deal in zip(xs, deals):
        rows: list[tuple[int, Tensor]] = []
        for way in deal.chunks:
            mine = iter(next(staying))
            rows += [(a, next(mine if to == at.rank else received)) for to, a, _ in way.from_rank(at.rank)]
        home.append(_joined([part for _, part in sorted(rows, key=lambda row: row[0])], chunks[0]))
    return home


def _joined(parts: list[Tensor], like: Tensor) -> Tensor:
    if not parts:
        return like.new_empty(resized(like.shape, -2, 0))
    return torch.cat(parts, -2) if len(parts) > 1 else parts[0]


# Between the user's shapes and those of kernels: [batch, heads, places, dim].


def _leading(q: Tensor, k: Tensor, v: Tensor, enable_gqa: bool) -> tuple[int, ...]:
    shapes = [x.shape[:-3] if enable_gqa else x.shape[:-2] for x in (q, k, v)]
    return (*torch.broadcast_shapes(*shapes), *(q.shape[-3:-2] if enable_gqa else ()))


def _four_dims(x: Tensor, how: _How, repeats: int = 1) -> Tensor:
    if repeats > 1:
        x = x.repeat_interleave(repeats, -3)
    x = x.expand(*how.leading, *x.shape[-2:]).reshape(*how.flat, *x.shape[-2:])
    return x if x.stride(-1) == 1 else x.contiguous()


def _undo_four_dims(x: Tensor, shape: Sequence[int], how: _How, repeats: int = 1) -> Tensor:
    """Adds up what `_four_dims` repeated."""
    x = x.reshape(*how.leading, *x.shape[-2:])
    if repeats > 1:
        x = x.unflatten(-3, (-1, repeats)).sum(-3)
    return x.sum_to_size(shape)


def _mask_four_dims(mask: Tensor, how: _How) -> Tensor:
    """The mask as [batch or 1, heads or 1, queries or 1, keys or 1]."""
    mask = mask.reshape((1,) * (len(how.leading) + 2 - mask.ndim) + tuple(mask.shape))
    *batch, heads = mask.shape[:-2] or (1,)
    if any(n != 1 for n in batch):
        mask = mask.expand(*how.leading[:-1], *mask.shape[-3:])
    return mask.reshape(-1 if mask.numel() else math.prod(mask.shape[:-3]), heads, *mask.shape[-2:])


def _undo_mask_four_dims(x: Tensor, shape: Sequence[int], how: _How) -> Tensor:
    batch = how.leading[:-1] if x.shape[0] != 1 else (1,) * len(how.leading[:-1])
    return x.reshape(*batch, *x.shape[1:]).sum_to_size(shape)


def _steadied(mask: Tensor | None, asking: list[Tensor], how: _How) -> tuple[Tensor | None, list[Tensor]]:
    """Mask and queries with which log-sum-exp says enough where a finite mask hides all keys of a row.

    Beside -1e9 a sum of weights is lost to rounding, and blocks could not be merged by it. Softmax is the same with the
    row's largest number taken away. Beside such numbers the scores were lost too, the row's result is the mean of the
    values: so it must be here, where its queries are made zero. (The gradients of such a row are no softmax's in torch's
    kernels.)
    """
    if mask is None:
        return None, asking
    mask = _mask_four_dims(mask, how)
    if mask.dtype == torch.bool or 0 in mask.shape:
        return mask, asking
    eps = torch.finfo(_accumulator(asking[0].dtype)).eps
    top = mask.detach().amax(-1, keepdim=True)
    low = (top < -(eps**-0.5)) & (top > -_INF)
    lost = low & (top < -1 / eps)
    return mask - torch.where(low, top, 0), [x.masked_fill(lost, 0) for x in asking]


def _bias(mask: Tensor | None, query: _Span, key: _Span, q: Tensor, how: _How) -> tuple[Tensor | None, bool]:
    """What is added to the scores of a block, and whether it is the lower triangle of a square instead."""
    shape = query[1] - query[0], key[1] - key[0]
    if mask is not None:
        block = mask if mask.shape[-1] == 1 else mask[..., key[0] : key[1]]
        block = block.expand(*block.shape[:2], *shape)
        if block.dtype == torch.bool:
            return _hiding(block, q), False
        return block if block.dtype == _accumulator(q.dtype) else block.to(q.dtype), False
    if not how.schedule.is_causal or key[1] <= query[0] + 1:
        return None, False
    if query == key:
        return None, True
    seen = torch.arange(*query, device=q.device)[:, None] >= torch.arange(*key, device=q.device)
    return _hiding(seen[None, None], q), False


def _hiding(seen: Tensor, q: Tensor) -> Tensor:
    return torch.zeros(seen.shape, dtype=q.dtype, device=q.device).masked_fill(~seen, -_INF)


# One block's attention, and what is known of several.


class _Merged(NamedTuple):
    """out [b h s e]: attention to the keys so far, in at least float32; lse [b h s]: the log of the sum of their weights."""

    out: Tensor
    lse: Tensor

    @classmethod
    def empty(cls, q: Tensor, dim: int) -> _Merged:
        out = q.new_zeros((*q.shape[:-1], dim), dtype=_accumulator(q.dtype))
        return cls(out, out.new_full(q.shape[:-1], -_INF))

    def with_block(self, out: Tensor, lse: Tensor) -> _Merged:
        both = torch.logaddexp(self.lse, lse)
        before, now = ((x - _finite(both)).exp().unsqueeze(-1) for x in (self.lse, lse))
        return _Merged(self.out * before + out * now, both)


def _accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _finite(lse: Tensor) -> Tensor:
    """Log-sum-exp with 0 in rows that saw nothing: their weights come out as exp(-inf - 0), which is the 0 they are."""
    return lse.masked_fill(lse == -_INF, 0)


def _attend(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, triangle: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """A block's output [b h s e] and its log-sum-exp [b h s]: 0 and -inf in rows that see none of its keys."""
    kernel = _kernel(q, k, v, bias, triangle)
    if kernel is None:
        return _plain(q, k, v, bias, triangle, scale)
    out, lse = kernel.forward(q, k, v, bias, triangle, scale)
    if bias is not None:  # kernels differ in what they say of a row that sees nothing
        hidden = (bias == -_INF).all(-1)
        out, lse = out.masked_fill(hidden.unsqueeze(-1), 0), lse.masked_fill(hidden, -_INF)
    return out, lse


def _attend_backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    """A block's part in the gradients of q, k and v; the output and log-sum-exp in `rest` are those over all keys."""
    out, lse, bias, triangle, scale = rest
    kernel = _kernel(q, k, v, bias, triangle)
    if kernel is None:
        return _plain_backward(grad, q, k, v, *rest)[:3]
    return kernel.backward(grad, q, k, v, out, lse, bias, triangle, scale)


def _plain(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, triangle: bool, scale: float) -> tuple[Tensor, Tensor]:
    scores, wide = _scores(q, k, bias, triangle, scale), _accumulator(q.dtype)
    lse = scores.logsumexp(-1)
    return (scores - _finite(lse).unsqueeze(-1)).exp() @ v.to(wide), lse


def _plain_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    bias: Tensor | None,
    triangle: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of q, k, v, and of the scores."""
    weights = (_scores(q, k, bias, triangle, scale) - lse.unsqueeze(-1)).exp()
    grad, q, k, v, out = (x.to(weights.dtype) for x in (grad, q, k, v, out))
    of_scores = weights * (grad @ v.mT - (grad * out).sum(-1, keepdim=True))
    return of_scores @ k * scale, of_scores.mT @ q * scale, weights.mT @ grad, of_scores


def _scores(q: Tensor, k: Tensor, bias: Tensor | None, triangle: bool, scale: float) -> Tensor:
    wide = _accumulator(q.dtype)
    scores = (q.to(wide) * scale) @ k.to(wide).mT
    if triangle:
        seen = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()
        return scores.masked_fill(~seen, -_INF)
    return scores if bias is None else scores + bias


class _Kernel(NamedTuple):
    forward: Callable[..., tuple[Tensor, Tensor]]
    backward: Callable[..., tuple[Tensor, Tensor, Tensor]]


def _kernel(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, triangle: bool) -> _Kernel | None:
    """The kernel that takes a block, or None."""
    if q.shape[-1] != v.shape[-1] or 0 in q.shape or 0 in k.shape:
        return None
    if q.device.type == "cpu":
        return _CPU
    if q.device.type != "cuda":
        return None
    cuda = torch.backends.cuda
    params = cuda.SDPAParams(q, k, v, bias, 0.0, triangle, False)
    if bias is None and q.shape[-1] % 8 == 0 and cuda.can_use_flash_attention(params):
        return _FLASH
    return _EFFICIENT if cuda.can_use_efficient_attention(params) else None


def _cpu(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, triangle: bool, scale: float) -> tuple[Tensor, Tensor]:
    op = _aten._scaled_dot_product_flash_attention_for_cpu
    return op(q, k, v, 0.0, triangle, attn_mask=bias, scale=scale)


def _cpu_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, bias: Any, triangle: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    op = _aten._scaled_dot_product_flash_attention_for_cpu_backward
    return op(grad, q, k, v, out, lse, 0.0, triangle, attn_mask=bias, scale=scale)


def _flash(q: Tensor, k: Tensor, v: Tensor, bias: None, triangle: bool, scale: float) -> tuple[Tensor, Tensor]:
    return _aten._scaled_dot_product_flash_attention(q, k, v, 0.0, triangle, False, scale=scale)[:2]


def _flash_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, bias: None, triangle: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    # The state of a generator that nothing is drawn from: what the forward gives without dropout.
    seed, offset = (torch.empty(n, dtype=torch.uint64, device=q.device) for n in ((2,), ()))
    sizes = (None, None, q.shape[-2], k.shape[-2])
    op = _aten._scaled_dot_product_flash_attention_backward
    return op(grad, q, k, v, out, lse, *sizes, 0.0, triangle, seed, offset, scale=scale)


def _efficient(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, triangle: bool, scale: float
) -> tuple[Tensor, Tensor]:
    op = _aten._scaled_dot_product_efficient_attention
    out, lse, _, _ = op(q, k, v, _aligned(bias, q), True, 0.0, triangle, scale=scale)
    return out, lse[..., : q.shape[-2]]  # it comes padded


def _efficient_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, bias: Any, triangle: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    lse = F.pad(lse, (0, -lse.shape[-1] % 32), value=_INF)
    seed, offset = (torch.empty((), dtype=torch.int64, device=q.device) for _ in range(2))
    op = _aten._scaled_dot_product_efficient_attention_backward
    mask = [True, True, True, False]
    return op(grad, q, k, v, _aligned(bias, q), out, lse, seed, offset, 0.0, mask, triangle, scale=scale)[:3]


def _aligned(bias: Tensor | None, q: Tensor) -> Tensor | None:
    """The bias with rows that start at multiples of 16 elements, for every batch and head, as the kernel reads it."""
    if bias is None:
        return None
    keys = bias.shape[-1]
    aligned = q.new_empty((*bias.shape[:-1], keys + -keys % 16))[..., :keys].copy_(bias)
    return aligned.expand(*q.shape[:2], -1, -1)


_CPU, _FLASH, _EFFICIENT = (
    _Kernel(_cpu, _cpu_backward),
    _Kernel(_flash, _flash_backward),
    _Kernel(_efficient, _efficient_backward),
)


# Checks.


def _check_lengths(queries: Sequence[int], keys: Sequence[int]) -> None:
    if not queries or len(queries) != len(keys) or min(*queries, *keys) < 0:
        raise LayoutError(
            f"ring: {list(queries)} queries and {list(keys)} keys are not one length for each of the ranks"
        )


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    queries: list[int],
    keys: list[int],
    is_causal: bool,
    enable_gqa: bool,
    at: At,
) -> None:
    _check_lengths(queries, keys)
    shapes = [list(x.shape) for x in (q, k, v)]
    shown = f"ring: q, k, v of shapes {', '.join(map(str, shapes))}"
    if len(queries) != at.ranks:
        raise LayoutError(f"ring: {len(queries)} lengths for {at.ranks} ranks")
    if min(x.ndim for x in (q, k, v)) < 2 or q.shape[-1] != k.shape[-1]:
        raise LayoutError(f"{shown} are not [... s d], [... t d], [... t e]")
    if [x.shape[-2] for x in (q, k, v)] != [queries[at.rank], keys[at.rank], keys[at.rank]]:
        raise LayoutError(
            f"{shown} where rank {at.rank} of {at.ranks} should hold {queries[at.rank]} queries and {keys[at.rank]} keys"
        )
    if q.dtype not in _DTYPES or {k.dtype, v.dtype} != {q.dtype}:
        raise LayoutError(
            f"{shown}: dtypes {q.dtype}, {k.dtype}, {v.dtype}; all three must be one floating point dtype"
        )
    if enable_gqa and (
        min(x.ndim for x in (q, k, v)) < 3
        or k.shape[-3] != v.shape[-3]
        or k.shape[-3] == 0
        or q.shape[-3] % k.shape[-3]
    ):
        raise LayoutError(f"{shown}: with enable_gqa the heads of q must be a multiple of those of k and v")
    try:
        leading = _leading(q, k, v, enable_gqa)
    except RuntimeError:
        raise LayoutError(f"{shown}: their leading dims do not broadcast") from None
    if mask is None:
        return
    if is_causal:
        raise LayoutError("ring: both a mask and is_causal; put the causal part into the mask, or leave the mask away")
    full = (*leading, queries[at.rank], sum(keys))
    fits = 2 <= mask.ndim <= len(full) and all(n in (1, m) for n, m in zip(reversed(mask.shape), reversed(full)))
    if not fits or not (mask.dtype == torch.bool or mask.is_floating_point()):
        raise LayoutError(
            f"ring: a mask of shape {list(mask.shape)} and {mask.dtype} does not broadcast to this rank's queries and all "
            f"keys, {list(full)}, as bool or floating point"
        )
