"""The cpu device: Programs become op tapes over one arena, walked by a thread team; no Python runs inside a step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from localmoe.errors import SettingError
from localmoe.formats import KV_FORMATS, Bytes, Weight
from localmoe.interrupt import Pool, Uninterrupted, when_gone
from localmoe.kernels import shifting
from localmoe.kernels.angles import rope_angles
from localmoe.kernels.cache_blocks import decoded, encoded
from localmoe.kernels.cpu.build import Kernels
from localmoe.kernels.cpu.cores import default_threads
from localmoe.kernels.cpu.isa import host_isa
from localmoe.kernels.cpu.lower import CONTROL_SLOTS, Lowering
from localmoe.kernels.cpu.pinning import pinned_cpus
from localmoe.kernels.cpu.team import KERNELS, Team
from localmoe.kernels.cpu.waves import COUNTERS, Pause
from localmoe.kernels.program import (
    IN_PLACE,
    CacheLayer,
    Floats,
    Program,
    Progress,
    RopeTable,
    StateLayer,
    StateSlots,
    Tensor,
    Watcher,
    cache_row,
)
from localmoe.kernels.residency import Residency
from localmoe.kernels.rewrites import experts_late, shared_early, with_guesses

ALIGNMENT = 64
CHUNK_ENTRIES = 16  # of a chunk's tape in one native call: about a layer


class CpuDevice:
    """Owns the threads, the compiled kernels, the recurrent states and the KV cache: per layer bytes (K, S, row), as
    `cache_rows.py` says."""

    name = "cpu"

    def __init__(
        self,
        context: int,
        kv_format: str,
        threads: int | None,
        progress: Progress | None = None,
        pin: str | None = None,
    ) -> None:
        """`threads` None takes the quick physical cores that this process may use, or all CPUs of a list that `pin` is.
        Raises SettingError for fewer than 1 or more than 256, and for what `pinned_cpus` refuses."""
        self.cpus = () if pin is None else pinned_cpus(pin, threads)
        threads = len(self.cpus) or threads
        if threads is not None and not 1 <= threads <= 256:
            raise SettingError(f"{threads} threads are not possible; 1 to 256 are")
        self.context = context
        self.kv = KV_FORMATS[kv_format]
        self.progress = progress
        self.kernels = Kernels(host_isa())
        self.threads = threads or default_threads()
        self.team: Team | None = None
        self._caches: dict[int, tuple[Bytes, Bytes | None]] = {}
        self._states: dict[int, Bytes] = {}
        self._tables: dict[int, tuple[RopeTable, Floats]] = {}

    def compile(self, program: Program, residency: Residency | None = None) -> CpuPlan:
        return self.compile_all([program], residency)[0]

    def compile_all(self, programs: Sequence[Program], residency: Residency | None = None) -> list[CpuPlan]:
        """Lower every op to tape entries; kernels that are found nowhere are compiled now, under one count."""
        programs = [_arranged(program, residency) for program in programs]
        lowerings = [Lowering(self, program, residency) for program in programs]
        for lowering in lowerings:
            lowering.run()
        names = [name for lowering in lowerings for name in lowering.kernel_names()]
        self.kernels.prepare((*KERNELS, *names), self._report)
        return [CpuPlan(self, program, lowering) for program, lowering in zip(programs, lowerings, strict=True)]

    @classmethod
    def needed_nbytes(
        cls, programs: Sequence[Program], context: int, kv_format: str, threads: int | None = None
    ) -> tuple[int, int]:
        """(bytes of the KV cache and recurrent states, bytes of all else) that the Plans take beside the weights.

        They are lowered over arrays that have a shape and hardly any memory: no weight is read, no kernel compiled.
        """
        device = cls(context, kv_format, threads)
        zero, angle = np.zeros(1, np.uint8), np.zeros(1, np.float32)
        for layer in programs[0].cache:
            arrays = [np.broadcast_to(zero, shape) for shape in device._cache_shapes(layer)]
            device._caches[layer.index] = (arrays[0], arrays[1] if len(arrays) > 1 else None)
        for state in programs[0].states:
            device._states[state.index] = np.broadcast_to(zero, (programs[0].state_slots, state.nbytes))
        for table in (op.attributes["table"] for program in programs for op in program.ops if op.name == "rope"):
            shape = (context, table.inverse_frequencies.size, 2)
            device._tables[id(table)] = (table, np.broadcast_to(angle, shape))
        cache = sum(array.nbytes for pair in device._caches.values() for array in pair if array is not None)
        cache += sum(array.nbytes for array in device._states.values())
        working = sum(angles.nbytes for _, angles in device._tables.values())
        for program in programs:
            lowering = UnreadLowering(device, _arranged(program, None))
            lowering.run()
            working += lowering.arena.size + sum(array.nbytes for array in lowering.kept)
        return cache, working

    def threads_run(self, tape: npt.NDArray[np.int64]) -> None:
        """Walk a tape, (entries, 3) of kernel address, argument block address and barrier, with all threads."""
        if self.team is None:
            with Uninterrupted():
                self.team = Team(self.threads, *map(self.kernels.address, KERNELS), cpus=self.cpus)
                self._dismiss = when_gone(self, self.team.close, keep=self.kernels)  # workers may be inside their code
        self.team.run(tape.ctypes.data, len(tape))

    def cache(self, layer: CacheLayer) -> tuple[Bytes, Bytes | None]:
        """Keys and values of one layer (None: values are a prefix of keys); pages come into being when they are
        written."""
        if layer.index not in self._caches:
            arrays: list[Bytes] = [zeros(shape, np.dtype(np.uint8)) for shape in self._cache_shapes(layer)]
            self._caches[layer.index] = (arrays[0], arrays[1] if len(arrays) > 1 else None)
        return self._caches[layer.index]

    def state(self, layer: StateLayer, slots: int) -> Bytes:
        """All slots of one recurrent state, (slots, bytes), as `recurrent.py` lays them out."""
        if layer.index not in self._states:
            self._states[layer.index] = zeros((slots, layer.nbytes), np.dtype(np.uint8))
        return self._states[layer.index]

    def cache_bytes(self, program: Program) -> tuple[list[Bytes], list[Bytes]]:
        rows = [array for layer in program.cache for array in self.cache(layer) if array is not None]
        return rows, [self.state(layer, program.state_slots) for layer in program.states]

    def shift(self, program: Program, start: int, stop: int, end: int) -> None:
        """With all threads, a layer each at a time; what numpy does to its rows holds no lock of Python's."""
        pool = Pool(self.threads)
        try:
            layers = shifting.turns(program, self.kv)
            for moved in [pool.submit(self._shift_layer, *layer, start, stop, end) for layer in layers]:
                pool.result(moved)
        finally:
            pool.close()

    def _shift_layer(self, layer: CacheLayer, turns: Sequence[shifting.Turn], start: int, stop: int, end: int) -> None:
        keys, values = self.cache(layer)
        for source, target in shifting.pieces(start, stop, end):
            rows = keys[:, source].copy()
            for turn in turns:
                first, last = turn.spans(layer.key_width)
                part = rows[..., self.kv.row_nbytes(first) : self.kv.row_nbytes(cache_row(last, self.kv))]
                read = decoded(part, self.kv, last - first)
                part[...] = encoded(turn.back(read, first, source.start, stop - start, self.context), self.kv)
            keys[:, target] = rows
            if values is not None:
                values[:, target] = values[:, source].copy()

    def _cache_shapes(self, layer: CacheLayer) -> list[tuple[int, int, int]]:
        widths = [width for width in (layer.key_width, layer.value_width) if width is not None]
        return [(layer.heads, self.context, self.kv.row_nbytes(cache_row(width, self.kv))) for width in widths]

    def rope_table(self, table: RopeTable) -> Floats:
        """(S, n, 2): cos and sin of every position of the context, as the reference computes them."""
        if id(table) not in self._tables:
            self._tables[id(table)] = (
                table,
                np.ascontiguousarray(np.stack(rope_angles(table, 0, self.context), axis=-1)),
            )
        return self._tables[id(table)][1]

    def close(self) -> None:
        if self.team is not None:
            self._dismiss()
            self.team = None
        self._caches.clear()
        self._states.clear()

    def _report(self, done: int, total: int, name: str) -> None:
        if self.progress:
            self.progress("compiling kernels (first start only)", done, total)


