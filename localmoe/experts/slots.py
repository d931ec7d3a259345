"""Experts in slots: memory of our own and bounded, filled by reader threads, emptied by a policy; see `residency.py`.

A key is layer · E + expert. All that is written here is written by the thread that computes, in an order that leaves
the tables true wherever Ctrl+C strikes; readers fill memory and say so.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from time import perf_counter

import numpy as np

from localmoe.errors import LocalMoeError, ReadError, SettingError
from localmoe.experts.history import History
from localmoe.experts.making import Making, Place, makings
from localmoe.experts.policies import Policy
from localmoe.experts.pool import CLOSED, FREE, Pool, share_of
from localmoe.experts.readers import Load, Piece, Readers
from localmoe.experts.reading import BLOCK, FileReader
from localmoe.experts.telemetry import Counts
from localmoe.experts.trace import TraceWriter
from localmoe.formats import Bytes, MadeSlabs, Weight
from localmoe.kernels.program import Op
from localmoe.kernels.residency import Addresses, Ids
from localmoe.loader.files import MappedFile, by_address, place

THREADS = 4  # readers: two reads in flight nearly saturate a disk, and a thread that computes is in the way of one
IN_FLIGHT = 8  # experts of a prompt's chunk that are read while others are multiplied
ONCE = np.ones(1, np.int64)  # by one token
NOBODY = np.empty(0, np.int32)


@dataclass(frozen=True, slots=True)
class Size:
    """What an expert of a layer takes in a slot: where each matrix has its room."""

    starts: tuple[int, ...]
    nbytes: int

    @classmethod
    def of(cls, op: Op) -> Size:
        rooms = [-(-w.slab_nbytes // BLOCK) * BLOCK + BLOCK for w in op.matrices]  # a file's bytes begin anywhere
        return cls(tuple(sum(rooms[:i]) for i in range(len(rooms))), sum(rooms))


class SlotExperts:
    """A Residency of all `experts` ops of a model, whose weights are views of `files`; `room` in bytes."""

    def __init__(
        self,
        ops: Sequence[Op],
        files: Sequence[MappedFile],
        room: int,
        policy: Policy,
        history: History,
        *,
        direct: bool = True,
        lookahead: bool = False,
        trace: TraceWriter | None = None,
    ) -> None:
        """Raises SettingError where there is too little room for one token's experts of a layer, or where weights are
        not as the files have them."""
        self.lookahead, self.policy, self.history, self.trace = lookahead, policy, history, trace
        self._counted: dict[str, float] = dict.fromkeys((field.name for field in fields(Counts)), 0)
        self._files = by_address(files)
        # All of them now: a file whose name another one has later can be read on, but not be opened.
        self._readers = {file: FileReader(file, direct) for file in self._files}
        shape = history.uses.shape
        self.width = shape[1]
        self.ready = np.zeros(shape, bool)
        self.held = np.zeros(shape, bool)
        self.ahead = np.zeros(shape, bool)  # read because of a guess, and not chosen since
        self.loading: dict[int, Load] = {}
        self.pools = pools(ops, room)
        self.layers = [SlotLayer(self, i, op, self.pools[Size.of(op)]) for i, op in enumerate(ops)]
        self._by_weight = {id(layer.op.weights[0]): layer for layer in self.layers}
        self.team = Readers(THREADS)

    def layer(self, op: Op) -> SlotLayer:
        return self._by_weight[id(op.weights[0])]

    @property
    def counts(self) -> Counts:
        return Counts(**self._counted)  # type: ignore[arg-type]  # whole numbers but for the seconds

    @property
    def room_nbytes(self) -> int:
        return sum(pool.nbytes for pool in self.pools.values())

    @property
    def held_nbytes(self) -> int:
        return sum(int((pool.owner >= 0).sum()) * pool.slot_nbytes for pool in self.pools.values())

    def preload(self) -> None:
        """Begin to read what earlier sessions used most, as long as there are free slots and nothing else to read."""
        prior = self.history.prior
        for key in np.argsort(-prior, axis=None, kind="stable")[: int(np.count_nonzero(prior))].tolist():
            layer = self.layers[key // self.width]
            if layer.pool.free() is not None:
                layer.read_ahead(key - layer.first)

    def leave_page_cache(self) -> None:
        """Give back what the page cache has of experts: the system reads far beyond what was asked for."""
        for layer in self.layers:
            for weight in layer.op.matrices:
                for view in [view for matrix in range(len(weight.slabs)) for view in weight.views(matrix)]:
                    reader, offset, nbytes = self.find(weight, view)
                    reader.forget(offset, nbytes)

    def begin(self) -> None:
        """A step begins."""
        self.history.tick()
        for load in list(self.loading.values()):
            load.left = True
            if load.complete or load.given_up:
                self._take(load)
            elif not load.asked:  # an interrupted step did not come to it
                self.team.ask(load)
        for pool in self.pools.values():  # what an interrupted step left half done
            empty = np.flatnonzero(pool.owner >= 0)
            empty = empty[~self.ready.reshape(-1)[pool.owner[empty]]]
            pool.owner[[slot for slot in empty.tolist() if int(pool.owner[slot]) not in self.loading]] = FREE

    def collect(self) -> None:
        """Loads that are complete become experts that are there."""
        for load in self.team.finished():
            self._take(load)

    def _take(self, load: Load) -> None:
        """A load that failed makes room, unless someone waits for it and wants to hear why."""
        if self.loading.get(load.key) is not load:
            return
        if load.complete and load.error is None:
            self.layers[load.key // self.width].settle(load)
            self.ready.flat[load.key] = True
        elif not (load.ahead or load.left or load.given_up):
            return
        self._forget(load)

    def raise_error(self, keys: Sequence[int]) -> None:
        """Why a load that somebody waits for has failed; it may be asked for again."""
        for load in [self.loading[key] for key in keys if key in self.loading]:
            if load.complete and load.error is not None and not load.left:
                self._forget(load)
                if isinstance(load.error, LocalMoeError):
                    raise load.error
                layer, expert = self.layers[load.key // self.width], load.key % self.width
                name = layer.op.weights[0].name
                raise ReadError(f"{name}: expert {expert} could not be read: {load.error!r}") from load.error

    def _forget(self, load: Load) -> None:
        del self.loading[load.key]
        if load.error is not None or load.given_up:
            self.ahead.flat[load.key] = False
            self.layers[load.key // self.width].pool.owner[load.slot] = FREE

    def withdraw(self, pool: Pool) -> int | None:
        """A slot for whom somebody waits, of an expert that was to be read ahead when nobody has begun to: the last of
        them, as the first ones are the likeliest."""
        for load in reversed(self.loading.values()):
            if load.ahead and self.layers[load.key // self.width].pool is pool and load.give_up():
                self._forget(load)
                return load.slot
        return None

    def wait(self) -> None:
        """Until something has been read, for a step that can do nothing else."""
        start = perf_counter()
        if load := self.team.wait():
            self._take(load)
        self.count(waited_seconds=perf_counter() - start)

    def count(self, **more: float) -> None:
        for name, n in more.items():
            self._counted[name] += n

    def shrink(self, share: float) -> None:
        """Give back so much of every pool's memory, the least useful experts first; loads that are running stay."""
        for pool in self.pools.values():
            least = max(layer.used for layer in self.layers if layer.pool is pool)
            for _ in range(min(int(share * pool.open_slots), pool.open_slots - least)):
                slot = pool.free()
                slot = self.victim(pool, None) if slot is None else slot
                if slot is None:
                    break
                pool.give_back(slot)

    def grow(self, share: float) -> None:
        """Open so much of every pool again, where it was given back."""
        for pool in self.pools.values():
            closed = np.flatnonzero(pool.owner == CLOSED)
            pool.owner[closed[: 1 + int(share * pool.owner.size)]] = FREE

    def victim(self, pool: Pool, layer: SlotLayer | None) -> int | None:
        """The slot of the expert that goes first, its expert gone; None where every one is in use.

        With a `layer`, which reads a prompt, one of its own if it has its share, else of those that have more than
        theirs: a long prompt passes through few slots and leaves the others as they are.
        """
        may_go = pool.owner >= 0
        may_go[may_go] = (self.ready & ~self.held).reshape(-1)[pool.owner[may_go]]
        if layer is not None:
            owners = pool.owner // self.width
            sizes = np.bincount(owners[pool.owner >= 0], minlength=len(self.layers))
            if sizes[layer.index] >= pool.share:
                may_go &= owners == layer.index
            elif (beyond := may_go & (sizes[owners] > pool.share)).any():
                may_go = beyond
        slots = np.flatnonzero(may_go)
        if not slots.size:
            return None
        slot = int(slots[np.argmin(self.policy(self.history).reshape(-1)[pool.owner[slots]])])
        key = pool.owner[slot]
        self.ready.flat[key] = self.ahead.flat[key] = False
        pool.owner[slot] = FREE
        return slot

    def close(self) -> None:
        """Stop reading; the slots must not be used any more, and their memory is the system's again."""
        try:
            self.team.close()
        finally:
            for reader in self._readers.values():
                reader.close()
            self.loading.clear()
            for pool in self.pools.values():
                pool.close()

    def find(self, weight: Weight, view: Bytes) -> Place:
        """Where some bytes of a weight lie: the file's reader, offset and size."""
        found = place(self._files, view.ctypes.data, view.size)
        if found is None:
            raise SettingError(
                f"{weight.name}: its experts are in memory, made when the model was opened: --lazy slots is not "
                "possible; mmap and off are"
            )
        file, offset = found
        return self._readers[file], offset, view.size


