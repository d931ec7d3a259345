"""KV cache writes and causal attention on the cpu; the contracts are `ops.Cache.append` and `ops.Ops.attention`.

Cache rows are padded with zeros to 16 elements, so that every row is whole vectors. One thread does a whole (token,
head), in a fixed order: results do not depend on the number of threads.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from localmoe.kernels.cpu.arguments import row_count, slots, step_position
from localmoe.kernels.cpu.build import kernel
from localmoe.kernels.program import CacheLayer, Op

if TYPE_CHECKING:
    from localmoe.kernels.cpu.lower import Lowering


def _cache_append(v: Any, element: int) -> Any:
    slot, rows, position = slots(v), row_count(v), step_position(v)
    put = v.store_half if element == 2 else v.store

    def run(a, thread, threads):
        heads, context = slot(a, 2), slot(a, 16)
        units, first = rows(a) * heads, position(a)
        for part in range(3, 3 + 6 * slot(a, 15), 6):
            x, token_stride, head_stride = slot(a, part), slot(a, part + 1), slot(a, part + 2)
            width, cache, padded = slot(a, part + 3), slot(a, part + 4), slot(a, part + 5)
            for row in range(units * thread // threads, units * (thread + 1) // threads):
                source = x + row // heads * token_stride + row % heads * head_stride
                target = cache + (row % heads * context + first + row // heads) * padded * element
                for i in range(width):
                    put(target + element * i, v.load(v.float32, source + 4 * i))

    return run


@kernel("cache_append_f16", 3)
def cache_append_f16(v: Any) -> Any:
    """Arguments: control, rows, heads, then two parts (keys, values) of: x, token and head strides (bytes), width,
    cache, padded width; the number of parts; the context."""
    return _cache_append(v, 2)


@kernel("cache_append_f32", 3)
def cache_append_f32(v: Any) -> Any:
    """As cache_append_f16."""
    return _cache_append(v, 4)


def _attention(v: Any, element: int) -> Any:
    slot, rows, position = slots(v), row_count(v), step_position(v)
    cached = v.load_half if element == 2 else v.load
    weigh, gather = _weigh(v, element, cached), _gather(v, element, cached)

    def run(a, thread, threads):
        q, heads, key_width, out, value_width = slot(a, 2), slot(a, 3), slot(a, 4), slot(a, 5), slot(a, 6)
        kv_heads, keys, key_padded, values, value_row = slot(a, 7), slot(a, 8), slot(a, 9), slot(a, 10), slot(a, 11)
        context, window, scale, factors = slot(a, 12), slot(a, 13), v.load(v.float32, a + 112), slot(a, 15)
        query, value_padded = slot(a, 16) + thread * slot(a, 17), slot(a, 18)
        summed = query + 4 * key_padded
        scores = summed + 4 * value_padded
        units, begin = rows(a) * heads, position(a)
        # Neighbouring units are the heads of one token, so that heads sharing keys find them in cache.
        for unit in range(units * thread // threads, units * (thread + 1) // threads):
            at, kv = begin + unit // heads, unit % heads // (heads // kv_heads)
            first = at + 1 - window if window > 0 and at + 1 > window else 0
            warmth = scale * v.load(v.float32, factors + 4 * at) if factors != 0 else scale
            for i in range(key_width):
                v.store(query + 4 * i, v.load(v.float32, q + 4 * (unit * key_width + i)) * warmth)
            for i in range(key_width, key_padded):
                v.store(query + 4 * i, np.float32(0))
            row = kv * context + first
            share = weigh(query, keys + row * key_padded * element, key_padded, at + 1 - first, scores)
            gather(scores, values + row * value_row * element, value_row, value_padded, at + 1 - first, share, summed)
            for i in range(value_width):
                v.store(out + 4 * (unit * value_width + i), v.load(v.float32, summed + 4 * i))

    return run


def _weigh(v: Any, element: int, cached: Any) -> Any:
    """Scores of one query against `count` key rows, as exp(score - highest); returns 1 / their sum."""

    def weigh(query, keys, width, count, scores):
        for s in range(count):
            dot = v.zero(v.f32)
            row = keys + s * width * element
            for i in range(0, width, v.lanes):
                dot = v.fma(v.load(v.f32, query + 4 * i), cached(v.f32, row + element * i), dot)
            v.store(scores + 4 * s, v.total(dot))
        for s in range(count, (count + v.lanes - 1) // v.lanes * v.lanes):
            v.store(scores + 4 * s, np.float32(-np.inf))
        highest = v.load(v.f32, scores)
        for s in range(v.lanes, count, v.lanes):
            highest = v.maximum(highest, v.load(v.f32, scores + 4 * s))
        peak = v.splat(v.f32, v.largest(highest))
        mass = v.zero(v.f32)
        for s in range(0, count, v.lanes):
            weight = v.exp(v.load(v.f32, scores + 4 * s) - peak)
            v.store(scores + 4 * s, weight)
            mass = mass + weight
        return np.float32(1) / v.total(mass)

    return v.function(weigh)


def _gather(v: Any, element: int, cached: Any) -> Any:
    """The weighted sum of `count` value rows, four vectors of columns at a time, times `share`."""

    def gather(scores, values, row_width, used, count, share, out):
        whole = used - used % (4 * v.lanes)
        for i in range(0, whole, 4 * v.lanes):
            y0, y1, y2, y3 = v.zero(v.f32), v.zero(v.f32), v.zero(v.f32), v.zero(v.f32)
            for s in range(count):
                p = v.splat(v.f32, v.load(v.float32, scores + 4 * s))
                row = values + element * (s * row_width + i)
                y0 = v.fma(p, cached(v.f32, row), y0)
                y1 = v.fma(p, cached(v.f32, row + element * v.lanes), y1)
                y2 = v.fma(p, cached(v.f32, row + element * 2 * v.lanes), y2)
                y3 = v.fma(p, cached(v.f32, row + element * 3 * v.lanes), y3)
            v.store(out + 4 * i, y0 * share)
            v.store(out + 4 * (i + v.lanes), y1 * share)
            v.store(out + 4 * (i + 2 * v.lanes), y2 * share)
            v.store(out + 4 * (i + 3 * v.lanes), y3 * share)
        for i in range(whole, used, v.lanes):
            y = v.zero(v.f32)
            for s in range(count):
                p = v.splat(v.f32, v.load(v.float32, scores + 4 * s))
                y = v.fma(p, cached(v.f32, values + element * (s * row_width + i)), y)
            v.store(out + 4 * i, y * share)

    return v.function(gather)


@kernel("attention_f16", 3)
def attention_f16(v: Any) -> Any:
    """Arguments: control, rows, q, heads, key width, out, value width, kv-heads, keys, padded key width, values,
    padded value width (row of the value cache), context, window, scale, query factors by position (0: none), scratch,
    its bytes a thread, padded width of a value."""
    return _attention(v, 2)


@kernel("attention_f32", 3)
def attention_f32(v: Any) -> Any:
    """As attention_f16."""
    return _attention(v, 4)


def lower_cache_append(lowering: Lowering, op: Op) -> None:
    layer: CacheLayer = op.attributes["cache"]
    arrays = lowering.device.cache(layer)
    parts: list[Any] = []
    for tensor, array in zip(op.inputs, arrays, strict=False):
        assert array is not None
        place = (lowering.at(tensor), 4 * tensor.strides[0], 4 * tensor.strides[1], tensor.shape[2])
        parts += [*place, array.ctypes.data, array.shape[2]]
    parts += [0] * (12 - len(parts))
    name = f"cache_append_f{8 * lowering.device.kv_type.itemsize}"
    lowering.emit(name, op.inputs[0], layer.heads, *parts, len(op.inputs), lowering.device.context)


def lower_attention(lowering: Lowering, op: Op) -> None:
    (q,), (out,) = op.inputs, op.outputs
    layer: CacheLayer = op.attributes["cache"]
    keys, values = lowering.device.cache(layer)
    context = lowering.device.context
    value_rows = keys if values is None else values
    value_padded = -(-out.shape[2] // 16) * 16
    scratch_nbytes = 4 * (keys.shape[2] + value_rows.shape[2] + context + 16)
    scratch_nbytes = -(-scratch_nbytes // 64) * 64
    temperature = op.attributes["temperature"]
    factors = 0
    if temperature:
        table = 1 + temperature.scale * np.log1p(np.arange(context) // temperature.length)
        lowering.kept.append(table.astype(np.float32))
        factors = lowering.kept[-1].ctypes.data
    lowering.emit(
        f"attention_f{8 * lowering.device.kv_type.itemsize}",
        q,
        *(lowering.side_by_side(q), q.shape[1], q.shape[2], lowering.at(out), out.shape[2], layer.heads),
        *(keys.ctypes.data, keys.shape[2], value_rows.ctypes.data, value_rows.shape[2]),
        *(context, int(op.attributes["window"]), float(op.attributes["scale"]), factors),
        *(lowering.temporary(scratch_nbytes * lowering.threads), scratch_nbytes, value_padded),
    )
