"""Taking tokens out of the middle of a KV cache: how the keys behind them are turned to their new positions; knows no
device.

Keys stand in the cache as rope left them at the position where they were computed. Rope is a rotation by an angle for
each position, so that a key is turned back by its old angle and on to its new one: exact but for rounding. What a
Program did to a key between rope and cache is undone and done again around it. This is the context shift of llama.cpp;
that the first tokens of a text must stay when others go, because attention rests on them, is from Xiao et al. 2023,
StreamingLLM (arXiv:2309.17453).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import numpy.typing as npt

from localmoe.errors import SettingError
from localmoe.formats import Format
from localmoe.kernels.angles import rope_angles
from localmoe.kernels.cache_blocks import BLOCK
from localmoe.kernels.program import CacheLayer, Floats, Op, Program, RopeTable, Tensor

PIECE = 1024  # tokens that are moved at a time
STRETCH = 2.0  # of what a quantised cache has rounded, at most
PLACELESS = ("embed", "linear", "experts")  # what they give counts as free of positions


class PositionError(Exception):
    """What a key's position did to it cannot be undone; says why."""


@dataclass(frozen=True, eq=False)
class Turn:
    """Columns of a key, from `start` on, that rope has turned by `table`, and a factor that each was multiplied by
    since."""

    start: int
    table: RopeTable
    factors: Floats

    @property
    def stop(self) -> int:
        return self.start + self.factors.size

    @cached_property
    def stretch(self) -> float:
        """How much larger what was rounded of one column may become in the other one of its pair."""
        a, b = (np.abs(self.factors[part]) for part in pairs(self.table))
        return float(np.maximum(a / b, b / a).max())

    def moved(self, columns: int) -> Turn:
        return replace(self, start=self.start + columns)

    def spans(self, width: int) -> tuple[int, int]:
        """The columns of a key of `width` that share a block with one that turns: first and last but one."""
        return self.start // BLOCK * BLOCK, min(-(-self.stop // BLOCK) * BLOCK, width)

    def back(self, keys: Floats, first: int, position: int, by: int, context: int) -> Floats:
        """Columns first… of the keys (K, T, columns) of the positions position…, as they are `by` positions lower."""
        a, b = pairs(self.table)
        tokens, result = keys.shape[1], keys.copy()
        was, now = (self._angles(rope_angles(self.table, at, tokens, context)) for at in (position, position - by))
        angles = now * was.conj() / np.abs(was) ** 2
        cos, sin = angles.real.astype(np.float32), angles.imag.astype(np.float32)
        turning = result[..., self.start - first : self.stop - first]  # a view
        if self.stretch > 1:
            turning /= self.factors
        x, y = turning[..., a].copy(), turning[..., b].copy()
        turning[..., a], turning[..., b] = x * cos - y * sin, y * cos + x * sin
        if self.stretch > 1:
            turning *= self.factors
        return result

    @staticmethod
    def _angles(cos_and_sin: tuple[Floats, Floats]) -> npt.NDArray[np.complex128]:
        cos, sin = (x.astype(np.float64) for x in cos_and_sin)
        return cos + 1j * sin


def pairs(table: RopeTable) -> tuple[slice, slice]:
    """The first and the second columns of the pairs that a table turns."""
    n = table.inverse_frequencies.size
    return (slice(0, 2 * n, 2), slice(1, 2 * n, 2)) if table.layout == "pairs" else (slice(0, n), slice(n, 2 * n))


def obstacle(program: Program, format: Format) -> str:
    """Why the cache of such a Program, kept in a format, cannot be shifted, in words; empty where it can."""
    try:
        turns(program, format)
    except PositionError as why:
        return str(why)
    return ""


def turns(program: Program, format: Format) -> list[tuple[CacheLayer, tuple[Turn, ...]]]:
    """What has to be turned of the keys of each cache layer. Raises PositionError where not all of it can be."""
    if program.states:
        raise PositionError("its recurrent states hold every token that they have seen")
    if any(op.name == "add_positions" for op in program.ops):
        raise PositionError("it has learned positions, which are part of everything that follows")
    makers = {t.buffer: (op, t) for op in program.ops for t in op.outputs}
    appended = [op for op in program.ops if op.name == "cache_append"]
    found = [(op.attributes["cache"], turned(op.inputs[0], makers)) for op in appended]
    if format.elements > 1 and any(turn.stretch > STRETCH for _, layer_turns in found for turn in layer_turns):
        raise PositionError(f"what {format.name} has rounded cannot be turned by a norm's weights; --kv f16 can")
    return found


def turned(tensor: Tensor, makers: dict[int, tuple[Op, Tensor]]) -> tuple[Turn, ...]:
    """Which columns of a tensor rope has turned."""
    op, whole = makers[tensor.buffer]
    if op.name in PLACELESS:
        return ()
    before = [turned(x, makers) for x in op.inputs]
    found: tuple[Turn, ...]
    if op.name == "concat":
        width = op.inputs[0].shape[-1]
        found = (*before[0], *(turn.moved(width) for turn in before[1]))
    elif op.name == "rope" and not before[0]:
        table: RopeTable = op.attributes["table"]
        found = (Turn(0, table, np.ones(2 * table.inverse_frequencies.size, np.float32)),)
    elif op.name == "rms_norm":
        found = tuple(normed(turn, op) for turn in before[0])
    elif any(before):
        raise PositionError(f"{op.name} follows rope in its keys")
    else:
        return ()
    return seen(found, tensor, whole)


def normed(turn: Turn, op: Op) -> Turn:
    """Rope keeps the mean square of a head: dividing by it and turning may change places; a weight is a factor."""
    if len(op.outputs[0].shape) != 3:
        raise PositionError("a norm over all heads follows rope in its keys")
    if not op.weights:
        return turn
    from localmoe.kernels.reference_weights import values

    factors: Floats = turn.factors * values(op.weights[0])[turn.start : turn.stop]
    if not np.all(np.abs(factors) > 1e-4 * np.abs(factors).max()):
        raise PositionError("a norm that follows rope in its keys has weights of zero")
    return replace(turn, factors=factors)


def seen(found: tuple[Turn, ...], tensor: Tensor, whole: Tensor) -> tuple[Turn, ...]:
    """What a view shows of the turned columns of a whole tensor."""
    if not found or (tensor.shape, tensor.strides, tensor.offset) == (whole.shape, whole.strides, whole.offset):
        return found
    if tensor.shape[:-1] != whole.shape[:-1] or tensor.strides != whole.strides:
        raise PositionError("its keys are cut in another way behind rope")
    first, stop = tensor.offset, tensor.offset + tensor.shape[-1]
    if any(turn.start < edge < turn.stop for turn in found for edge in (first, stop)):
        raise PositionError("its keys are a part of what rope turns")
    return tuple(turn.moved(-first) for turn in found if first <= turn.start and turn.stop <= stop)


def pieces(start: int, stop: int, end: int) -> Iterator[tuple[slice, slice]]:
    """Where the tokens stop:end come from and where they go, some at a time, the first ones first."""
    for first in range(stop, end, PIECE):
        last = min(first + PIECE, end)
        yield slice(first, last), slice(first - stop + start, last - stop + start)


def refuse(program: Program, format: Format, name: str, start: int, stop: int, end: int) -> None:
    """Raises SettingError where the tokens start:stop of `end` cached ones cannot be taken out."""
    if why := obstacle(program, format):
        raise SettingError(f"{name}: the cache cannot be shifted: {why}; possible is 'drop', which reads the rest anew")
    if not 0 <= start < stop <= end:
        raise SettingError(f"tokens {start} to {stop} cannot be taken out of {end} cached ones")
