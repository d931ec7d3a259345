"""Attention of a chunk of tokens on the cpu, in tiles with a running softmax (flash attention: Dao et al. 2022).

A panel is two vectors of (token, head) pairs of one kv-head, one pair a lane; some panels make a tile, which a thread
takes; keys come in blocks at multiples of BLOCK positions. Scores and sums stand transposed, float32[key or
column][pair], so that a lane never meets another: a token's bits depend neither on its place in a tile, nor on what
else the step holds, nor on threads. For a pair that sees nothing of a block, the block adds exact zeros.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from localmoe.formats import F16, F32, FORMATS, Format
from localmoe.kernels.cache_blocks import TAKEN
from localmoe.kernels.cpu import rotation
from localmoe.kernels.cpu.arguments import first_visible, row_count, slots, soft_capped, step_position
from localmoe.kernels.cpu.build import kernel
from localmoe.kernels.cpu.cache_rows import row_nbytes
from localmoe.kernels.cpu.isa import Isa

BLOCK = 64  # keys, and columns of a key or value that stand side by side in scratch
COUNTERS = 2
_TILE_ROWS = {"avx512": 8, "avx2": 4, "portable": 2}
_STRIDE = 4 * BLOCK  # bytes from one key to the next in scratch, float32[columns / BLOCK][BLOCK keys][BLOCK columns]
_PANELS = 8  # of a tile, at most
_PANELS_NBYTES = 1 << 20  # and their queries and sums stay near the second-level cache
_HIDDEN = 1e38  # times the distance to a pair's last or first key: far below every score, and finite


def panels(isa: Isa, key_padded: int, value_padded: int, pairs: int, threads: int) -> int:
    """How many panels make a tile when a chunk has so many (token, head) pairs. They share the float32 copy of a block,
    which far into a text comes from memory: one panel of latent attention after 8,192 tokens spends a fifth of its time
    on it. Each thread gets four tiles or more, if there are so many, so that none waits long for the last."""
    few = pairs // (8 * isa.lanes * threads)
    return max(1, min(_PANELS, few, _PANELS_NBYTES // panel_nbytes(isa, key_padded, value_padded)))


def scratch_nbytes(isa: Isa, key_padded: int, value_padded: int, many: int) -> int:
    """A thread's own: keys and values of a block as float32, scores, and the `many` panels of a tile."""
    blocks = (key_padded + BLOCK - 1) // BLOCK + (value_padded + BLOCK - 1) // BLOCK
    return blocks * BLOCK * _STRIDE + 8 * isa.lanes * BLOCK + many * panel_nbytes(isa, key_padded, value_padded)


def panel_nbytes(isa: Isa, key_padded: int, value_padded: int) -> int:
    """Queries and sums, then each pair's position, highest score, sum of weights and first key."""
    return 8 * isa.lanes * (key_padded + value_padded + 4)


