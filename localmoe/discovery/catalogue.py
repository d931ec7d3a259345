"""The models of this machine as a list that is asked again and again: names to complete, rows to show; what it learned
of a file it keeps while the file stays the same."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from time import monotonic

from localmoe.discovery.description import Described, describe
from localmoe.discovery.folders import Found
from localmoe.discovery.places import Place
from localmoe.discovery.search import Search, search
from localmoe.memory import available_nbytes, readable_size

FRESH_SECONDS = 5.0
NARROW = 60  # columns, below which a model gets two lines
HEADER = ("model", "size", "type", "parameters", "memory")
Heard = Callable[[str, int, int], None]


class Catalogue:
    """What `search` finds, looked for again when some seconds have passed."""

    def __init__(self, places: Sequence[Place] | None = None, clock: Callable[[], float] = monotonic) -> None:
        self._places, self._clock = places, clock
        self._search: Search | None = None
        self._until = 0.0
        self._known: dict[tuple[object, ...], Described] = {}

    def search(self) -> Search:
        """As it was some seconds ago, or now."""
        if self._search is None or self._clock() >= self._until:
            self._search = search(self._places)
            self._until = self._clock() + FRESH_SECONDS
        return self._search

    def names(self) -> list[str]:
        """What each model may be asked for by, for completion: its name, or its path where others have the same."""
        return [name for model in self.search().models if (name := self.title(model)).isprintable()]

    def title(self, model: Found) -> str:
        """The name that means this model and no other."""
        names = [other.name for other in self.search().models]
        return model.name if names.count(model.name) == 1 else str(model.path)

    def described(self, progress: Heard | None = None) -> list[Described]:
        """All of them, headers of new ones read; `progress` hears (what, done, total)."""
        models = self.search().models
        found = []
        for number, model in enumerate(models):
            if progress:
                progress("reading headers", number, len(models))
            found.append(self._described(model))
        return found

    def rows(
        self, width: int, progress: Heard | None = None
    ) -> tuple[tuple[str, ...], list[tuple[str, ...]], list[str]]:
        """(header, rows, remarks) for a screen of so many columns: what could talk, then what is broken or unknown;
        what is no such thing at all is counted in a remark."""
        free = available_nbytes()
        described = self.described(progress)
        shown = [d for d in described if d.kind in ("model", "unsupported", "broken")]
        shown.sort(key=lambda d: ("model", "unsupported", "broken").index(d.kind))
        rows = [self._row(entry, free) for entry in shown]
        remarks = [f"{self.title(d.found)}: {d.why or d.found.note}" for d in shown if d.why or d.found.note]
        others = [d.kind for d in described if d not in shown]
        counted = [f"{others.count(kind)} of kind {kind}" for kind in dict.fromkeys(others)]
        remarks += [f"left out: {', '.join(counted)}"] if counted else []
        remarks += self.search().notes
        if width >= NARROW:
            return HEADER, rows, remarks
        lines: list[tuple[str, ...]] = []
        for name, *facts in rows:
            lines += [(name,), ("  " + ", ".join(filter(None, facts)),)]
        return (), lines, remarks

    def _row(self, entry: Described, free: int) -> tuple[str, ...]:
        size = readable_size(entry.found.nbytes)
        return (self.title(entry.found), size, entry.quantisation, entry.size, entry.fits(free))

    def _described(self, model: Found) -> Described:
        try:
            changed = os.stat(model.path).st_mtime_ns
        except OSError:
            changed = 0
        key = (model.path, model.name, model.identity, model.nbytes, changed)
        if key not in self._known:
            self._known[key] = describe(model)
        return self._known[key]


def record(entry: Described, title: str, free: int) -> dict[str, object]:
    """For programs: bytes and counts; null is what nobody knows."""
    return {
        "name": title,
        "path": os.path.abspath(entry.found.path),
        "origin": entry.found.origin,
        "kind": entry.kind,
        "architecture": entry.architecture or None,
        "quantisation": entry.quantisation or None,
        "nbytes": entry.found.nbytes,
        "parameters": entry.parameters,
        "active_parameters": entry.active,
        "trained_context": entry.trained_context,
        "needed_nbytes": entry.needs,
        "least_nbytes": entry.least,
        "memory": entry.fits(free),
        "why": entry.why or entry.found.note or None,
    }