def _arranged(program: Program, residency: Residency | None) -> Program:
    if residency:
        return experts_late(with_guesses(program) if residency.lookahead else program)
    return shared_early(program) if program.tokens == 1 else program


class UnreadLowering(Lowering):
    """A Lowering for the sake of its sizes: nothing of a weight is read, and its addresses are 0."""

    def floats(self, weight: Weight, *, turned: bool = False) -> int:
        self.kept.append(np.zeros(weight.elements, np.float32))
        return 0

    def number(self, weight: Weight) -> float:
        return 0.0

    def address(self, weight: Weight, matrix: int = 0) -> int:
        return 0

    def addresses(self, weight: Weight) -> int:
        return self.table([0] * len(weight.slabs))


class CpuPlan:
    """An op tape with everything it points at."""

    def __init__(self, device: CpuDevice, program: Program, lowering: Lowering) -> None:
        self._device = device
        self.program = program  # its ops in the order in which they run
        self._kept = lowering  # the arena, the address tables and the views that the tape's arguments point into
        self._arena = zeros((lowering.arena.size,), np.dtype(np.uint8))
        base = self._arena.ctypes.data
        self._control = zeros((CONTROL_SLOTS,), np.dtype(np.int64))
        self._arguments, self._tape = lowering.link(device.kernels.address, base, self._control.ctypes.data)
        self._input = self._piece(lowering.offset(program.input), program.tokens, np.dtype(np.int32))
        rows = program.output.shape[0]
        flat = self._piece(lowering.offset(program.output), rows * program.output.shape[1], np.dtype(np.float32))
        self._output = flat.reshape(rows, -1)

    def run(self, tokens: npt.NDArray[np.int32], position: int, slots: StateSlots = IN_PLACE) -> Floats:
        self._begin(tokens, position, slots)
        done = 0
        for pause in self._kept.pauses:
            self._walk(done, pause.chosen)
            whole = self._all_there(pause, tokens.size)
            done = pause.chosen if whole else self._waves(pause, pause.chosen, tokens.size)
        self._walk(done, len(self._tape))
        return np.array(self._output[: min(tokens.size, len(self._output))], np.float32)

    def watch(self, tokens: npt.NDArray[np.int32], position: int, see: Watcher) -> Floats:
        assert self.program.tokens > 1, "in a step of one token threads have copies of their own"
        self._begin(tokens, position, IN_PLACE)
        owners = np.asarray(self.owners())
        pauses = {id(pause.ids): pause for pause in self._kept.pauses}
        for i, op in enumerate(self.program.ops):
            entries = np.flatnonzero(owners == i)
            pause = pauses.get(id(op.inputs[1])) if op.name == "experts" else None
            if pause and not self._all_there(pause, tokens.size):
                # Not from the router on: what stands before has run, some of it over its input.
                self._waves(pause, int(entries[0]), tokens.size)
                entries = entries[entries >= pause.last]
            for entry in entries:
                self.run_entry(int(entry))
            inputs, outputs = ([self._view(t, tokens.size) for t in tensors] for tensors in (op.inputs, op.outputs))
            see(op, inputs, outputs)
        return np.array(self._output[: min(tokens.size, len(self._output))], np.float32)

    def _walk(self, start: int, stop: int) -> None:
        # A chunk of a large model takes many seconds: between these pieces Python hears Ctrl+C.
        entries = len(self._tape) if self.program.tokens == 1 else CHUNK_ENTRIES
        for first in range(start, stop, entries):
            self._device.threads_run(self._tape[first : min(first + entries, stop)])

    def _all_there(self, pause: Pause, tokens: int) -> bool:
        guess = self._view(pause.guess, tokens) if pause.guess else None
        whole = pause.layer.choose(self._view(pause.ids, tokens), guess)
        pause.list_all()
        return whole

    def _waves(self, pause: Pause, start: int, tokens: int) -> int:
        """Runs the entries from `start` to the last wave, of which none is run before its experts are in memory."""
        self._walk(start, pause.first)
        for ready in pause.layer.waves():
            pause.list_ready(ready, self._view(pause.ids, tokens))
            if pause.counters:
                self._piece(pause.counters.offset, COUNTERS, np.dtype(np.int64))[:] = 0
            self._walk(pause.first, pause.last)
        return pause.last

    def _begin(self, tokens: npt.NDArray[np.int32], position: int, slots: StateSlots) -> None:
        self._input[: tokens.size] = tokens
        self._control[:6] = tokens.size, position, slots.source, slots.target, slots.kept, slots.kept_tokens

    def entries(self) -> list[str]:
        """The kernel of each tape entry."""
        return [name for name, _ in self._kept._entries]

    def owners(self) -> list[int]:
        """The op of each tape entry, by its number in the Program."""
        return self._kept.owners

    def run_entry(self, index: int) -> None:
        """Run one entry by itself, for the step that `run` was last called for; in order, they are that step again."""
        self._device.threads_run(self._tape[index : index + 1])

    def _view(self, tensor: Tensor, tokens: int) -> npt.NDArray[Any]:
        """A tensor of the step that runs, where it stands in the arena."""
        shape = (min(tensor.shape[0], tokens), *tensor.shape[1:])
        kind = np.dtype(np.float32 if tensor.dtype == "f32" else np.int32)
        start = self._kept.offset(tensor) + 4 * tensor.offset
        return np.ndarray(shape, kind, self._arena, start, tuple(4 * s for s in tensor.strides))

    def _piece(self, offset: int, count: int, kind: np.dtype[np.generic]) -> npt.NDArray[np.generic]:
        return self._arena[offset : offset + count * kind.itemsize].view(kind)


def zeros(shape: tuple[int, ...], kind: np.dtype[Any]) -> npt.NDArray[Any]:
    """np.zeros whose first element stands at a multiple of 64 bytes; untouched pages take no memory."""
    count = int(np.prod(shape))
    raw = np.zeros(count * kind.itemsize + ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % ALIGNMENT
    return raw[start : start + count * kind.itemsize].view(kind).reshape(shape)
