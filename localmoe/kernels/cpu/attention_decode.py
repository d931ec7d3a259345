"""Attention of one token on the cpu, split over heads and positions (flash-decoding: Dao et al. 2023).

The cache is cut at multiples of CHUNK positions. Threads take (chunk, heads of one kv-head) as they come and leave
weighted sums of values; who brings the last chunk of some heads adds their chunks up, in the order of positions.
Neither depends on the number of threads. A row of the cache is read once for up to HEADS heads.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from localmoe.formats import F16, F32, FORMATS, Format
from localmoe.kernels.cache_blocks import TAKEN
from localmoe.kernels.cpu import rotation
from localmoe.kernels.cpu.arguments import first_visible, slots, soft_capped, step_position
from localmoe.kernels.cpu.build import kernel
from localmoe.kernels.cpu.cache_rows import row_nbytes
from localmoe.kernels.program import cache_row

CHUNK = 512  # positions; 256 decodes 1 to 6 % slower, 128 3 to 8 %
HEADS = 8
AHEAD = 4096  # bytes that rows are prefetched ahead: on Zen 4, 2 KB and 8 KB read 3 to 9 % slower
_LINE = 64
SCORES_STRIDE = 4 * CHUNK + _LINE


def chunks(positions: int) -> int:
    """The most chunks that so many neighbouring positions can touch."""
    return (positions + CHUNK - 2) // CHUNK + 1


def partial_nbytes(value_padded: int) -> int:
    """Of one chunk and HEADS heads: sums of values, then each head's highest score and sum of weights."""
    return HEADS * (4 * value_padded + 8)


