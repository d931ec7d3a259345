"""The Program: what a forward pass does, as a flat list of op records over named buffers; holds no numbers and runs
nothing.

Letters: T tokens, D hidden, H heads, K kv-heads, d head width, E experts, F expert width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt

from localmoe.formats import Format, Weight

KEPT_NBYTES, MOST_KEPT = 256 << 20, 8  # of recurrent states at earlier tokens, for a conversation that is taken back

Floats = npt.NDArray[np.float32]
Progress = Callable[[str, int, int], None]  # (what, done, total) of anything that takes time


@dataclass(frozen=True, eq=False, slots=True)
class Tensor:
    """A handle to a buffer, or to a regular part of one: no numbers, no arithmetic.

    `strides` are in elements, one per axis, the last always 1; `offset` is where the view begins. Axis 0 is T, the
    tokens of the step.
    """

    buffer: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int = 0
    dtype: str = "f32"

    def heads(self, count: int) -> Tensor:
        """(T, H·d) seen as (T, H, d)."""
        width = self.shape[-1] // count
        if len(self.shape) != 2 or width * count != self.shape[-1]:
            raise ValueError(f"{self.shape} has no {count} equal heads")
        return Tensor(self.buffer, (self.shape[0], count, width), (self.strides[0], width, 1), self.offset, self.dtype)

    def flat(self) -> Tensor:
        """(T, H, d) seen as (T, H·d); the heads must lie side by side."""
        tokens, heads, width = self.shape
        if self.strides[1] != width:
            raise ValueError("the heads of a sliced tensor do not lie side by side")
        return Tensor(self.buffer, (tokens, heads * width), (self.strides[0], 1), self.offset, self.dtype)

    def columns(self, start: int, stop: int) -> Tensor:
        """Elements start:stop of the last axis, as a view."""
        if not 0 <= start < stop <= self.shape[-1]:
            raise ValueError(f"columns {start}:{stop} of {self.shape}")
        return Tensor(self.buffer, (*self.shape[:-1], stop - start), self.strides, self.offset + start, self.dtype)


@dataclass(frozen=True, slots=True)
class CacheLayer:
    """Where one layer's keys and values stand: per kv-head rows of `key_width`; value_width None means V is the first
    `value_prefix` elements of K (absorbed MLA)."""

    index: int
    heads: int
    key_width: int
    value_width: int | None
    value_prefix: int = 0

    @property
    def elements(self) -> int:
        """Elements kept per token."""
        return self.heads * (self.key_width + (self.value_width or 0))

    def nbytes(self, format: Format) -> int:
        """Bytes kept per token, with the padding of rows."""
        widths = (self.key_width, self.value_width or 0)
        return self.heads * sum(format.row_nbytes(cache_row(width, format)) for width in widths)


def cache_row(width: int, format: Format) -> int:
    """Elements of a cached row of `width` values: whole blocks, and whole vectors of 16."""
    unit = max(16, format.elements)
    return -(-width // unit) * unit


@dataclass(frozen=True, slots=True)
class StateLayer:
    """What a recurrent op carries from one token to the next: float32 (matrices, rows, columns), zeros before the first
    token."""

    index: int
    shape: tuple[int, int, int]

    @property
    def padded(self) -> tuple[int, int, int]:
        """The shape in whole groups of 4 rows and 32 columns."""
        matrices, rows, columns = self.shape
        return matrices, -(-rows // 4) * 4, -(-columns // 32) * 32

    @property
    def nbytes(self) -> int:
        """Bytes in one slot."""
        return 4 * prod(self.padded)


@dataclass(frozen=True, slots=True)
class StateSlots:
    """Where a step finds its states and where it leaves them: a device keeps every state in several slots.

    They are read from `source` (at position 0 nothing is read) and left in `target`, which may be the same. As they are
    after `kept_tokens` tokens of the step they are also left in `kept`; 0: nowhere.
    """

    source: int = 0
    target: int = 0
    kept: int = 0
    kept_tokens: int = 0


IN_PLACE = StateSlots()


@dataclass(frozen=True, eq=False, slots=True)
class RopeTable:
    """Rotary embedding (Su et al. 2021): angle = position · inverse_frequencies, cos and sin times `amplitude`.

    `layout` says which elements form a pair: "pairs" (2i, 2i+1) or "halves" (i, i + n). The first 2 · n elements of a
    head turn.
    A context of more than `original_context` tokens takes the frequencies of `longer` where there are any (LongRoPE).
    """

    inverse_frequencies: Floats
    layout: str
    amplitude: float = 1.0
    longer: Floats | None = None
    original_context: int = 0

    def frequencies(self, context: int) -> Floats:
        """Those of a context of so many tokens."""
        return self.inverse_frequencies if self.longer is None or context <= self.original_context else self.longer


@dataclass(frozen=True, slots=True)
class Temperature:
    """Llama-4 query scaling: q · (1 + scale · ln(1 + floor((position + offset) / length)))."""

    scale: float
    length: int
    offset: int = 0


@dataclass(frozen=True, slots=True)
class Router:
    """How experts are chosen from the router's logits; see `Ops.route`."""

    score: str
    used: int
    normalise: bool
    scale: float = 1.0
    groups: int = 1
    groups_used: int = 1
    group_score: str = "max"
    choice: str = "scores"
    jitter: float = 0.0


