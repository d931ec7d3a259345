"""What each policy would have kept, reckoned from a trace, beside the best that was possible; reads no weights.

The rules are the store's. Layers whose experts have one size share the slots of one pool. What a decoded token chose
stays while its layer runs. A chunk of a prompt chooses most experts of a layer once: a layer that has its share of the
slots makes room from its own, one that has less from those that have more, so that a long prompt leaves most as it was.

Policies are compared on the second half of a trace, from an empty cache; the first half is their earlier session.
Belady's bound (IBM Systems Journal 5, 1966) lets go what will be needed last, and is not held to the rule for prompts.
A hit is an expert that was in memory when it was chosen; chosen by several tokens of a step, it counts once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import numpy.typing as npt

from localmoe.errors import SettingError
from localmoe.experts.history import History, Scores
from localmoe.experts.policies import POLICIES, Policy
from localmoe.experts.pool import share_of
from localmoe.experts.telemetry import Counts
from localmoe.experts.trace import Choice, Header, Trace
from localmoe.kernels.program import Progress

Places = npt.NDArray[np.intp]  # experts of all layers, counted through: layer · E + id

BOUND = "belady"
SIZES = (0.03, 0.06, 0.12, 0.25, 0.5, 0.75)  # of the bytes of all experts


@dataclass(frozen=True, slots=True)
class Result:
    """What a policy reached with slots of `nbytes`, for decoded tokens and for chunks of prompts."""

    policy: str
    nbytes: int
    decoded: Counts
    prompts: Counts

    @property
    def counts(self) -> Counts:
        """Of decoded tokens, where there are any."""
        return self.decoded if self.decoded.tokens else self.prompts


@dataclass(frozen=True, slots=True)
class Event:
    """One layer of one step: the distinct experts, and how many tokens chose each."""

    step: int
    layer: int
    tokens: int
    ids: npt.NDArray[np.int32]
    counts: npt.NDArray[np.int64]
    places: Places


class Judge(Protocol):
    """Scores all experts (L · E,) after each event: the lowest goes first."""

    free: bool  # whether a chunk of a prompt may take slots of other layers

    def hear(self, event: Event) -> None: ...

    def scores(self) -> Scores: ...


class Follower:
    """A policy, which knows the past."""

    free = False

    def __init__(self, policy: Policy, header: Header, prior: Scores) -> None:
        self._policy, self._step = policy, 0
        self._history = History(header.layers, header.experts, prior)

    def hear(self, event: Event) -> None:
        if event.step != self._step:
            self._history.tick()
            self._step = event.step
        self._history.used(event.layer, event.ids, event.counts)

    def scores(self) -> Scores:
        return self._policy(self._history).reshape(-1)


class Oracle:
    """Belady's: knows when each expert will be chosen next."""

    free = True

    def __init__(self, events: Sequence[Event], header: Header) -> None:
        soon = np.full(header.layers * header.experts, -np.inf)
        self._next = []
        for time in range(len(events), 0, -1):
            places = events[time - 1].places
            self._next.append(soon[places])
            soon[places] = -time
        self._scores = soon

    def hear(self, event: Event) -> None:
        self._scores[event.places] = self._next.pop()

    def scores(self) -> Scores:
        return self._scores


@dataclass(slots=True)
class Pool:
    """Slots of some layers: `share` of them are a layer's while it reads a prompt."""

    slots: int
    share: int
    held: npt.NDArray[np.bool_]  # (L, E) of all layers
    filled: int = 0

    def there(self, places: Places) -> npt.NDArray[np.bool_]:
        found: npt.NDArray[np.bool_] = self.held.reshape(-1)[places]
        return found

    def take(self, missing: Places) -> None:
        self.held.reshape(-1)[missing] = True
        self.filled += len(missing)

    def let_go(self, candidates: Places, scores: Scores, count: int) -> None:
        """The `count` candidates with the lowest scores."""
        self.held.reshape(-1)[candidates[np.argpartition(scores[candidates], count - 1)[:count]]] = False
        self.filled -= count

    def serve_token(self, places: Places, missing: Places, scores: Scores) -> None:
        """All that a token chose in one layer is held together."""
        self.take(missing)
        if self.filled > self.slots:
            others = self.held.copy()
            others.reshape(-1)[places] = False
            self.let_go(np.flatnonzero(others), scores, self.filled - self.slots)

    def serve_chunk(self, layer: int, missing: Places, scores: Scores) -> None:
        """One is read after the other, and the lowest that the layer has goes: its best stay, and the one read last."""
        room = min(len(missing), self.slots - self.filled)
        while room < len(missing) and self.held[layer].sum() + room < self.share:
            self.let_go(self._beyond_share(), scores, 1)
            room += 1
        own = np.flatnonzero(self.held[layer]) + layer * self.held.shape[1]
        rest, last = np.concatenate((own, missing[:-1])), missing[-1]
        best = rest[np.argsort(scores[rest], kind="stable")[len(rest) - (len(own) + room - 1) :]]
        self.held[layer] = False
        self.filled -= len(own)
        self.take(np.append(best, last))

    def _beyond_share(self) -> Places:
        """The experts of layers that have more than their share; all where no layer has."""
        counts = self.held.sum(axis=1, keepdims=True)
        beyond = np.flatnonzero(self.held & (counts > self.share))
        return beyond if beyond.size else np.flatnonzero(self.held)

    def serve_freely(self, missing: Places, scores: Scores) -> None:
        """The best of everything is held."""
        self.take(missing)
        if self.filled > self.slots:
            self.let_go(np.flatnonzero(self.held), scores, self.filled - self.slots)