class SlotLayer:
    """The experts of one op."""

    def __init__(self, store: SlotExperts, index: int, op: Op, pool: Pool) -> None:
        self.store, self.index, self.op, self.pool = store, index, op, pool
        self.count, self.used = op.weights[0].shape[0], op.inputs[1].shape[1]
        self.size = Size.of(op)
        for weight in op.matrices:
            for view in weight.views(0):
                store.find(weight, view)
        zeros = [np.zeros(self.count, np.int64) for _ in op.matrices]
        self._addresses: tuple[Addresses, Addresses, Addresses] = (zeros[0], zeros[1], zeros[2])
        self.first = index * store.width  # the key of its expert 0
        self._there: Ids = NOBODY
        self._missing: list[int] = []
        self._prompt = False

    @property
    def addresses(self) -> tuple[Addresses, Addresses, Addresses]:
        return self._addresses

    def choose(self, ids: Ids, guess: Ids | None = None) -> bool:
        store = self.store
        if self.index == 0:
            store.begin()
        store.collect()
        experts, counts = (ids[0].copy(), ONCE) if len(ids) == 1 else np.unique(ids, return_counts=True)
        store.history.used(self.index, experts, counts)
        if store.trace:
            store.trace.chose(store.history.clock, self.index, ids)
        store.held[:] = False
        there = store.ready[self.index][experts]
        self._there, self._prompt = experts[there], len(ids) > 1
        self._missing = experts[~there].tolist()
        store.held[self.index][self._there] = True
        guessed = int(store.ahead[self.index][experts].sum())  # also those that are still being read
        store.ahead[self.index][experts] = False
        first, hits = self.index == 0, self._there.size
        store.count(steps=first, tokens=len(ids) * first, chosen=experts.size, hits=hits, ahead_used=guessed)
        self._ask(self._missing)
        if guess is not None and len(ids) == 1 and self.index + 1 < len(store.layers):
            store.layers[self.index + 1].expect(guess)
        return not self._missing

    def waves(self) -> Iterator[Ids]:
        store, missing, ready = self.store, self._missing, self._there
        while True:
            if len(ready):
                yield ready
                store.held[self.index][ready] = False
            if not missing:
                return
            ready = self._arrived(missing)
            missing = [e for e in missing if not store.held[self.index, e]]

    def _arrived(self, missing: list[int]) -> Ids:
        """The first of the missing experts to be there, held; all that are by now."""
        store, first = self.store, self.first
        while True:
            store.collect()
            store.raise_error([first + e for e in missing])
            arrived = np.asarray([e for e in missing if store.ready[self.index, e]], np.int32)
            store.held[self.index][arrived] = True  # before others are asked for, who would take their slots
            self._ask([e for e in missing if not store.held[self.index, e]])
            if arrived.size:
                return arrived
            store.wait()

    def expect(self, guess: Ids) -> None:
        """Read ahead what may be chosen next, where nobody has to wait for it."""
        for expert in np.unique(guess).tolist():
            if self.read_ahead(expert):
                self.store.ahead[self.index, expert] = True
                self.store.count(ahead_read=1)

    def read_ahead(self, expert: int) -> bool:
        """Whether it begins to be read now."""
        key = self.first + expert
        return not self.store.ready.flat[key] and key not in self.store.loading and self._load(expert, ahead=True)

    def _ask(self, experts: Sequence[int]) -> None:
        """Begin to read as many of these as there is room for, of a prompt's chunk a few at a time."""
        store, first = self.store, self.first
        running = sum(first + e in store.loading for e in experts)
        for load in [store.loading[first + e] for e in experts if first + e in store.loading]:
            store.team.hurry(load)
        for expert in experts:
            if self._prompt and running >= IN_FLIGHT:
                return
            if first + expert in store.loading or store.ready[self.index, expert]:
                continue
            if not self._load(expert):
                return
            running += 1

    def _load(self, expert: int, *, ahead: bool = False) -> bool:
        """Give an expert a slot and have it read; False where every slot is in use."""
        slot = self.pool.free()
        if slot is None:
            slot = self.store.victim(self.pool, self if self._prompt and not ahead else None)
        if slot is None and not ahead:
            slot = self.store.withdraw(self.pool)
        if slot is None:
            return False
        key, room = self.first + expert, self.pool.place(slot)
        pieces: deque[Piece | Making] = deque()
        made: list[tuple[Weight, int, Bytes]] = []
        for weight, start in zip(self.op.matrices, self.size.starts, strict=True):
            if isinstance(weight.slabs, MadeSlabs):
                made.append((weight, expert, np.frombuffer(room, np.uint8, weight.slab_nbytes, start)))
                continue
            reader, offset, nbytes = self.store.find(weight, weight.slabs[expert])
            first, end = offset // BLOCK * BLOCK, -(-(offset + nbytes) // BLOCK) * BLOCK
            pieces.append(Piece(reader, first, room[start : start + end - first]))
        pieces.extend(makings(made, self.store.find))
        nbytes = sum(piece.nbytes for piece in pieces)
        load = Load(pieces, len(pieces), key, slot, ahead)
        self.pool.owner[slot] = key
        self.store.loading[key] = load
        self.store.team.ask(load)
        self.store.count(nbytes_read=nbytes)
        return True

    def settle(self, load: Load) -> None:
        """The addresses of an expert that has been read."""
        expert, slot = load.key - self.first, self.pool.address + load.slot * self.pool.slot_nbytes
        for table, weight, start in zip(self._addresses, self.op.matrices, self.size.starts, strict=True):
            slabs = weight.slabs
            inside = 0 if isinstance(slabs, MadeSlabs) else self.store.find(weight, slabs[expert])[1] % BLOCK
            table[expert] = slot + start + inside


