"""KV cache writes, and attention put on the tape: a decode kernel for one token, a prefill kernel for a chunk.

The contracts are `ops.Cache.append` and `ops.Ops.attention`; how rows lie in the cache is in `cache_rows.py`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from localmoe.formats import F16, F32, FORMATS, Format
from localmoe.kernels.cpu import attention_decode, attention_prefill, selection
from localmoe.kernels.cpu.arguments import Argument, row_count, slots, step_position
from localmoe.kernels.cpu.build import kernel
from localmoe.kernels.cpu.cache_rows import row_nbytes, writer
from localmoe.kernels.program import CacheLayer, Op, cache_row

if TYPE_CHECKING:
    from localmoe.kernels.cpu.lower import Lowering


def _cache_append(v: Any, format: Format) -> Any:
    slot, rows, position = slots(v), row_count(v), step_position(v)
    nbytes, write = row_nbytes(v, format), writer(v, format)

    def run(a, thread, threads):
        heads, context = slot(a, 2), slot(a, 16)
        units, first = rows(a) * heads, position(a)
        for part in range(3, 3 + 6 * slot(a, 15), 6):
            x, token_stride, head_stride = slot(a, part), slot(a, part + 1), slot(a, part + 2)
            width, cache, stride = slot(a, part + 3), slot(a, part + 4), nbytes(slot(a, part + 5))
            for row in range(units * thread // threads, units * (thread + 1) // threads):
                source = x + row // heads * token_stride + row % heads * head_stride
                write(source, cache + (row % heads * context + first + row // heads) * stride, width)

    return run


@kernel("cache_append_f16", 3)
def cache_append_f16(v: Any) -> Any:
    """Arguments: control, rows, heads, then two parts (keys, values) of: x, token and head strides (bytes), width,
    cache, padded width; the number of parts; the context."""
    return _cache_append(v, F16)


@kernel("cache_append_f32", 3)
def cache_append_f32(v: Any) -> Any:
    """As cache_append_f16."""
    return _cache_append(v, F32)


@kernel("cache_append_q8_0", 3)
def cache_append_q8_0(v: Any) -> Any:
    """As cache_append_f16."""
    return _cache_append(v, FORMATS["Q8_0"])


@kernel("cache_append_q4_0", 3)
def cache_append_q4_0(v: Any) -> Any:
    """As cache_append_f16."""
    return _cache_append(v, FORMATS["Q4_0"])


def lower_cache_append(lowering: Lowering, op: Op) -> None:
    layer: CacheLayer = op.attributes["cache"]
    arrays, format = lowering.device.cache(layer), lowering.device.kv
    parts: list[Any] = []
    for tensor, array in zip(op.inputs, arrays, strict=False):
        assert array is not None
        place = (lowering.at(tensor), 4 * tensor.strides[0], 4 * tensor.strides[1], tensor.shape[2])
        parts += [*place, array.ctypes.data, cache_row(tensor.shape[2], format)]
    parts += [0] * (12 - len(parts))
    name = f"cache_append_{format.name.lower()}"
    lowering.emit(name, op.inputs[0], layer.heads, *parts, len(op.inputs), lowering.device.context)


def lower_attention(lowering: Lowering, op: Op) -> None:
    (q, *selected), (out,) = op.inputs, op.outputs
    layer: CacheLayer = op.attributes["cache"]
    context, format = lowering.device.context, lowering.device.kv
    window, chunk = int(op.attributes["window"]), int(op.attributes["chunk"])
    sinks = lowering.floats(op.weights[0]) if op.weights else 0
    extras = (chunk, float(op.attributes["softcap"]), sinks)
    keys, values = lowering.device.cache(layer)
    value_rows = keys if values is None else values
    key_padded, value_padded = cache_row(layer.key_width, format), cache_row(out.shape[2], format)
    value_row = key_padded if values is None else value_padded
    temperature = op.attributes["temperature"]
    factors = 0
    if temperature:
        steps = (np.arange(context) + temperature.offset) // temperature.length
        table = 1 + temperature.scale * np.log1p(steps)
        lowering.kept.append(table.astype(np.float32))
        factors = lowering.kept[-1].ctypes.data
    shape: tuple[Argument, ...] = (
        *(lowering.at(q), q.shape[1], q.shape[2], lowering.at(out), out.shape[2], layer.heads),
        *(keys.ctypes.data, key_padded, value_rows.ctypes.data, value_row, context),
    )
    scaled = (float(op.attributes["scale"]), factors)
    if selected and selection.chooses(lowering, selected[0]):
        selection.lower_selected(lowering, op, shape, (key_padded, value_row, value_padded), scaled)
        return
    single, widths = q.shape[0] == 1, (lowering.isa, key_padded, value_padded)
    if single:
        scratch_nbytes = attention_decode.scratch_nbytes(key_padded, value_padded, context)
    else:
        panels = attention_prefill.panels(*widths, q.shape[0] * q.shape[1], lowering.threads)
        scratch_nbytes = attention_prefill.scratch_nbytes(*widths, panels)
    scratch = (lowering.temporary(scratch_nbytes * lowering.threads), scratch_nbytes, value_padded)
    both = (*shape, window, *scaled, *scratch)
    if single:
        parts = layer.heads * -(-q.shape[1] // layer.heads // attention_decode.HEADS)
        part_nbytes = attention_decode.partial_nbytes(value_padded) * attention_decode.chunks(
            window or chunk or context
        )
        counters = lowering.table([0] * attention_decode.counters(parts))
        shared = (counters, lowering.temporary(parts * part_nbytes), part_nbytes)
        lowering.emit(f"attention_decode_{format.name.lower()}", q, *both, *shared, 4 * q.strides[1], *extras)
    else:
        counters = lowering.table([0] * attention_prefill.COUNTERS)
        tile = (panels, attention_prefill.panel_nbytes(*widths))
        place = (counters, 4 * q.strides[0], 4 * q.strides[1])
        lowering.emit(f"attention_prefill_{format.name.lower()}", q, *both, *place, *tile, *extras)
