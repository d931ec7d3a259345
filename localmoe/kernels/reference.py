"""The reference device: the Program interpreted in numpy, slow and obviously right; the oracle of every kernel test."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt

from localmoe.formats import KV_FORMATS, Bytes
from localmoe.kernels import shifting
from localmoe.kernels.angles import rope_angles
from localmoe.kernels.cache_blocks import decoded, encoded
from localmoe.kernels.program import (
    IN_PLACE,
    CacheLayer,
    Floats,
    Op,
    Program,
    RopeTable,
    StateSlots,
    Tensor,
    Watcher,
)
from localmoe.kernels.reference_router import choose
from localmoe.kernels.reference_states import Carried, convolved, delta_rows, sigmoid
from localmoe.kernels.reference_weights import matrix, values
from localmoe.kernels.reference_weights import rows as rows_of
from localmoe.kernels.residency import Residency

Array = npt.NDArray[Any]


class ReferenceDevice:
    """Keeps the KV cache as float32 numpy arrays of (K, S, d), rounded to what its format can hold."""

    name = "reference"
    threads = 1
    cpus: tuple[int, ...] = ()

    def __init__(self, context: int, kv_format: str = "f32") -> None:
        self.context = context
        self.kv = KV_FORMATS[kv_format]
        self.caches: dict[int, tuple[Array, Array | None]] = {}
        self.states: dict[int, Array] = {}  # (slots, matrices, rows, columns)
        self.slots = StateSlots()  # of the step that runs

    def compile_all(self, programs: Sequence[Program], residency: Residency | None = None) -> list[ReferencePlan]:
        return [self.compile(program) for program in programs]

    def compile(self, program: Program, residency: Residency | None = None) -> ReferencePlan:
        """It reads weights where the Program has them, whatever the residency."""
        for layer in program.cache:
            if layer.index not in self.caches:
                keys = np.zeros((layer.heads, self.context, layer.key_width), np.float32)
                width = layer.value_width
                self.caches[layer.index] = (
                    keys,
                    np.zeros((layer.heads, self.context, width), np.float32) if width else None,
                )
        for state in program.states:
            self.states.setdefault(state.index, np.zeros((program.state_slots, *state.shape), np.float32))
        return ReferencePlan(self, program)

    def cache_bytes(self, program: Program) -> tuple[list[Bytes], list[Bytes]]:
        arrays = [array for layer in program.cache for array in self.caches[layer.index] if array is not None]
        states = [self.states[layer.index].reshape(program.state_slots, -1) for layer in program.states]
        return [array.view(np.uint8) for array in arrays], [state.view(np.uint8) for state in states]

    def shift(self, program: Program, start: int, stop: int, end: int) -> None:
        for layer, turns in shifting.turns(program, self.kv):
            keys, values = self.caches[layer.index]
            for source, target in shifting.pieces(start, stop, end):
                rows = keys[:, source].copy()
                for turn in turns:
                    first, last = turn.spans(layer.key_width)
                    moved = turn.back(rows[..., first:last], first, source.start, stop - start, self.context)
                    rows[..., first:last] = decoded(encoded(moved, self.kv), self.kv, last - first)
                keys[:, target] = rows
                if values is not None:
                    values[:, target] = values[:, source].copy()

    def close(self) -> None:
        self.caches.clear()
        self.states.clear()


class ReferencePlan:
    """Runs a Program op by op."""

    def __init__(self, device: ReferenceDevice, program: Program) -> None:
        self.device = device
        self.program = program

    def run(self, tokens: npt.NDArray[np.int32], position: int, slots: StateSlots = IN_PLACE) -> Floats:
        """Token ids (T,) at cache positions position… -> logits (rows, V)."""
        self.device.slots = slots
        return self.watch(tokens, position, lambda op, inputs, outputs: None)

    def watch(self, tokens: npt.NDArray[np.int32], position: int, see: Watcher) -> Floats:
        store = {b.buffer: _poisoned(b, tokens.size) for b in self.program.buffers}
        _view(store, self.program.input, tokens.size)[...] = tokens
        for op in self.program.ops:
            inputs = [_view(store, t, tokens.size) for t in op.inputs]
            results = _TWINS[op.name](self.device, op, inputs, position)
            for tensor, result in zip(op.outputs, results, strict=True):
                _view(store, tensor, tokens.size)[...] = result
            see(op, inputs, [np.asarray(r) for r in results])
        out = _view(store, self.program.output, tokens.size)
        return np.array(out, np.float32)


def _poisoned(tensor: Tensor, tokens: int) -> Array:
    """A whole buffer for a step of `tokens` tokens (one of a single row keeps it), filled so that an unwritten part
    shows."""
    size = min(tensor.shape[0], tokens) * prod(tensor.shape[1:])
    return np.full(size, np.nan, np.float32) if tensor.dtype == "f32" else np.full(size, -1, np.int32)


def _view(store: dict[int, Array], tensor: Tensor, tokens: int) -> Array:
    flat = store[tensor.buffer][tensor.offset :]
    shape = (min(tensor.shape[0], tokens), *tensor.shape[1:])
    return np.lib.stride_tricks.as_strided(flat, shape, tuple(s * flat.itemsize for s in tensor.strides))


def embed(device: ReferenceDevice, op: Op, inputs: list[Array], position: int) -> list[Array]:
    (weight,) = op.weights
    return [np.concatenate([rows_of(weight, t, t + 1) for t in inputs[0]])]


def rms_norm(device: ReferenceDevice, op: Op, inputs: list[Array], position: int) -> list[Array]:
    x = inputs[0].astype(np.float32)
    y = x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + np.float32(op.attributes["epsilon"]))
    return [y * values(op.weights[0]) if op.weights else y]


def layer_norm(device: ReferenceDevice, op: Op, inputs: list[Array], position: int) -> list[Array]:
    x = inputs[0].astype(np.float32)
    x = x - x.mean(axis=-1, keepdims=True)
    y = (
        x
        / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + np.float32(op.attributes["epsilon"]))
        * values(op.weights[0])
    )
    return [y + values(op.weights[1]) if len(op.weights) > 1 else y]


def linear(device: ReferenceDevice, op: Op, inputs: list[Array], position: int) -> list[Array]:
    flags: tuple[bool, ...] = op.attributes["biased"]
    biases = iter(op.weights[len(flags) :])
    results: list[Array] = []
    for weight, biased in zip(op.weights, flags, strict=False):
        y = inputs[0] @ matrix(weight).T
        results.append(y + values(next(biases)) if biased else y)
    return results


def head_linear(device: ReferenceDevice, op: Op, inputs: list[Array], position: int) -> list[Array]:
    weight = values(op.weights[0])
    return [np.einsum("tha,hab->thb" if op.attributes["transposed"] else "tha,hba->thb", inputs[0], weight)]


def rope(device: ReferenceDevice, op: Op, inputs: list[Array], position: int) -> list[Array]:
    table: RopeTable = op.attributes["table"]
    x, n = np.array(inputs[0], np.float32), table.inverse_frequencies.size
    cos, sin = (a[:, None, :] for a in rope_angles(table, position, x.shape[0], device.context))
    first, second = (
        (slice(0, 2 * n, 2), slice(1, 2 * n, 2)) if table.layout == "pairs" else (slice(0, n), slice(n, 2 * n))
    )
    a, b = x[..., first].copy(), x[..., second].copy()
    x[..., first], x[..., second] = a * cos - b * sin, b * cos + a * sin
    return [x]


def concat(device: ReferenceDevice, op: Op, inputs: list[Array], position: int) -> list[Array]:
    return [np.concatenate(inputs, axis=-1)]


def cache_append(device: ReferenceDevice, op: Op, inputs: list[Array], position: int) -> list[Array]:
    layer: CacheLayer = op.attributes["cache"]
    for cache, rows in zip(device.caches[layer.index], inputs, strict=False):
        assert cache is not None
        kept = decoded(encoded(rows, device.kv), device.kv, rows.shape[2])
        cache[:, position : position + rows.shape[0]] = kept.transpose(1, 0, 2)
    return []


def attention(device: ReferenceDevice, op: Op, inputs: list[Array], position: int) -> list[Array]:
    layer: CacheLayer = op.attributes["cache"]
    q = inputs[0].astype(np.float32)  # (T, H, dk)
    tokens, end = q.shape[0], position + q.shape[0]
    keys, stored = device.caches[layer.index]
    k = keys[:, :end]
    v = k[:, :, : layer.value_prefix] if stored is None else stored[:, :end]
    at = np.arange(position, end)
    if temperature := op.attributes["temperature"]:
        steps = (at + temperature.offset) // temperature.length
        q = q * (1 + temperature.scale * np.log1p(steps)).astype(np.float32)[:, None, None]
    shared = q.reshape(tokens, layer.heads, -1, layer.key_width)
    scores = np.einsum("tkgd,ksd->kgts", shared, k) * np.float32(op.attributes["scale"])
    if cap := np.float32(op.attributes["softcap"]):
        scores = cap * np.tanh(scores / cap)
    seen = np.arange(end)[None, :] <= at[:, None]
    if window := op.attributes["window"]:
        seen &= np.arange(end)[None, :] > at[:, None] - window
    if chunk := op.attributes["chunk"]:
        seen &= np.arange(end)[None, :] >= (at // chunk * chunk)[:, None]
    if len(inputs) > 1:
        chosen = np.zeros((tokens, end + 1), bool)  # the last column takes the -1s
        np.put_along_axis(chosen, inputs[1], True, axis=1)
        seen &= chosen[:, :end]
    scores = np.where(seen, scores, -np.inf)
    if op.weights:
        sinks = np.broadcast_to(values(op.weights[0]).reshape(layer.heads, -1, 1, 1), (*scores.shape[:3], 1))
        scores = np.concatenate([scores, sinks], axis=-1)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    weights = (weights / weights.sum(axis=-1, keepdims=True))[..., :end]
    return [np.einsum("kgts,ksd->tkgd", weights, v).reshape(tokens, q.shape[1], -1)]


def select(device: ReferenceDevice, op: Op, inputs: list[Array], position: int) -> list[Array]:
    layer: CacheLayer = op.attributes["cache"]
    (q, weights), count = inputs, op.outputs[0].shape[1]
    keys = device.caches[layer.index][0][0, : position + len(q)]  # (S, d)
    products = np.maximum(np.einsum("tid,sd->tis", q.astype(np.float32), keys), 0)
    scores = np.einsum("ti,tis->ts", weights.astype(np.float32), products)
    ids = np.full((len(q), count), -1, np.int32)
    for t, at in enumerate(range(position, position + len(q))):
        best = np.sort(np.argsort(-scores[t, : at + 1], kind="stable")[:count])
        ids[t, : len(best)] = best
    return [ids]


def causal_conv(device: ReferenceDevice, op: Op, inputs: list[Array], position: int) -> list[Array]:
    x = np.concatenate([part.reshape(len(part), -1) for part in inputs], axis=1)  # (T, C)
    carried = Carried(device.states[op.attributes["state"].index], device.slots, position, len(x))
    return [convolved(x, values(op.weights[0]), carried)]


def delta_rule(device: ReferenceDevice, op: Op, inputs: list[Array], position: int) -> list[Array]:
    carried = Carried(device.states[op.attributes["state"].index], device.slots, position, len(inputs[0]))
    rate, bias = map(values, op.weights)
    return [delta_rows(inputs, rate, bias, carried, op.attributes["tiled"])]


def gated(kind: str, gate: Array, up: Array) -> Array:
    """`Ops.glu` on arrays."""
    if kind == "clamped_swish":
        gate, up = np.minimum(gate, np.float32(7)), np.clip(up, np.float32(-7), np.float32(7))
        return np.asarray(gate * sigmoid(np.float32(1.702) * gate) * (up + 1))
    if kind == "gelu":
        return np.asarray(_gelu(gate) * up)
    if kind == "product":
        return np.asarray(gate * up)
    return np.asarray((gate * sigmoid(gate) if kind == "silu" else sigmoid(gate)) * up)


def _gelu(x: Array) -> Array:
    inner = np.float32((2 / np.pi) ** 0.5) * (x + np.float32(0.044715) * x**3)
    return np.asarray(np.float32(0.5) * x * (1 + np.tanh(inner)), np.float32)


def glu(device: ReferenceDevice, op: Op, inputs: list[Array], position: int) -> list[Array]:
    return [gated(op.attributes["kind"], *inputs)]


def gelu(device: ReferenceDevice, op: Op, inputs: list[Array], position: int) -> list[Array]:
    return [_gelu(inputs[0])]


def scale(device: ReferenceDevice, op: Op, inputs: list[Array], position: int) -> list[Array]:
    factor = np.float32(op.attributes["factor"])
    return [inputs[0] * (factor * values(op.weights[0])[0] if op.weights else factor)]


def softcap(device: ReferenceDevice, op: Op, inputs: list[Array], position: int) -> list[Array]:
    cap = np.float32(op.attributes["cap"])
    return [cap * np.tanh(inputs[0] / cap)]


def add_positions(device: ReferenceDevice, op: Op, inputs: list[Array], position: int) -> list[Array]:
    return [inputs[0] + values(op.weights[0])[position : position + len(inputs[0])]]


def route(device: ReferenceDevice, op: Op, inputs: list[Array], position: int) -> list[Array]:
    weights = [values(weight) for weight in op.weights]
    bias = weights.pop(0) if op.attributes["biased"] else None
    ids, shares = choose(op.attributes["router"], inputs[0].astype(np.float32), bias)
    return [ids, shares * weights[0][ids] if weights else shares]


def experts(device: ReferenceDevice, op: Op, inputs: list[Array], position: int) -> list[Array]:
    x, ids, shares = inputs
    gate, up, down, *biases = op.weights
    added = [values(b) for b in biases] or [np.zeros(w.shape[:2], np.float32) for w in (gate, up, down)]
    out = np.zeros_like(x)
    for e in np.unique(ids):
        rows, columns = np.nonzero(ids == e)
        opened = [x[rows] @ matrix(w, e).T + bias[e] for w, bias in zip((gate, up), added, strict=False)]
        y = gated(op.attributes["kind"], *opened) @ matrix(down, e).T + added[2][e]
        out[rows] += shares[rows, columns, None] * y if op.attributes["weighted"] else y
    return [out]


def add(device: ReferenceDevice, op: Op, inputs: list[Array], position: int) -> list[Array]:
    return [inputs[0] + inputs[1]]


def last_row(device: ReferenceDevice, op: Op, inputs: list[Array], position: int) -> list[Array]:
    return [inputs[0][-1:]]


_TWINS: dict[str, Callable[[ReferenceDevice, Op, list[Array], int], list[Array]]] = {
    f.__name__: f
    for f in (
        embed,
        rms_norm,
        layer_norm,
        linear,
        head_linear,
        rope,
        concat,
        cache_append,
        attention,
        select,
        causal_conv,
        delta_rule,
        glu,
        gelu,
        scale,
        softcap,
        route,
        experts,
        add,
        add_positions,
        last_row,
    )
}