def pools(ops: Sequence[Op], room: int) -> dict[Size, Pool]:
    """Experts of different sizes have pools of their own, each with the same share of its experts."""
    of_size: dict[Size, list[Op]] = {}
    for op in ops:
        of_size.setdefault(Size.of(op), []).append(op)
    whole = sum(size.nbytes * op.weights[0].shape[0] for size, same in of_size.items() for op in same)
    least = least_room(ops)
    if room < least:
        raise SettingError(f"{room} bytes for experts are too few: {least} are needed")
    spare, found = min(room, whole) - least, {}
    for size, same in of_size.items():
        experts, used = sum(op.weights[0].shape[0] for op in same), max(op.inputs[1].shape[1] for op in same)
        more = int(spare * (experts - used) / max(whole - least, 1)) if whole > least else 0
        slots = min(used + more, experts)
        found[size] = Pool(slots, size.nbytes, share_of(slots, len(same)))
    return found


def least_room(ops: Sequence[Op]) -> int:
    """Bytes of the smallest slots that work: of each size of expert, as many as a token chooses in a layer."""
    used: dict[Size, int] = {}
    for op in ops:
        used[Size.of(op)] = max(used.get(Size.of(op), 0), op.inputs[1].shape[1])
    return sum(size.nbytes * count for size, count in used.items())
