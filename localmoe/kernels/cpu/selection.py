"""Sparse attention on the cpu: which cached positions an indexer chooses, and attention over those alone.

The contracts are `ops.Ops.select` and `ops.Ops.attention` with `selected`. Where the context has no more positions than
may be chosen nothing is chosen: dense attention is the same. Chosen rows are brought together in a thread's own room,
which `attention_decode` reads like a cache.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from localmoe.formats import F16, F32, FORMATS, Format
from localmoe.kernels.cache_blocks import TAKEN
from localmoe.kernels.cpu import attention_decode, rotation
from localmoe.kernels.cpu.arguments import Argument, row_count, slots, step_position
from localmoe.kernels.cpu.attention_decode import AHEAD, CHUNK, HEADS, SCORES_STRIDE
from localmoe.kernels.cpu.build import kernel
from localmoe.kernels.cpu.cache_rows import row_nbytes
from localmoe.kernels.program import CacheLayer, Op, Tensor, cache_row

if TYPE_CHECKING:
    from localmoe.kernels.cpu.lower import Lowering

TOKENS = 16  # whose scores of a whole context stand in memory at a time
_LINE = 64


def _index(v: Any, format: Format) -> Any:
    from localmoe.kernels.cpu import vector_rows

    slot, rows, position, nbytes = slots(v), row_count(v), step_position(v), row_nbytes(v, format)
    one, span = vector_rows.products(v.isa, 1, format, 4), vector_rows.span(v.isa, format)
    stack, quantised = v.stack(4 * v.lanes), format.elements > 1
    turn = rotation.row_turner(v)

    def run(a, thread, threads):
        heads, width, padded, begin = slot(a, 3), slot(a, 4), slot(a, 10), slot(a, 12)
        first, end = position(a), min(rows(a), begin + slot(a, 13))
        stride, spans, query = nbytes(padded), padded // span, slot(a, 16) + thread * slot(a, 17)
        products, zero = stack(), v.zero(v.f32)
        pieces = (first + end - 1) // CHUNK + 1
        units = max(end - begin, 0) * pieces
        for unit in range(units * thread // threads, units * (thread + 1) // threads):
            t, start = begin + unit // pieces, unit % pieces * CHUNK
            count = min(first + t + 1 - start, CHUNK)
            for h in range(heads if count > 0 else 0):
                source = slot(a, 2) + t * slot(a, 5) + h * slot(a, 6)
                for i in range(padded):
                    x = v.load(v.float32, source + 4 * i) if i < width else np.float32(0)
                    v.store(query + 4 * (h * padded + i), x)
            if quantised and count > 0:
                turn(query, heads * padded, TAKEN)
            weights, target = slot(a, 7) + t * slot(a, 8), slot(a, 14) + (t - begin) * slot(a, 15) + 4 * start
            for s in range(0, count, v.lanes):
                row, total = slot(a, 9) + (start + s) * stride, zero
                for h in range(heads):
                    one(query + 4 * h * padded, 0, row, stride, count - 1 - s, spans, products, AHEAD)
                    weight = v.splat(v.f32, v.load(v.float32, weights + 4 * h))
                    total = v.fma(v.maximum(v.load(v.f32, products), zero), weight, total)
                v.store(target + 4 * s, total)

    return run


@kernel("select_scores_f16", 3)
def select_scores_f16(v: Any) -> Any:
    """Arguments: control, rows, q, heads, width, token and head stride of q, weights, their token stride, keys, padded
    width, context, first token, tokens, scores, their bytes a token, scratch (queries), its bytes a thread."""
    return _index(v, F16)


@kernel("select_scores_f32", 3)
def select_scores_f32(v: Any) -> Any:
    """As select_scores_f16."""
    return _index(v, F32)


@kernel("select_scores_q8_0", 3)
def select_scores_q8_0(v: Any) -> Any:
    """As select_scores_f16."""
    return _index(v, FORMATS["Q8_0"])


@kernel("select_scores_q4_0", 3)
def select_scores_q4_0(v: Any) -> Any:
    """As select_scores_f16."""
    return _index(v, FORMATS["Q4_0"])


@kernel("select_best", 3)
def select_best(v: Any) -> Any:
    """Arguments: control, rows, scores, their bytes a token, first token, tokens, ids, how many are chosen."""
    slot, rows, position = slots(v), row_count(v), step_position(v)

    def ordered(scores, s):
        """A float's bits as an integer that is larger where the float is; both zeros are one."""
        bits = v.load(v.int32, scores + 4 * s)
        return np.int64(0) if bits == -2147483648 else np.int64(bits) ^ ((np.int64(bits) >> 31) & 0x7FFFFFFF)

    number = v.function(ordered)

    def run(a, thread, threads):
        begin, chosen = slot(a, 4), slot(a, 7)
        many = max(min(rows(a), begin + slot(a, 5)) - begin, 0)
        for t in range(begin + many * thread // threads, begin + many * (thread + 1) // threads):
            scores, ids, count = slot(a, 2) + (t - begin) * slot(a, 3), slot(a, 6) + 4 * t * chosen, position(a) + t + 1
            low, high = np.int64(-(1 << 31)), np.int64((1 << 31) - 1)  # at least `chosen` are not below `low`
            while count > chosen and low < high:
                middle = low + (high - low + 1) // 2
                above = 0
                for s in range(count):
                    above += 1 if number(scores, s) >= middle else 0
                if above >= chosen:
                    low = middle
                else:
                    high = middle - 1
            ties, kept = chosen, 0
            for s in range(count):
                ties -= 1 if number(scores, s) > low else 0
            for s in range(count):
                x = number(scores, s)
                if x > low or (x == low and ties > 0) or count <= chosen:
                    ties -= 1 if x == low else 0
                    v.store(ids + 4 * kept, v.convert(v.int32, s))
                    kept += 1
            for i in range(kept, chosen):
                v.store(ids + 4 * i, v.convert(v.int32, -1))

    return run


def _attend(v: Any, format: Format) -> Any:
    slot, rows, position, nbytes = slots(v), row_count(v), step_position(v), row_nbytes(v, format)
    scale_queries, score = attention_decode.query_scaler(v, format), attention_decode.key_scorer(v, format)
    soften, gather = attention_decode.softener(v), attention_decode.gatherer(v, format)
    merge, bring = attention_decode.merger(v, format), _bring(v)

    def run(a, thread, threads):
        heads, kv_heads, first, chosen = slot(a, 3), slot(a, 7), position(a), slot(a, 19)
        key_padded, value_padded = slot(a, 9), slot(a, 18)
        partial = HEADS * (4 * value_padded + 8)
        query = slot(a, 16) + thread * slot(a, 17)
        scores = query + HEADS * 4 * key_padded
        partials = scores + HEADS * SCORES_STRIDE
        spare = partials + (chosen + CHUNK - 1) // CHUNK * partial
        room = spare + slot(a, 20)
        key_nbytes, value_nbytes = nbytes(key_padded), nbytes(slot(a, 11))
        group = heads // kv_heads
        parts = (group + HEADS - 1) // HEADS
        units = rows(a) * kv_heads * parts
        for unit in range(units * thread // threads, units * (thread + 1) // threads):
            t, kv, begin = unit // (kv_heads * parts), unit // parts % kv_heads, unit % parts * HEADS
            head, many = kv * group + begin, min(HEADS, group - begin)
            scale_queries(a, slot(a, 2) + t * slot(a, 23), first + t, head, many, query)
            left, count = min(first + t + 1, chosen), 0
            while left > 0:
                ids, here, into = slot(a, 13) + 4 * (t * chosen + count * CHUNK), min(left, CHUNK), count * partial
                bring(slot(a, 8) + kv * slot(a, 12) * key_nbytes, ids, here, key_nbytes, room)
                score(query, key_padded, room, 0, here, many, scores)
                peaks = partials + into + HEADS * 4 * value_padded
                soften(scores, 0, here, many, v.load(v.float32, a + 192), peaks)
                if slot(a, 10) != slot(a, 8):
                    bring(slot(a, 10) + kv * slot(a, 12) * value_nbytes, ids, here, value_nbytes, room)
                gather(scores, room, slot(a, 11), here, many, value_padded, partials + into)
                left, count = left - here, count + 1
            out = slot(a, 5) + 4 * (t * heads + head) * slot(a, 6)
            merge(partials, partial, count, many, value_padded, slot(a, 6), out, spare, 0)

    return run


def _bring(v: Any) -> Any:
    """Rows of `nbytes`, an even number, from a kv-head's cache to `room`, one behind the other."""

    def bring(cache, ids, count, nbytes, room):
        for row in range(count):
            source, target = cache + v.load(v.int32, ids + 4 * row) * nbytes, room + row * nbytes
            for i in range(0, nbytes, 2):
                v.store(target + i, v.load(v.int16, source + i))

    return v.function(bring)


@kernel("attention_selected_f16", 3)
def attention_selected_f16(v: Any) -> Any:
    """Arguments: as attention_decode_f16, but ids for a window, and from the counters on: how many are chosen, bytes of
    a merge's room, 0, head and token stride of q, softcap."""
    return _attend(v, F16)


@kernel("attention_selected_f32", 3)
def attention_selected_f32(v: Any) -> Any:
    """As attention_selected_f16."""
    return _attend(v, F32)


@kernel("attention_selected_q8_0", 3)
def attention_selected_q8_0(v: Any) -> Any:
    """As attention_selected_f16."""
    return _attend(v, FORMATS["Q8_0"])


@kernel("attention_selected_q4_0", 3)
def attention_selected_q4_0(v: Any) -> Any:
    """As attention_selected_f16."""
    return _attend(v, FORMATS["Q4_0"])


def lower_select(lowering: Lowering, op: Op) -> None:
    (q, weights), (ids,) = op.inputs, op.outputs
    layer: CacheLayer = op.attributes["cache"]
    context, format = lowering.device.context, lowering.device.kv
    if not chooses(lowering, ids):
        return
    keys, _ = lowering.device.cache(layer)
    padded, heads = cache_row(layer.key_width, format), q.shape[1]
    scores_nbytes, query_nbytes = 4 * -(-context // CHUNK) * CHUNK, 4 * heads * padded
    scores = lowering.temporary(min(TOKENS, q.shape[0]) * scores_nbytes)
    room = (lowering.temporary(query_nbytes * lowering.threads), query_nbytes)
    queries = (lowering.at(q), heads, q.shape[2], 4 * q.strides[0], 4 * q.strides[1])
    cached = (lowering.at(weights), 4 * weights.strides[0], keys.ctypes.data, padded, context)
    name = f"select_scores_{format.name.lower()}"
    for first in range(0, q.shape[0], TOKENS):
        part = (first, TOKENS)
        lowering.emit(name, q, *queries, *cached, *part, scores, scores_nbytes, *room)
        lowering.emit("select_best", q, scores, scores_nbytes, *part, lowering.at(ids), ids.shape[1])


def chooses(lowering: Lowering, ids: Tensor) -> bool:
    """Whether a context may hold more positions than are chosen."""
    return lowering.device.context > ids.shape[1]


def lower_selected(
    lowering: Lowering, op: Op, shape: tuple[Argument, ...], widths: tuple[int, int, int], scaled: tuple[Argument, ...]
) -> None:
    """Attention over ids: `shape` as `attention.lower_attention` has it up to the context, padded widths of a key, of a
    row of values and of a value, scale and query factors."""
    q, ids = op.inputs
    format, chosen = lowering.device.kv, ids.shape[1]
    key_padded, value_row, value_padded = widths
    pieces = -(-chosen // CHUNK)
    merging = 4 * (max(value_padded, 16) + pieces)
    rows = CHUNK * max(format.row_nbytes(key_padded), format.row_nbytes(value_row))
    sums = HEADS * (4 * key_padded + SCORES_STRIDE) + pieces * attention_decode.partial_nbytes(value_padded)
    nbytes = -(-(sums + merging + rows) // _LINE) * _LINE
    scratch = (lowering.temporary(nbytes * lowering.threads), nbytes, value_padded)
    strides = (4 * q.strides[1], 4 * q.strides[0])
    how = (chosen, merging, 0, *strides, float(op.attributes["softcap"]))
    name = f"attention_selected_{format.name.lower()}"
    lowering.emit(name, q, *shape, lowering.at(ids), *scaled, *scratch, *how)
