"""What a way of loading comes to for one model: the mode that runs, why, and who keeps its experts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from localmoe.errors import SettingError
from localmoe.experts.choice import choose
from localmoe.experts.history import History
from localmoe.experts.loading import Loading
from localmoe.experts.sizes import Sizes
from localmoe.experts.telemetry import Counts, Room
from localmoe.formats import Bytes, MadeSlabs, Weight
from localmoe.kernels.program import Op, Program, Progress
from localmoe.loader.source import Source
from localmoe.memory import available_nbytes, readable_size

if TYPE_CHECKING:  # what only some modes need is imported when one is taken up
    from localmoe.experts.mapped import MappedExperts
    from localmoe.experts.pressure import Pressure
    from localmoe.experts.slots import SlotExperts
    from localmoe.experts.trace import TraceWriter

SMALL = 2  # times the weights: what fits so often needs no reckoning
ROUNDING = 1.005  # so that a size that is named as enough is, once it is rounded to three places
SHARE = 0.9  # of the free memory is the budget where none was asked for: the system needs some for itself


@dataclass(frozen=True, eq=False, slots=True)
class Residence:
    """`mode` is "off", "mmap" or "slots"; `fits`: the page cache may have it all, and it is worth reading ahead."""

    mode: str
    why: str
    fits: bool
    sizes: Sizes
    budget: int
    beside: int
    slots: SlotExperts | None = None
    mapped: MappedExperts | None = None
    pressure: Pressure | None = None

    @property
    def experts(self) -> SlotExperts | MappedExperts | None:
        """Who is asked behind each router; None where nobody is."""
        return self.slots or self.mapped

    def preload(self) -> None:
        """Begin to read what earlier sessions used most."""
        if self.slots:
            self.slots.preload()

    @property
    def tidy(self) -> Callable[[], None] | None:
        """What keeps the page cache free of experts, where they have slots."""
        return self.slots.leave_page_cache if self.slots else None

    def step(self, seconds: float) -> None:
        """Behind each step: it took so long."""
        if self.experts:
            self.experts.count(seconds=seconds)
        if self.pressure:
            self.pressure.look()

    def counts(self) -> Counts:
        return self.experts.counts if self.experts else Counts()

    def uses(self) -> npt.NDArray[np.int64] | None:
        return self.experts.history.uses if self.experts else None

    @property
    def problem(self) -> str:
        """What went wrong with a trace, in a line; empty where nothing did."""
        return self.experts.trace.problem if self.experts and self.experts.trace else ""

    def room(self) -> Room | None:
        if not self.slots:
            return None
        held, room = self.slots.held_nbytes, self.slots.room_nbytes
        return Room(self.sizes.experts, room, held, self.budget, self.sizes.dense, self.beside)

    def close(self) -> None:
        """Whoever gave a trace goes on with it, or closes it."""
        if self.slots:
            self.slots.close()


def settle(
    loading: Loading,
    source: Source,
    program: Program,
    sizes: Sizes,
    needed: Callable[[], int],
    known: Callable[[], History],
    trace: TraceWriter | None = None,
    own: int = 0,
) -> Residence:
    """Decides what "auto" means now, and opens what is needed for it. `program` is that of one token, `needed` tells
    the bytes that are needed beside the weights, `known` what is known of the experts' use. `own`: bytes that the
    model has in memory by now, which are counted as free, since they will be part of what it needs, or given back.

    Raises SettingError for a budget that is too small, with the smallest that would do.
    """
    ops = expert_ops(program)
    budget = loading.memory or int(SHARE * (available_nbytes() + max(own, _made_nbytes(ops))))
    small = SMALL * sizes.weights < budget and loading.mode != "slots"
    # Which takes a moment, and small models should start at once.
    beside = 0 if small else needed() + _spare_nbytes(ops)
    mode, why, direct = loading.mode, "as asked", True
    if mode == "auto":
        choice = choose(sizes, beside, budget, promised=loading.memory is not None)
        mode, why = choice.mode, choice.why
        if mode == "slots":
            direct, found = _probed(source, ops)
            why += found
    _require_memory(source, made_weights(program, mode))
    fits = sizes.weights + beside <= budget
    how = (mode, why, fits, sizes, budget, beside)
    if mode == "slots":
        if not ops:
            raise SettingError(f"{source.path}: the model has no experts to keep in slots; --lazy mmap and off will do")
        room = room_for_experts(loading, source, ops, sizes, budget, beside)
        store = _slots(loading, source, ops, room, known(), direct, trace)
        return Residence(*how, slots=store, pressure=_pressure(store))
    if ops and (trace or not fits):
        from localmoe.experts.mapped import MappedExperts

        return Residence(*how, mapped=MappedExperts(ops, known(), advise=not fits, trace=trace))
    return Residence(*how)


def _spare_nbytes(ops: Sequence[Op]) -> int:
    """What readers need to make experts that no file has as they are."""
    from localmoe.experts.making import spare_nbytes
    from localmoe.experts.slots import THREADS

    return spare_nbytes((weight for op in ops for weight in op.matrices), THREADS)


def _probed(source: Source, ops: Sequence[Op]) -> tuple[bool, str]:
    """Whether experts are best read past the page cache, and the disk's speed in words."""
    from localmoe.experts.pieces import pieces
    from localmoe.experts.probe import probe

    disk = probe(pieces((weight for op in ops for weight in op.matrices), source.files))
    if disk is None:
        return True, ""
    return disk.way == "direct", f"; disk {readable_size(disk.best.nbytes_per_second)}/s"


