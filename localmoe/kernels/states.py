"""Which tokens the recurrent states in each slot of a device have seen; holds no state and knows no op.

A state cannot be cut back as a KV cache can. So a step reads the states in one slot and writes them in another, and
what it is interrupted at stays as it was before; and every part of a prompt leaves them once more as they were BACK
tokens before its end. There an answer can begin anew, as can another one to a prompt whose last tokens a template
renders differently; anything else goes on from the nearest of these marks, or from the beginning. When slots are full,
marks that stand close together give way first.
"""

from __future__ import annotations

from itertools import pairwise

from localmoe.kernels.program import IN_PLACE, StateSlots

BACK = 16  # tokens: more than a template puts between a message and its answer


class States:
    """The bookkeeping of `count` slots; 0 where a model has no recurrent layer, and everything can be cut back."""

    def __init__(self, count: int) -> None:
        self._count = count
        self._seen: dict[int, int] = {}  # slot -> tokens that its states have seen
        self._marks: set[int] = set()  # slots that are kept when a step has gone on from them
        self.changes = 0  # how often somebody was told a slot to write to

    def nearest(self, position: int) -> int:
        """The last position up to `position` whose states are there, from which a step can go on; 0 always is."""
        if not self._count:
            return position
        return max((seen for seen in self._seen.values() if seen <= position), default=0)

    def positions(self) -> list[int]:
        """Where states are there, ascending."""
        return sorted(self._seen.values())

    def slot(self, position: int) -> int:
        """Where the states of one of these positions are."""
        return next(slot for slot, seen in self._seen.items() if seen == position)

    def emptied(self) -> int:
        """A slot with nothing in it, for states from elsewhere; a step may still take it."""
        self.changes += 1
        return self._emptied()

    def put(self, slot: int, position: int) -> None:
        """States from elsewhere have been put there; they are kept like a prompt's."""
        self._seen[slot] = position
        self._marks.add(slot)

    def forget(self, position: int) -> None:
        """The tokens from `position` on are no longer those that were seen."""
        self._seen = {slot: seen for slot, seen in self._seen.items() if seen <= position}

    def begin(self, position: int, tokens: int, *, marked: bool) -> StateSlots:
        """The slots of a step of so many tokens from a position that `nearest` gave; with `marked` its states can be
        returned to. Until `finish`, those that it writes count as empty."""
        if not self._count:
            return IN_PLACE
        self.changes += 1
        source = next((slot for slot, seen in self._seen.items() if seen == position), None)
        assert source is not None or position == 0, "no states to go on from"
        target = self._emptied(source, None)
        back = tokens - BACK if marked else 0
        if back > 0:
            return StateSlots(target if source is None else source, target, self._emptied(source, target), back)
        if marked and source is not None:
            self._marks.add(source)
        return StateSlots(target if source is None else source, target)

    def finish(self, slots: StateSlots, position: int, tokens: int) -> None:
        """The step has left its states."""
        if not self._count:
            return
        if slots.source not in self._marks:
            self._seen.pop(slots.source, None)
        if slots.kept_tokens:
            self._seen[slots.kept] = position + slots.kept_tokens
            self._marks.add(slots.kept)
        self._seen[slots.target] = position + tokens

    def clear(self) -> None:
        self._seen.clear()
        self._marks.clear()

    def _emptied(self, *held: int | None) -> int:
        """A slot other than those of `held` with nothing in it: an empty one, or that of the mark nearest to the one
        before it, the last one only where there is no other."""
        empty = set(range(self._count)).difference(self._seen, held)
        slot = min(empty) if empty else self._crowded(held)
        self._seen.pop(slot, None)
        self._marks.discard(slot)
        return slot

    def _crowded(self, held: tuple[int | None, ...]) -> int:
        ordered = sorted(self._seen, key=self._seen.__getitem__)
        before = {slot: self._seen[earlier] for earlier, slot in pairwise(ordered)}
        marks = [slot for slot in ordered if slot not in held]
        return min(marks, key=lambda slot: (slot == marks[-1], self._seen[slot] - before.get(slot, 0)))