def scratch_nbytes(key_padded: int, value_padded: int, context: int) -> int:
    """A thread's own: scaled queries, scores, one row of sums, a number for each chunk."""
    nbytes = HEADS * (4 * key_padded + SCORES_STRIDE) + 4 * value_padded + 4 * chunks(context)
    return -(-nbytes // _LINE) * _LINE


def counters(groups: int) -> int:
    """How many int64 the op counts with: zero before the first run, and again after each."""
    return 2 + groups


def _by_eights(format: Format) -> bool:
    """Whether rows meet eight heads at once, as quantised ones take long to read; F16 and F32 do better by fours."""
    return format.elements > 1


def _decode(v: Any, format: Format) -> Any:
    slot, position, nbytes = slots(v), step_position(v), row_nbytes(v, format)
    scale_queries, score, soften = query_scaler(v, format), key_scorer(v, format), softener(v)
    gather, merge, first_of = gatherer(v, format), merger(v, format), first_visible(v)

    def run(a, thread, threads):
        heads, kv_heads, at = slot(a, 3), slot(a, 7), position(a)
        first, sinks = first_of(at, slot(a, 13), slot(a, 23)), slot(a, 25)
        key_padded, value_padded, counts, partials = slot(a, 9), slot(a, 18), slot(a, 19), slot(a, 20)
        query = slot(a, 16) + thread * slot(a, 17)
        scores = query + HEADS * 4 * key_padded
        partial = HEADS * (4 * value_padded + 8)
        group = heads // kv_heads
        parts = (group + HEADS - 1) // HEADS
        first_chunk = first // CHUNK
        count = at // CHUNK + 1 - first_chunk
        while True:
            unit = v.atomic_add(counts, 1)
            if unit >= count * kv_heads * parts:
                break
            kv, chunk, begin = unit // (parts * count), unit // parts % count, unit % parts * HEADS
            part = kv * parts + unit % parts
            head, many = kv * group + begin, min(HEADS, group - begin)
            start = (first_chunk + chunk) * CHUNK
            low, high = max(first - start, 0), min(at + 1 - start, CHUNK)
            ours = partials + part * slot(a, 21)
            into = ours + chunk * partial
            scale_queries(a, slot(a, 2), at, head, many, query)
            row = slot(a, 8) + (kv * slot(a, 12) + start) * nbytes(key_padded)
            score(query, key_padded, row, low, high, many, scores)
            row = slot(a, 10) + (kv * slot(a, 12) + start + low) * nbytes(slot(a, 11))
            for ahead in range(0, AHEAD, _LINE):  # the first values come while the softmax is computed
                v.prefetch_stream(row + ahead)
            soften(scores, low, high, many, v.load(v.float32, a + 192), into + HEADS * 4 * value_padded)
            gather(scores + 4 * low, row, slot(a, 11), high - low, many, value_padded, into)
            if v.atomic_add(counts + 16 + 8 * part, 1) == count - 1:
                v.store(counts + 16 + 8 * part, 0)
                room = scores + HEADS * SCORES_STRIDE
                sink, out = sinks + 4 * head if sinks != 0 else 0, slot(a, 5) + 4 * head * slot(a, 6)
                merge(ours, partial, count, many, value_padded, slot(a, 6), out, room, sink)
        if v.atomic_add(counts + 8, 1) == threads - 1:  # every thread has seen that nothing is left
            v.store(counts + 8, 0)
            v.store(counts, 0)

    return run


def query_scaler(v: Any, format: Format) -> Any:
    """Query rows of `many` heads times scale and temperature, padded with zeros and turned as keys are; the first head
    is at `first`."""
    slot, quantised = slots(v), format.elements > 1
    turn = rotation.row_turner(v)

    def scale_queries(a, first, at, head, many, query):
        width, padded, factors = slot(a, 4), slot(a, 9), slot(a, 15)
        warmth = v.load(v.float32, a + 112)
        if factors != 0:
            warmth = warmth * v.load(v.float32, factors + 4 * at)
        for h in range(many):
            source, target = first + (head + h) * slot(a, 22), query + 4 * h * padded
            whole = width - width % v.lanes
            for i in range(0, whole, v.lanes):
                v.store(target + 4 * i, v.load(v.f32, source + 4 * i) * warmth)
            for i in range(whole, width):
                v.store(target + 4 * i, v.load(v.float32, source + 4 * i) * warmth)
            for i in range(width, padded):
                v.store(target + 4 * i, np.float32(0))
        if quantised:
            turn(query, many * padded, TAKEN)

    return v.function(scale_queries)


def key_scorer(v: Any, format: Format) -> Any:
    """Inner products of up to HEADS queries with rows low to high of a chunk; scores before and behind are anything."""
    from localmoe.kernels.cpu import vector_rows

    nbytes, span = row_nbytes(v, format), vector_rows.span(v.isa, format)
    one = vector_rows.products(v.isa, 1, format, SCORES_STRIDE)
    two = vector_rows.products(v.isa, 2, format, SCORES_STRIDE)
    four = vector_rows.products(v.isa, 4, format, SCORES_STRIDE)
    eight, eights = vector_rows.products(v.isa, 8, format, SCORES_STRIDE), _by_eights(format)

    def score(query, padded, rows, low, high, many, scores):
        stride, spans, keys = nbytes(padded), padded // span, v.lanes // 4
        if eights and many >= HEADS - 1:
            for s in range(low - low % (keys // 2), high, keys // 2):
                eight(query, 4 * padded, rows + s * stride, stride, high - 1 - s, spans, scores + 4 * s, AHEAD)
            return
        fours = (many + 1) // 4 * 4  # three heads count as four: the fourth row of scores is not used
        for s in range(low - low % keys, high, keys):
            for h in range(0, fours, 4):
                q, out = query + 4 * h * padded, scores + h * SCORES_STRIDE + 4 * s
                four(q, 4 * padded, rows + s * stride, stride, high - 1 - s, spans, out, AHEAD)
        q, out = query + 4 * fours * padded, scores + fours * SCORES_STRIDE
        if many - fours == 2:
            for s in range(low - low % (2 * keys), high, 2 * keys):
                two(q, 4 * padded, rows + s * stride, stride, high - 1 - s, spans, out + 4 * s, AHEAD)
        elif many - fours == 1:
            for s in range(low - low % (4 * keys), high, 4 * keys):
                one(q, 4 * padded, rows + s * stride, stride, high - 1 - s, spans, out + 4 * s, AHEAD)

    return v.function(score)


def softener(v: Any) -> Any:
    """Scores low to high of each head become exp(score - highest); the highest and the sum of all go to `peaks`."""
    from localmoe.kernels.cpu import vector_rows

    exp, capped = vector_rows.softmax_exp(v.isa), soft_capped(v)

    def soften(scores, low, high, many, cap, peaks):
        start, stop = low - low % v.lanes, (high + v.lanes - 1) // v.lanes * v.lanes
        for h in range(many):
            row = scores + h * SCORES_STRIDE
            if cap > 0:
                for s in range(start, stop, v.lanes):
                    v.store(row + 4 * s, capped(v.load(v.f32, row + 4 * s), v.splat(v.f32, cap)))
            for s in range(start, low):
                v.store(row + 4 * s, np.float32(-np.inf))
            for s in range(high, stop):
                v.store(row + 4 * s, np.float32(-np.inf))
            highest = v.load(v.f32, row + 4 * start)
            for s in range(start + v.lanes, stop, v.lanes):
                highest = v.maximum(highest, v.load(v.f32, row + 4 * s))
            peak = v.largest(highest)
            mass = v.zero(v.f32)
            for s in range(start, stop, v.lanes):
                weight = exp(v.load(v.f32, row + 4 * s) - peak)
                v.store(row + 4 * s, weight)
                mass = mass + weight
            v.store(peaks + 8 * h, peak)
            v.store(peaks + 8 * h + 4, v.total(mass))

    return v.function(soften)


def gatherer(v: Any, format: Format) -> Any:
    """Sums of `count` value rows, weighted by each head's scores, into `sums` float32[HEADS][padded]."""
    from localmoe.kernels.cpu import vector_rows

    nbytes, narrow = row_nbytes(v, format), cache_row(1, format)
    wide, most = max(narrow, 16 if v.lanes == 8 else 64), 8 * v.lanes
    eights, eight_wide = _by_eights(format), max(narrow, 2 * v.lanes)
    eight = vector_rows.weighted_sums(v.isa, 8, eight_wide, format)
    eight_narrow = vector_rows.weighted_sums(v.isa, 8, narrow, format)
    four = vector_rows.weighted_sums(v.isa, 4, wide, format)
    four_narrow = vector_rows.weighted_sums(v.isa, 4, narrow, format)
    one = vector_rows.weighted_sums(v.isa, 1, most, format)
    one_narrow = vector_rows.weighted_sums(v.isa, 1, narrow, format)

    def gather(scores, rows, row_width, count, many, padded, sums):
        stride, sums_stride = nbytes(row_width), 4 * padded
        fours = (many + 1) // 4 * 4
        for i in range(0, max(fours, many) * padded, v.lanes):
            v.store(sums + 4 * i, v.zero(v.f32))
        if eights and many >= HEADS - 1:
            for i in range(0, padded - padded % eight_wide, eight_wide):
                eight(scores, SCORES_STRIDE, rows + nbytes(i), stride, count, sums + 4 * i, sums_stride, AHEAD)
            for i in range(padded - padded % eight_wide, padded, narrow):
                eight_narrow(scores, SCORES_STRIDE, rows + nbytes(i), stride, count, sums + 4 * i, sums_stride, AHEAD)
            return
        for h in range(0, fours, 4):
            p, out = scores + h * SCORES_STRIDE, sums + h * sums_stride
            for i in range(0, padded - padded % wide, wide):
                four(p, SCORES_STRIDE, rows + nbytes(i), stride, count, out + 4 * i, sums_stride, AHEAD)
            for i in range(padded - padded % wide, padded, narrow):
                four_narrow(p, SCORES_STRIDE, rows + nbytes(i), stride, count, out + 4 * i, sums_stride, AHEAD)
        for h in range(fours, many):
            p, out = scores + h * SCORES_STRIDE, sums + h * sums_stride
            for i in range(0, padded - padded % most, most):
                one(p, 0, rows + nbytes(i), stride, count, out + 4 * i, 0, AHEAD)
            for i in range(padded - padded % most, padded, narrow):
                one_narrow(p, 0, rows + nbytes(i), stride, count, out + 4 * i, 0, AHEAD)

    return v.function(gather)


def merger(v: Any, format: Format) -> Any:
    """out[h] = the chunks' sums of head h, each in its share of all weights, turned back where values are;
    chunks stand `partial` bytes apart. At `sinks` (0: none) are the heads' logits without a value."""
    from localmoe.kernels.cpu import vector_rows

    join, quantised = vector_rows.weighted_sums(v.isa, 1, 16, F32), format.elements > 1
    turn = rotation.row_turner(v)

    def merge(partials, partial, count, many, padded, width, out, room, sinks):
        shares = room + 4 * padded
        for h in range(many):
            peaks = partials + HEADS * 4 * padded + 8 * h
            peak = v.load(v.float32, peaks)
            for c in range(1, count):
                peak = v.maximum(peak, v.load(v.float32, peaks + c * partial))
            mass = np.float32(0)
            if sinks != 0:
                sink = v.load(v.float32, sinks + 4 * h)
                peak = v.maximum(peak, sink)
                mass = v.exp(sink - peak)
            for c in range(count):
                share = v.exp(v.load(v.float32, peaks + c * partial) - peak)
                v.store(shares + 4 * c, share)
                mass = v.fma(share, v.load(v.float32, peaks + c * partial + 4), mass)
            one = v.splat(v.f32, np.float32(1) / mass)
            rows = partials + h * 4 * padded
            for i in range(0, padded, 16):
                v.store(room + 4 * i, v.zero(v.f32x16))
                join(shares, 0, rows + 4 * i, partial, count, room + 4 * i, 0, 0)
                for j in range(i, i + 16, v.lanes):
                    v.store(room + 4 * j, v.load(v.f32, room + 4 * j) * one)
            if quantised:
                turn(room, padded, TAKEN)
            for i in range(width):
                v.store(out + 4 * (h * width + i), v.load(v.float32, room + 4 * i))

    return v.function(merge)


@kernel("attention_decode_f16", 3)
def attention_decode_f16(v: Any) -> Any:
    """Arguments: control, rows, q, heads, key width, out, value width, kv-heads, keys, padded key width, values,
    padded value width (row of the value cache), context, window, scale, query factors by position (0: none), scratch,
    its bytes a thread, padded width of a value, counters, partials, their bytes for HEADS heads, head stride of q,
    chunk, softcap (0: none), sinks (0: none)."""
    return _decode(v, F16)


@kernel("attention_decode_f32", 3)
def attention_decode_f32(v: Any) -> Any:
    """As attention_decode_f16."""
    return _decode(v, F32)


@kernel("attention_decode_q8_0", 3)
def attention_decode_q8_0(v: Any) -> Any:
    """As attention_decode_f16."""
    return _decode(v, FORMATS["Q8_0"])


@kernel("attention_decode_q4_0", 3)
def attention_decode_q4_0(v: Any) -> Any:
    """As attention_decode_f16."""
    return _decode(v, FORMATS["Q4_0"])