@dataclass(slots=True)
class Cache:
    """Of one size: a pool for each layer, some of them the same; and what became of it."""

    nbytes: int
    pools: list[Pool]
    tallies: dict[bool, npt.NDArray[np.int64]] = field(
        default_factory=lambda: {decoded: np.zeros(5, np.int64) for decoded in (True, False)}
    )

    def counts(self, decoded: bool) -> Counts:
        return Counts(*self.tallies[decoded].tolist())


def replay(
    trace: Trace,
    sizes: Sequence[float] = SIZES,
    policies: Mapping[str, Policy] = POLICIES,
    progress: Progress | None = None,
) -> list[Result]:
    """Of each policy, and of the bound, for each size: a share of the bytes of all experts. Sizes that come to the same
    number of slots count once. Raises SettingError for a trace of less than two steps."""
    header = trace.header
    earlier, later = halves(trace)
    learned = np.zeros((header.layers, header.experts))
    for event in earlier:
        learned[event.layer, event.ids] += event.counts
    prior = learned / np.maximum(learned.sum(axis=1, keepdims=True), 1)
    judges: dict[str, Judge] = {name: Follower(policy, header, prior) for name, policy in policies.items()}
    judges[BOUND] = Oracle(later, header)
    results = []
    for done, (name, judge) in enumerate(judges.items()):
        if progress:
            progress(f"replaying {name}", done, len(judges))
        caches = list({cache.nbytes: cache for cache in (cache_of(header, size) for size in sizes)}.values())
        run(later, header, caches, judge)
        results += [Result(name, cache.nbytes, cache.counts(True), cache.counts(False)) for cache in caches]
    return results


def halves(trace: Trace) -> tuple[list[Event], list[Event]]:
    """The events of the first and the second half, of the steps."""
    steps = sorted({choice.step for choice in trace.choices})
    if len(steps) < 2:
        raise SettingError(f"a trace of {len(steps)} steps has no two halves to compare; at least 2 steps have")
    events = [event_of(choice, trace.header.experts) for choice in trace.choices]
    middle = steps[len(steps) // 2]
    return [e for e in events if e.step < middle], [e for e in events if e.step >= middle]


def event_of(choice: Choice, experts: int) -> Event:
    ids, counts = np.unique(choice.ids, return_counts=True)
    return Event(choice.step, choice.layer, len(choice.ids), ids, counts, choice.layer * experts + ids.astype(np.intp))


def cache_of(header: Header, size: float) -> Cache:
    """Each pool has the same share of its experts, and at least as many slots as a token needs in one layer."""
    pools = {}
    for nbytes in set(header.expert_nbytes):
        layers = header.expert_nbytes.count(nbytes)
        slots = max(header.used, min(layers * header.experts, round(size * layers * header.experts)))
        pools[nbytes] = Pool(slots, share_of(slots, layers), np.zeros((header.layers, header.experts), bool))
    total = sum(nbytes * pool.slots for nbytes, pool in pools.items())
    return Cache(total, [pools[nbytes] for nbytes in header.expert_nbytes])


def run(events: Sequence[Event], header: Header, caches: Sequence[Cache], judge: Judge) -> None:
    """All sizes at once, since what a judge thinks does not depend on what is held."""
    step = 0
    for event in events:
        judge.hear(event)
        scores = judge.scores()
        begins, step = event.step != step, event.step
        decoded, chosen = event.tokens == 1, len(event.places)
        for cache in caches:
            pool = cache.pools[event.layer]
            missing = event.places[~pool.there(event.places)]
            hits, read = chosen - len(missing), len(missing) * header.expert_nbytes[event.layer]
            cache.tallies[decoded] += (begins, event.tokens * begins, chosen, hits, read)
            if not len(missing):
                continue
            if decoded:
                pool.serve_token(event.places, missing, scores)
            elif judge.free:
                pool.serve_freely(missing, scores)
            else:
                pool.serve_chunk(event.layer, missing, scores)
