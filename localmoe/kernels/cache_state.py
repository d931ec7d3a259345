"""What stands in a device's cache, as bytes: KV rows of runs of tokens and recurrent states, read out and put back;
knows no file and no format.

A device gives each of its arrays as bytes: keys and values of a layer as (heads, S, row), recurrent states as (slots,
bytes). Rows of a run of T tokens lie array after array, (heads, T, row) each.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from localmoe.formats import Bytes
from localmoe.kernels.states import States


class CacheState:
    """The cache of one model, whose `cached` list and `States` it keeps true."""

    def __init__(self, rows: Sequence[Bytes], states: Sequence[Bytes], cached: list[int], seen: States) -> None:
        self._rows, self._states, self._cached, self._seen = rows, states, cached, seen

    @property
    def layout(self) -> tuple[tuple[int, int], ...]:
        """(heads, bytes of a row) of every array, and (0, bytes) of every recurrent state."""
        rows = [(array.shape[0], array.shape[2]) for array in self._rows]
        return (*rows, *((0, array.shape[1]) for array in self._states))

    @property
    def row_nbytes(self) -> int:
        """Of one token, all arrays together."""
        return sum(array.shape[0] * array.shape[2] for array in self._rows)

    @property
    def state_nbytes(self) -> int:
        """Of the recurrent states at one position; 0 without any."""
        return sum(array.shape[1] for array in self._states)

    def copy_rows(self, start: int, stop: int, target: Bytes) -> None:
        """The rows of the cached tokens start:stop into `target`, which has just their size."""
        assert 0 <= start < stop <= len(self._cached) and target.size == (stop - start) * self.row_nbytes
        for array, part in self._parts(target, stop - start):
            part[...] = array[:, start:stop]

    def cut(self, position: int) -> None:
        """The tokens from `position` on no longer count, and their rows may be put anew."""
        assert position <= len(self._cached), "a hole in the cache"
        del self._cached[position:]
        self._seen.forget(position)

    def put_rows(self, position: int, source: Bytes, first: int, stop: int) -> None:
        """Of the rows of a run of tokens, those of its tokens first:stop to positions position…, behind all that
        counts."""
        tokens = source.size // self.row_nbytes
        assert position >= len(self._cached) and 0 <= first < stop <= tokens
        for array, part in self._parts(source, tokens):
            array[:, position : position + stop - first] = part[:, first:stop]

    def extend(self, tokens: Sequence[int]) -> None:
        """The rows that were put behind the cached tokens are those of `tokens`."""
        self._cached.extend(tokens)

    @property
    def changes(self) -> int:
        """How often states may have been written."""
        return self._seen.changes

    def state_positions(self) -> list[int]:
        """Where recurrent states are kept, ascending."""
        return self._seen.positions()

    def states(self, position: int) -> list[Bytes]:
        """Views of the recurrent states at one of these positions, which hold while `changes` stays the same."""
        slot = self._seen.slot(position)
        return [array[slot] for array in self._states]

    def room_for_states(self) -> tuple[int, list[Bytes]]:
        """A slot with nothing in it and views of it, to be filled."""
        slot = self._seen.emptied()
        return slot, [array[slot] for array in self._states]

    def states_stand(self, slot: int, position: int) -> None:
        """The slot has been filled with the states behind the first `position` tokens, all of them cached."""
        assert position <= len(self._cached)
        self._seen.put(slot, position)

    def _parts(self, rows: Bytes, tokens: int) -> Iterator[tuple[Bytes, Bytes]]:
        """Every array with its part of a run's rows, (heads, T, row)."""
        at = 0
        for array in self._rows:
            heads, _, row = array.shape
            end = at + heads * tokens * row
            yield array, rows[at:end].reshape(heads, tokens, row)
            at = end