def _prefill(v: Any, format: Format) -> Any:
    slot, rows, position = slots(v), row_count(v), step_position(v)
    pack, widen, attend, put = _pack_queries(v, format), _widen(v, format), _attend(v), _put(v, format)
    pairs, nbytes, first_of = 2 * v.lanes, row_nbytes(v, format), first_visible(v)

    def run(a, thread, threads):
        kv_heads, begin, counts = slot(a, 7), position(a), slot(a, 19)
        window, chunk = slot(a, 13), slot(a, 24)
        key_padded, value_padded, panel_nbytes = slot(a, 9), slot(a, 18), slot(a, 23)
        group = slot(a, 3) // kv_heads
        total, span = rows(a) * group, slot(a, 22) * pairs
        tiles = (total + span - 1) // span
        keys = slot(a, 16) + thread * slot(a, 17)
        values = keys + (key_padded + BLOCK - 1) // BLOCK * (BLOCK * _STRIDE)
        scores = values + (value_padded + BLOCK - 1) // BLOCK * (BLOCK * _STRIDE)
        panel = scores + 4 * pairs * BLOCK
        if slot(a, 10) == slot(a, 8):
            values = keys
        while True:
            unit = v.atomic_add(counts, 1)
            if unit >= tiles * kv_heads:
                break
            tile, kv = tiles - 1 - unit // kv_heads, unit % kv_heads  # the longest first
            start, stop = tile * span, min(total, (tile + 1) * span)
            for pair in range(start, stop, pairs):
                pack(a, begin, kv, pair, min(pairs, stop - pair), keys, panel + (pair - start) // pairs * panel_nbytes)
            low, last = first_of(begin + start // group, window, chunk), begin + (stop - 1) // group
            for block in range(low // BLOCK * BLOCK, last + 1, BLOCK):
                count, row = min(BLOCK, last + 1 - block), kv * slot(a, 12) + block
                widen(slot(a, 8) + row * nbytes(key_padded), key_padded, key_padded, count, keys)
                if values != keys:
                    widen(slot(a, 10) + row * nbytes(slot(a, 11)), slot(a, 11), value_padded, count, values)
                for pair in range(start, stop, pairs):
                    first, end = begin + pair // group, begin + (min(pair + pairs, stop) - 1) // group
                    if block <= end and block + BLOCK > first_of(first, window, chunk):
                        masked = block + BLOCK > first + 1 or block < first_of(end, window, chunk)
                        ours = panel + (pair - start) // pairs * panel_nbytes
                        attend(a, block, min(count, end + 1 - block), masked, keys, values, scores, ours)
            for pair in range(start, stop, pairs):
                put(a, kv, pair, min(pairs, stop - pair), panel + (pair - start) // pairs * panel_nbytes)
        if v.atomic_add(counts + 8, 1) == threads - 1:  # every thread has seen that nothing is left
            v.store(counts + 8, 0)
            v.store(counts, 0)

    return run


def _pack_queries(v: Any, format: Format) -> Any:
    """Begin a panel: its queries, scaled and turned as keys are, as [column][pair], by way of rows in `copy`; its sums
    and numbers."""
    slot, pairs, first_of, quantised = slots(v), 2 * v.lanes, first_visible(v), format.elements > 1
    turn = rotation.column_turner(v)

    def pack(a, begin, kv, start, many, copy, panel):
        width, padded, factors, scale = slot(a, 4), slot(a, 9), slot(a, 15), v.load(v.float32, a + 112)
        group, whole = slot(a, 3) // slot(a, 7), width - width % v.lanes
        sums = panel + 4 * pairs * padded
        state = sums + 4 * pairs * slot(a, 18)
        for i in range(pairs):
            pair = start + min(i, many - 1)
            at = begin + pair // group
            v.store(state + 4 * i, np.float32(at))
            v.store(state + 4 * (pairs + i), np.float32(-3e38))
            v.store(state + 4 * (2 * pairs + i), np.float32(0))
            v.store(state + 4 * (3 * pairs + i), np.float32(first_of(at, slot(a, 13), slot(a, 24))))
            warmth = scale * v.load(v.float32, factors + 4 * at) if factors != 0 else scale
            source = slot(a, 2) + pair // group * slot(a, 20) + (kv * group + pair % group) * slot(a, 21)
            target = copy + 4 * i * padded
            for k in range(0, whole, v.lanes):
                v.store(target + 4 * k, v.load(v.f32, source + 4 * k) * warmth)
            for k in range(whole, width):
                v.store(target + 4 * k, v.load(v.float32, source + 4 * k) * warmth)
            for k in range(width, padded):
                v.store(target + 4 * k, np.float32(0))
        for i in range(0, pairs, 4):
            for k in range(0, padded, 4):
                p, q, r, s = v.transpose4(copy + 4 * (i * padded + k), 4 * padded)
                place = panel + 4 * (k * pairs + i)
                v.store(place, p)
                v.store(place + 4 * pairs, q)
                v.store(place + 8 * pairs, r)
                v.store(place + 12 * pairs, s)
        if quantised:
            turn(panel, padded, TAKEN)
        for i in range(0, pairs * slot(a, 18), v.lanes):
            v.store(sums + 4 * i, v.zero(v.f32))

    return v.function(pack)


def _widen(v: Any, format: Format) -> Any:
    """`count` cache rows as float32[columns / BLOCK][BLOCK keys][BLOCK columns]."""
    from localmoe.kernels.cpu import vector_rows

    nbytes, span = row_nbytes(v, format), vector_rows.span(v.isa, format)
    widened = vector_rows.widened(v.isa, format)

    def widen(source, row_width, width, count, target):
        stride = nbytes(row_width)
        for c in range(0, width, BLOCK):
            for k in range(count):
                row, place = source + k * stride + nbytes(c), target + (c + k) * _STRIDE
                for i in range(0, min(BLOCK, width - c), span):
                    widened(row + nbytes(i), place + 4 * i)

    return v.function(widen)


def _attend(v: Any) -> Any:
    """One block of keys for one panel."""
    from localmoe.kernels.cpu import vector_rows

    slot, pairs, height = slots(v), 2 * v.lanes, _TILE_ROWS[v.isa.name]
    score = vector_rows.outer_products(v.isa, height, _STRIDE, across=False)
    gather = vector_rows.outer_products(v.isa, height, _STRIDE, across=True)
    mask, soften, capped = _mask(v), _soften(v), soft_capped(v)

    def attend(a, block, count, masked, keys, values, scores, panel):
        key_padded, value_padded = slot(a, 9), slot(a, 18)
        sums = panel + 4 * pairs * key_padded
        state = sums + 4 * pairs * value_padded
        for i in range(0, pairs * count, v.lanes):
            v.store(scores + 4 * i, v.zero(v.f32))
        for c in range(0, key_padded, BLOCK):
            columns, query = min(BLOCK, key_padded - c), panel + 4 * pairs * c
            for k in range(0, count, height):  # rows behind `count` are of an earlier block: their scores go unread
                score(keys + (c + k) * _STRIDE, query, columns, scores + 4 * pairs * k)
        cap = v.load(v.float32, a + 200)
        if cap > 0:
            for i in range(0, pairs * count, v.lanes):
                v.store(scores + 4 * i, capped(v.load(v.f32, scores + 4 * i), v.splat(v.f32, cap)))
        if masked:
            mask(scores, state, block, count)
        soften(scores, state, count, sums, value_padded)
        for c in range(0, value_padded, height):
            place = values + c // BLOCK * (BLOCK * _STRIDE) + c % BLOCK * 4
            gather(place, scores, count, sums + 4 * pairs * c)

    return v.function(attend)


def _mask(v: Any) -> Any:
    """Hide keys behind each pair's position, and those before its first."""
    pairs, lanes, half = 2 * v.lanes, v.lanes, np.float32(0.5)
    hidden = np.float32(_HIDDEN)

    def mask(scores, state, block, count):
        for m in range(0, 4 * pairs, 4 * lanes):
            position, first = v.load(v.f32, state + m), v.load(v.f32, state + 12 * pairs + m)
            for k in range(count):
                place, key = scores + 4 * pairs * k + m, np.float32(block + k)
                score = v.minimum(v.load(v.f32, place), (position - (key - half)) * hidden)
                v.store(place, v.minimum(score, (-first + (key + half)) * hidden))

    return v.function(mask)


def _soften(v: Any) -> Any:
    """Scores of `count` keys become exp(score - highest so far); sums of an earlier highest shrink to the new one."""
    from localmoe.kernels.cpu import vector_rows

    exp = vector_rows.softmax_exp(v.isa)
    pairs, lanes = 2 * v.lanes, v.lanes

    def soften(scores, state, count, sums, value_padded):
        for m in range(0, 4 * pairs, 4 * lanes):
            before = v.load(v.f32, state + 4 * pairs + m)
            peak, other = before, before
            for k in range(0, count - 1, 2):
                peak = v.maximum(peak, v.load(v.f32, scores + 4 * pairs * k + m))
                other = v.maximum(other, v.load(v.f32, scores + 4 * pairs * (k + 1) + m))
            peak = v.maximum(v.maximum(peak, other), v.load(v.f32, scores + 4 * pairs * (count - 1) + m))
            mass = v.zero(v.f32)
            for k in range(count):
                weight = exp(v.load(v.f32, scores + 4 * pairs * k + m) - peak)
                v.store(scores + 4 * pairs * k + m, weight)
                mass = mass + weight
            rise = peak - before
            shrunk = exp(-rise)
            v.store(state + 4 * pairs + m, peak)
            v.store(state + 8 * pairs + m, v.fma(v.load(v.f32, state + 8 * pairs + m), shrunk, mass))
            if v.largest(v.maximum(rise, v.zero(v.f32))) > 0:  # mostly not: the factors are all 1
                for c in range(value_padded):
                    place = sums + 4 * pairs * c + m
                    v.store(place, v.load(v.f32, place) * shrunk)

    return v.function(soften)


def _put(v: Any, format: Format) -> Any:
    """Sums over weights, turned back and transposed, into the output rows of a panel's pairs."""
    slot, pairs, quantised = slots(v), 2 * v.lanes, format.elements > 1
    turn = rotation.column_turner(v)

    def put(a, kv, start, many, panel):
        heads, width, group = slot(a, 3), slot(a, 6), slot(a, 3) // slot(a, 7)
        sums = panel + 4 * pairs * slot(a, 9)
        state, sinks = sums + 4 * pairs * slot(a, 18), slot(a, 26)
        if sinks != 0:
            for i in range(many):
                sink = v.load(v.float32, sinks + 4 * (kv * group + (start + i) % group))
                mass, peak = state + 4 * (2 * pairs + i), v.load(v.float32, state + 4 * (pairs + i))
                # A sink far above every score takes all: its weight, relative to theirs, is then infinite.
                v.store(mass, v.load(v.float32, mass) + v.exp(sink - peak))
        if quantised:
            turn(sums, slot(a, 18), TAKEN)
        for m in range(0, 4 * pairs, 4 * v.lanes):
            share = v.splat(v.f32, np.float32(1)) / v.load(v.f32, state + 8 * pairs + m)
            for c in range(width):
                v.store(sums + 4 * pairs * c + m, v.load(v.f32, sums + 4 * pairs * c + m) * share)
        for i in range(0, pairs, 4):
            for j in range(i, min(i + 4, many)):
                head = (start + j) // group * heads + kv * group + (start + j) % group
                v.store(state + 8 * (j - i), slot(a, 5) + 4 * width * head)
            whole = width - width % 4 if i + 4 <= many else 0
            for c in range(0, whole, 4):
                p, q, r, s = v.transpose4(sums + 4 * (pairs * c + i), 4 * pairs)
                v.store(slot(state, 0) + 4 * c, p)
                v.store(slot(state, 1) + 4 * c, q)
                v.store(slot(state, 2) + 4 * c, r)
                v.store(slot(state, 3) + 4 * c, s)
            for j in range(i, min(i + 4, many)):
                for c in range(whole, width):
                    v.store(slot(state, j - i) + 4 * c, v.load(v.float32, sums + 4 * (pairs * c + j)))

    return v.function(put)


@kernel("attention_prefill_f16", 3)
def attention_prefill_f16(v: Any) -> Any:
    """Arguments: control, rows, q, heads, key width, out, value width, kv-heads, keys, padded key width, values,
    padded value width (row of the value cache), context, window, scale, query factors by position (0: none), scratch,
    its bytes a thread, padded width of a value, counters, token and head strides of q (bytes), panels of a tile,
    bytes of a panel, chunk, softcap (0: none), sinks (0: none)."""
    return _prefill(v, F16)


@kernel("attention_prefill_f32", 3)
def attention_prefill_f32(v: Any) -> Any:
    """As attention_prefill_f16."""
    return _prefill(v, F32)


@kernel("attention_prefill_q8_0", 3)
def attention_prefill_q8_0(v: Any) -> Any:
    """As attention_prefill_f16."""
    return _prefill(v, FORMATS["Q8_0"])


@kernel("attention_prefill_q4_0", 3)
def attention_prefill_q4_0(v: Any) -> Any:
    """As attention_prefill_f16."""
    return _prefill(v, FORMATS["Q4_0"])