def _slots(
    loading: Loading,
    source: Source,
    ops: Sequence[Op],
    room: int,
    history: History,
    direct: bool,
    trace: TraceWriter | None,
) -> SlotExperts:
    from localmoe.experts.policies import policy_of
    from localmoe.experts.slots import SlotExperts

    how = {"direct": direct, "lookahead": loading.lookahead}
    return SlotExperts(ops, source.files, room, policy_of(loading.policy), history, trace=trace, **how)


def _pressure(store: SlotExperts) -> Pressure:
    from localmoe.experts.pressure import Pressure

    return Pressure(store)


def make(program: Program, residence: Residence, progress: Progress | None) -> list[Bytes]:
    """The slabs of weights that files do not hold as they are, but of experts that slots make; they live as long as
    somebody holds them."""
    weights = made_weights(program, residence.mode)
    found: list[Bytes] = []
    for weight in weights:
        for slab in weight.slabs:
            found.append(slab)
            if progress:
                progress("making weights", len(found), sum(len(weight.slabs) for weight in weights))
    return found


def made_weights(program: Program, mode: str) -> list[Weight]:
    """Weights of which a mode has all slabs made when it is taken up."""
    ops = [op for op in program.ops if op.name != "experts" or mode != "slots"]
    return [weight for op in ops for weight in op.matrices if isinstance(weight.slabs, MadeSlabs)]


def _made_nbytes(ops: Sequence[Op]) -> int:
    """Bytes of the experts that are made already, which a mode that needs them has and another gives back."""
    slabs = [weight.slabs for op in ops for weight in op.matrices if isinstance(weight.slabs, MadeSlabs)]
    return sum(len(each) * each.nbytes - each.missing_nbytes for each in slabs)


def _require_memory(source: Source, weights: Sequence[Weight]) -> None:
    """Raises SettingError where what has to be made does not fit: it could not be given back, as pages of files are."""
    slabs = [weight.slabs for weight in weights if isinstance(weight.slabs, MadeSlabs)]
    wanted, free = sum(each.missing_nbytes for each in slabs), available_nbytes()
    if wanted > free:
        raise SettingError(
            f"{source.path}: matrices that the files hold in another form take {readable_size(wanted)} of memory, and "
            f"{readable_size(free)} are free; --lazy slots makes experts one by one"
        )


def room_for_experts(
    loading: Loading, source: Source, ops: Sequence[Op], sizes: Sizes, budget: int, beside: int
) -> int:
    """Bytes for slots within the budget. Raises SettingError where they are too few."""
    from localmoe.experts.slots import least_room

    fixed, least = sizes.stays + beside, least_room(ops)
    room = min(budget - fixed, loading.expert_cache or budget)
    if room >= least:
        return room
    if loading.expert_cache is not None and loading.expert_cache < least:
        raise SettingError(
            f"{source.path}: an expert cache of {readable_size(loading.expert_cache)} is too small; at least "
            f"{readable_size(ROUNDING * least)} are needed"
        )
    raise SettingError(
        f"{source.path}: {readable_size(budget)} of memory are too few: {readable_size(sizes.stays)} of weights that "
        f"always stay, {readable_size(beside)} beside them and {readable_size(least)} for experts "
        f"need at least {readable_size(ROUNDING * (fixed + least))}"
    )


@contextmanager
def tracing(
    current: TraceWriter | None, loading: Loading, source: Source, ops: Sequence[Op]
) -> Iterator[TraceWriter | None]:
    """Who writes the trace that is asked for: who writes that file already, else a new one, of whom nothing is left
    where the `with` block raises. Behind it one that is no longer asked for is closed."""
    same = current is not None and current.path == loading.trace
    trace = current if same else _trace_of(loading, source, ops)
    try:
        yield trace
    except BaseException:
        if trace and not same:
            trace.discard()
        raise
    if current and not same:
        current.close()


def _trace_of(loading: Loading, source: Source, ops: Sequence[Op]) -> TraceWriter | None:
    """None where none is asked for, or nothing is to be written."""
    if loading.trace is None or not ops:
        return None
    from localmoe.experts.trace import Header, TraceWriter

    first = ops[0]
    nbytes = tuple(sum(weight.nbytes // weight.shape[0] for weight in op.matrices) for op in ops)
    name = str(source.metadata.get("general.name") or source.path.stem)
    header = Header(name, len(ops), first.weights[0].shape[0], first.inputs[1].shape[1], nbytes)
    return TraceWriter(loading.trace, header)


def looked_up(program: Program) -> list[Weight]:
    """Embeddings that are nothing else: a token reads a row."""
    multiplied = {id(weight) for op in program.ops if op.name != "embed" for weight in op.weights}
    embeddings = [weight for op in program.ops if op.name == "embed" for weight in op.weights]
    return [weight for weight in embeddings if id(weight) not in multiplied]


def expert_ops(program: Program) -> list[Op]:
    return [op for op in program.ops if op.name == "experts"]


def read_all(source: Source, progress: Progress | None = None) -> None:
    """Read every weight byte once, so that the page cache holds the file before the first token; but for what is made
    of bytes of the file, and then in memory."""
    done = 0
    report = partial(progress, "reading weights") if progress else None
    for weight in source.tensors.values():
        for slab in () if isinstance(weight.slabs, MadeSlabs) else weight.slabs:
            slab[::1024].max(initial=0)
            done += slab.size
        if report:
            report(done, source.nbytes)
