"""Lowering: each op of a Program to tape entries, each buffer to a place in the arena; knows kernels by name only.

Every argument block begins with the address of the control slots (tokens, position) and a fixed row count (0: as many
as tokens). In a step of one token threads wait for each other only where an op reads what another thread wrote: see
`Lowering.run` and `split`.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from math import prod
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from localmoe.formats import SCALED, MadeSlabs, Weight
from localmoe.kernels.cpu import (
    activation,
    attention,
    experts,
    linear,
    norm,
    recurrent,
    rope,
    router,
    scaled,
    selection,
)
from localmoe.kernels.cpu.arguments import Argument, At, Function
from localmoe.kernels.cpu.waves import Pause
from localmoe.kernels.program import Op, Program, Tensor, contiguous
from localmoe.kernels.residency import Residency

if TYPE_CHECKING:
    from localmoe.kernels.cpu.device import CpuDevice

CONTROL_SLOTS = 8
LINE = 64


BY_FLOATS = ("add", "add_positions", "gelu", "glu", "scale", "softcap")  # element by element
ADDRESS_OF_CONTROL = At(-1)
Split = str | tuple[str, int]


@dataclass
class Arena:
    """First-fit places for buffers that live from one op to another; `size` is the most that was ever in use."""

    size: int = 0
    free: list[tuple[int, int]] = field(default_factory=list)  # (offset, length), in order
    taken: dict[int, int] = field(default_factory=dict)

    def take(self, nbytes: int) -> int:
        length = max(LINE, -(-nbytes // LINE) * LINE)
        for i, (offset, room) in enumerate(self.free):
            if room >= length:
                self.free[i : i + 1] = [(offset + length, room - length)] if room > length else []
                self.taken[offset] = length
                return offset
        offset, self.size = self.size, self.size + length
        self.taken[offset] = length
        return offset

    def give(self, offset: int) -> None:
        pieces = sorted([*self.free, (offset, self.taken.pop(offset))])
        merged = pieces[:1]
        for start, length in pieces[1:]:
            last, room = merged[-1]
            if last + room == start:
                merged[-1] = (last, room + length)
            else:
                merged.append((start, length))
        self.free = merged


class Lowering:
    """Turns one Program into tape entries."""

    def __init__(self, device: CpuDevice, program: Program, residency: Residency | None = None) -> None:
        """Where there is a `residency`, not all experts are in memory, and the step pauses behind each router."""
        self.device = device
        self.program = program
        self.residency = residency
        self.pauses: list[Pause] = []
        self.isa = device.kernels.isa
        self.threads = device.threads
        self.arena = Arena()
        self.kept: list[npt.NDArray[np.generic]] = []  # what argument blocks point at, beside the arena
        self._places: dict[int, int] = {}
        self.owners: list[int] = []  # the op of each entry
        self._entries: list[tuple[str, tuple[Argument, ...]]] = []
        self._barriers: list[bool] = []
        self._written: dict[int, Split] = {}  # buffers written since the last barrier, and how
        self._temporary: list[int] = []
        self._leaving: list[int] = []  # places that other threads may still be using
        self._open = False  # whether the entries of the current op need no barrier behind them
        self._private = private_buffers(program) if self.threads > 1 else frozenset()

    def run(self) -> None:
        """Lower every op in order; a buffer's place is given back after its last use, at the next barrier."""
        last = self.program.last_uses()
        self._place(self.program.input)
        for i, op in enumerate(self.program.ops):
            how = split(op, self._private) if self.program.tokens == 1 else None
            if how is None or any(self._written.get(t.buffer, how) not in (how, "private") for t in op.inputs):
                self.barrier()
            for tensor in op.outputs:
                self._place(tensor)
            self._open = how is not None
            LOWERINGS[op.name](self, op)
            self.owners += [i] * (len(self._entries) - len(self.owners))
            if how is None:
                self.barrier()
            else:
                for tensor in op.outputs:
                    alone = "private" if tensor.buffer in self._private else floats(tensor)
                    self._written[tensor.buffer] = alone if how == "whole" else how
            ended = {t.buffer for t in (*op.inputs, *op.outputs) if last[t.buffer] == i} - {self.program.input.buffer}
            self._leaving += [*self._temporary, *(self._places[buffer] for buffer in ended)]
            self._temporary.clear()
        self.barrier()

    def emit(self, kernel: str, tensor: Tensor, *arguments: Argument) -> None:
        """A tape entry whose rows are those of `tensor`: the step's tokens, or fixed."""
        fixed = tensor.shape[0] if tensor.shape[0] != self.program.tokens or self.program.tokens == 1 else 0
        self._entries.append((kernel, (ADDRESS_OF_CONTROL, fixed, *arguments)))
        self._barriers.append(not self._open)

    def barrier(self) -> None:
        """Threads wait for each other behind what was emitted last."""
        if self._barriers:
            self._barriers[-1] = True
        self._written.clear()
        for offset in self._leaving:
            self.arena.give(offset)
        self._leaving.clear()

    def apart(self, tensor: Tensor) -> int:
        """Bytes from one thread's copy of a tensor to the next one's; 0 where threads share it."""
        return line_nbytes(4 * prod(tensor.shape)) if tensor.buffer in self._private else 0

    @property
    def entry_count(self) -> int:
        return len(self._entries)

    def entries_until(self, tensor: Tensor) -> int:
        """How many entries there are up to the op that writes a tensor."""
        writer = next(i for i, op in enumerate(self.program.ops) if tensor in op.outputs)
        return sum(owner <= writer for owner in self.owners)

    def at(self, tensor: Tensor) -> At:
        """Where a tensor (or view) begins."""
        return At(self._places[tensor.buffer] + 4 * tensor.offset)

    def side_by_side(self, tensor: Tensor) -> At:
        """Where the elements of a tensor stand without gaps: its own place, or for a view a copy that the current op
        uses."""
        if tensor.strides == contiguous(tensor.shape):
            return self.at(tensor)
        copy = self.scratch(tensor.shape)
        heads, head_stride = (tensor.shape[1], 4 * tensor.strides[1]) if len(tensor.shape) == 3 else (1, 0)
        source = (self.at(tensor), 4 * tensor.strides[0], head_stride, tensor.shape[-1])
        self.emit("concat", tensor, heads, self.at(copy), *source, 0, 0, 0, 0)
        return self.at(copy)

    def offset(self, tensor: Tensor) -> int:
        return self._places[tensor.buffer]

    def temporary(self, nbytes: int) -> At:
        """Room that only the current op uses."""
        self._temporary.append(self.arena.take(nbytes))
        return At(self._temporary[-1])

    def scratch(self, shape: tuple[int, ...]) -> Tensor:
        """A float32 buffer that only the current op uses."""
        tensor = Tensor(-len(self._places) - 1, shape, contiguous(shape))
        self._places[tensor.buffer] = self.temporary(4 * prod(shape)).offset
        return tensor

    def table(self, values: Iterable[int]) -> int:
        """The address of a table of int64 (addresses of experts or heads) that lives as long as the plan."""
        array = np.fromiter(values, np.int64)
        self.kept.append(array)
        return array.ctypes.data

    def floats(self, weight: Weight, *, turned: bool = False) -> int:
        """The address of a small weight (a norm, a bias) as float32, converted if the file holds another type; with
        rows and columns exchanged if `turned`."""
        from localmoe.kernels.reference_weights import values

        array = np.ascontiguousarray(values(weight).T if turned else values(weight), np.float32)
        self.kept.append(array)
        return array.ctypes.data

    def number(self, weight: Weight) -> float:
        """What a weight of one element holds."""
        from localmoe.kernels.reference_weights import values

        return float(values(weight)[0])

    def address(self, weight: Weight, matrix: int = 0) -> int:
        """The address of a matrix of a weight, straight in the mapped file unless it is made; that of a record where it
        is scaled."""
        if weight.format.name not in SCALED:
            slab = weight.slabs[matrix]
            if isinstance(weight.slabs, MadeSlabs):
                self.kept.append(slab)
            return slab.ctypes.data
        numbers, values = scaled.record(weight, matrix)
        self.kept.append(values)
        return self.table(numbers)

    def addresses(self, weight: Weight) -> int:
        """The address of a table of all its matrices' addresses."""
        return self.table(self.address(weight, i) for i in range(len(weight.slabs)))

    def kernel_names(self) -> list[str]:
        names = [name for name, _ in self._entries]
        return names + [a.name for _, arguments in self._entries for a in arguments if isinstance(a, Function)]

    def link(
        self, address: Callable[[str], int], base: int, control: int
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """The argument blocks and the tape, with every place and function an address."""

        def number(a: Argument) -> int:
            if isinstance(a, At):
                return control if a is ADDRESS_OF_CONTROL else base + a.offset
            if isinstance(a, Function):
                return address(a.name)
            return int.from_bytes(struct.pack("<f", a), "little") if isinstance(a, float) else a

        blocks = [[number(a) for a in arguments] for _, arguments in self._entries]
        starts = np.cumsum([0, *map(len, blocks)])
        arguments = np.array([n for block in blocks for n in block], np.int64)
        places = arguments.ctypes.data + 8 * starts[:-1]
        kernels = [address(name) for name, _ in self._entries]
        columns = (kernels, places, self._barriers)
        return arguments, np.stack([np.asarray(column, np.int64) for column in columns], axis=1)

    def _place(self, tensor: Tensor) -> None:
        copies = self.threads if tensor.buffer in self._private else 1
        self._places[tensor.buffer] = self.arena.take(copies * line_nbytes(4 * prod(tensor.shape)))


def split(op: Op, private: frozenset[int]) -> Split | None:
    """How threads share an op of one token where it leaves them no need to wait; None: they wait before and behind it.

    Each takes its part of so many heads or of so many floats, and needs what itself wrote where the array that it reads
    was shared in the same way. "whole": it reads all of its input; what it writes is shared by floats, or private.
    """
    out = op.outputs[0] if op.outputs else op.inputs[0]
    if op.name == "experts" or out.buffer in private or (op.name == "linear" and linear.by_vectors(op)):
        return "whole"
    if op.name in ("rms_norm", "layer_norm", "rope", "concat", "cache_append", "head_linear"):
        return ("heads", out.shape[1] if len(out.shape) == 3 else 1)
    side_by_side = all(t.offset == 0 and t.strides == contiguous(t.shape) for t in op.inputs)
    same = len({t.shape for t in op.inputs}) == 1
    if op.name in BY_FLOATS and side_by_side and same:
        return floats(out)
    return None


def floats(tensor: Tensor) -> Split:
    return ("floats", prod(tensor.shape))


def private_buffers(program: Program) -> frozenset[int]:
    """Norms of a single row that only matrix products read: each thread computes its own copy rather than wait."""
    if program.tokens > 1:
        return frozenset()
    others = [op for op in program.ops if op.name != "experts" and not (op.name == "linear" and linear.by_vectors(op))]
    readers = {t.buffer for op in others for t in op.inputs}
    norms = {op.outputs[0].buffer for op in program.ops if op.name.endswith("_norm") and len(op.outputs[0].shape) == 2}
    return frozenset(norms - readers - {program.output.buffer})


def line_nbytes(nbytes: int) -> int:
    return -(-nbytes // LINE) * LINE


LOWERINGS: dict[str, Callable[[Lowering, Op], None]] = {
    "embed": activation.lower_embed,
    "rms_norm": norm.lower_norm,
    "layer_norm": norm.lower_norm,
    "linear": linear.lower_linear,
    "head_linear": linear.lower_head_linear,
    "rope": rope.lower_rope,
    "concat": activation.lower_concat,
    "cache_append": attention.lower_cache_append,
    "attention": attention.lower_attention,
    "causal_conv": recurrent.lower_causal_conv,
    "delta_rule": recurrent.lower_delta_rule,
    "glu": activation.lower_glu,
    "gelu": activation.lower_each,
    "scale": activation.lower_each,
    "softcap": activation.lower_each,
    "route": router.lower_route,
    "select": selection.lower_select,
    "experts": experts.lower_experts,
    "add": activation.lower_add,
    "add_positions": activation.lower_add_positions,
    "last_row": activation.lower_last_row,
}