@dataclass(frozen=True, eq=False, slots=True)
class Op:
    """One step of a Program; `attributes` are exactly the keyword arguments of the op's contract in `ops.Ops`."""

    name: str
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    weights: tuple[Weight, ...] = ()
    attributes: Mapping[str, Any] = field(default_factory=dict)

    @property
    def matrices(self) -> tuple[Weight, ...]:
        """The weights that are multiplied: all but norms and biases."""
        return self.weights[:3] if self.name == "experts" else tuple(w for w in self.weights if len(w.shape) > 1)

    def weight_nbytes(self, tokens: int) -> int:
        """Bytes of weights that a step of `tokens` tokens has to read (experts: as many as the tokens can choose)."""
        if self.name == "embed":
            return tokens * self.weights[0].row_nbytes
        if self.name == "experts":
            chosen = min(self.weights[0].shape[0], tokens * self.inputs[1].shape[1])
            return sum(w.nbytes * chosen // w.shape[0] for w in self.weights)
        return sum(w.nbytes for w in self.weights)

    def flops(self, tokens: int, context: int) -> int:
        """Multiplications and additions of a step of `tokens` tokens that sees `context` cached tokens."""
        if self.name == "attention":
            layer: CacheLayer = self.attributes["cache"]
            values = layer.value_width or layer.value_prefix
            if len(self.inputs) > 1:
                context = min(context, self.inputs[1].shape[1])
            return 2 * tokens * context * self.inputs[0].shape[1] * (layer.key_width + values)
        if self.name == "select":
            return 2 * tokens * context * prod(self.inputs[0].shape[1:])
        if self.name == "experts":
            return 2 * tokens * self.inputs[1].shape[1] * sum(w.elements // w.shape[0] for w in self.matrices)
        if self.name in ("linear", "head_linear", "causal_conv"):
            return 2 * tokens * sum(w.elements for w in self.matrices)
        if self.name == "delta_rule":  # the state is scaled, read twice and added to once
            state: StateLayer = self.attributes["state"]
            return 7 * tokens * prod(state.shape)
        return 0


# (op, inputs, outputs) of one op that has run.
Watcher = Callable[[Op, list[npt.NDArray[Any]], list[npt.NDArray[Any]]], None]


@dataclass(frozen=True, eq=False, slots=True)
class Program:
    """A traced forward pass for steps of up to `tokens` tokens: `output` holds logits, (rows, V)."""

    tokens: int
    ops: tuple[Op, ...]
    input: Tensor
    output: Tensor
    buffers: tuple[Tensor, ...]
    cache: tuple[CacheLayer, ...]
    states: tuple[StateLayer, ...] = ()

    def weight_nbytes(self, tokens: int = 1) -> int:
        """Bytes of weights one step reads, each once."""
        return sum(op.weight_nbytes(tokens) for op in self.ops)

    def flops(self, tokens: int = 1, context: int = 0) -> int:
        return sum(op.flops(tokens, context) for op in self.ops)

    def cache_elements(self) -> int:
        """Elements the cache keeps per token, all layers together."""
        return sum(layer.elements for layer in self.cache)

    def cache_nbytes(self, format: Format) -> int:
        """Bytes the cache keeps per token, all layers together."""
        return sum(layer.nbytes(format) for layer in self.cache)

    @property
    def state_nbytes(self) -> int:
        """Bytes of the recurrent states after one token, all layers together, whatever the number of tokens."""
        return sum(layer.nbytes for layer in self.states)

    @property
    def state_slots(self) -> int:
        """How often a device keeps them: as read, as written, and as they were at 1 to MOST_KEPT earlier tokens."""
        return 2 + min(max(KEPT_NBYTES // self.state_nbytes, 1), MOST_KEPT) if self.states else 0

    def last_uses(self) -> dict[int, int]:
        """Buffer -> index of the last op that reads or writes it (the output lives to the end)."""
        last = {t.buffer: i for i, op in enumerate(self.ops) for t in (*op.inputs, *op.outputs)}
        last[self.output.buffer] = len(self.ops)
        return last


def contiguous(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Strides, in elements, of a row-major array of `shape`."""
    return tuple(prod(shape[i + 1 :]) for i in range(len(shape)))
