"""The KV state of token prefixes on disk: given back before a prompt runs, kept while and after it does; must not know
sessions, terminals, or what the tokens mean.

Nothing that goes wrong with a file or a disk breaks an answer: it becomes a message, and the tokens are run again. Rows
and states count only when all of a file has been read and checked, and `cached` says so last.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Protocol

import numpy as np

from localmoe.formats import Bytes
from localmoe.interrupt import Pool
from localmoe.kernels.cache_state import CacheState
from localmoe.kernels.cpu.build import cache_folder
from localmoe.memory import readable_size
from localmoe.prompt_cache.entries import Entry, Ids, Part, agreeing, cover, digests, named, shared
from localmoe.prompt_cache.folder import ModelFolder
from localmoe.prompt_cache.segment import DamagedError, file_nbytes, header, read_rows, read_states, write
from localmoe.prompt_cache.space import Space
from localmoe.prompt_cache.writer import Writer

if TYPE_CHECKING:
    from concurrent.futures import Future

    from localmoe.model import Model

SEGMENT_NBYTES, SEGMENT_TOKENS = 8 << 20, 512  # the most rows of one file; three are in memory when they are written
LEAST = 64  # tokens that are worth a file, or a look into one
READERS, AHEAD = 3, 4  # threads that read and check, files in memory while rows are copied
STATES_APART, STATES_KEPT = 2048, 4  # tokens between states while a prompt is read; positions of one conversation


class KeptModel(Protocol):
    """What is asked of a model; see `model.Model`."""

    @property
    def cached(self) -> list[int]: ...
    @property
    def unshifted(self) -> int: ...
    @property
    def cache_state(self) -> CacheState: ...
    def resumes(self, position: int) -> int: ...


class PromptCache:
    """Kept states of one open model. One thread at a time may use it; `close` it before the model."""

    def __init__(self, model: KeptModel, identity: Callable[[], bytes], root: Path, limit: int | None = None) -> None:
        """`identity`: asked once, when it is first needed. `limit`: bytes in `root`, all models together; None takes 8
        GiB or a tenth of the free disk."""
        self._model, self._identity = model, identity
        self._space, self._writer = Space(root, limit), Writer()
        self._opened: ModelFolder | None = None
        self._known = _no_ids()  # of these tokens all rows are on disk, or on their way
        self._own: set[Path] = set()  # files of the conversation that was kept last
        self._unusable: set[Entry] = set()
        self._failed = False
        self._told: set[str] = set()
        self._opening = Lock()
        self._messages: deque[str] = deque()

    def take_messages(self) -> list[str]:
        """What went wrong since they were taken last, a line each."""
        return [self._messages.popleft() for _ in range(len(self._messages))]

    def restore(self, tokens: Sequence[int]) -> int:
        """Put into the model what the disk has of these tokens beyond what the model can go on from, but for the last,
        which has to run. Returns where kept tokens go on behind some that are not: their number if they do not."""
        self._writer.drain()  # of states that the next step would change
        ids = np.array(tokens, np.int32)
        if ids.size - 1 - self._model.resumes(shared(self._cached(), ids)) < LEAST:
            return len(tokens)
        try:
            return self._restore(ids[:-1], len(tokens))
        except OSError as error:
            self._tell(f"the kept state of this conversation cannot be read: {_said(error)}")
            return len(tokens)

    def keep(self, *, done: bool) -> None:
        """Write what stands in the model's cache and not on disk; whole segments only, unless an answer is `done`: then
        Ctrl+C, which by now has nothing else to stop, ends the keeping."""
        if len(self._model.cached) < LEAST:
            return
        if self._failed:
            if not done:
                return
            self._failed, self._known = False, _no_ids()
        try:
            self._keep(self._cached()[: self._model.unshifted], done)
        except OSError as error:
            self._cannot_keep(error)
        except KeyboardInterrupt:
            if not done:
                raise

    def forget(self, tokens: Sequence[int]) -> int:
        """Remove what is kept of this text, that which other texts begin with as well included; how many files."""
        ids = np.array(tokens, np.int32)
        try:
            self._writer.drain()
            entries, names = self._entries(ids)
        except OSError as error:
            self._tell(f"what is kept of a conversation cannot be removed: {_said(error)}")
            return 0
        own = [entry for entry in entries if self._is_of(entry, ids, names)]
        for entry in own:
            self._folder.remove(entry)
        self._known = _no_ids()
        return len(own)

    def _is_of(self, entry: Entry, ids: Ids, names: dict[int, str]) -> bool:
        """Whether a file, before which the text is that of `ids`, has more of it than any text may have."""
        if not entry.is_rows or names.get(entry.stop) == entry.after:
            return True
        tokens = self._tokens(entry)
        return tokens is not None and shared(tokens, ids[entry.start :]) >= LEAST

    def close(self) -> None:
        """Write what is on its way."""
        self._writer.close()

    def prepare(self) -> None:
        """Have the model's identity ready, which the first prompt would wait for; from any thread."""
        with suppress(OSError):  # which that prompt will meet as well, and say
            _ = self._folder

    @property
    def _folder(self) -> ModelFolder:
        """Raises OSError."""
        with self._opening:
            if self._opened is None:
                model = self._identity()
                self._opened = ModelFolder(self._space.root / model[:12].hex(), model, self._segment_tokens)
            return self._opened

    @cached_property
    def _segment_tokens(self) -> int:
        return max(min(SEGMENT_TOKENS, SEGMENT_NBYTES // max(self._model.cache_state.row_nbytes, 1)), 1)

    def _cached(self) -> Ids:
        return np.array(self._model.cached, np.int32)

    def _entries(self, ids: Ids) -> tuple[list[Entry], dict[int, str]]:
        """What is kept of texts that begin as this one does, and the digests in their names."""
        entries = [entry for entry in self._folder.entries() if entry not in self._unusable]
        found = digests(self._folder.model, ids, [position for entry in entries for position in entry[:2]])
        names = {position: named(digest) for position, digest in found.items()}
        return agreeing(entries, names), names

    def _restore(self, ids: Ids, end: int) -> int:
        while True:
            state = self._model.cache_state
            entries, names = self._entries(ids)
            start = shared(self._cached(), ids)
            parts = cover(ids, start, [entry for entry in entries if entry.is_rows], names, self._tokens)
            reached = parts[-1].stop if parts else start
            goal: Entry | None = None
            if state.state_nbytes:
                here = (entry for entry in entries if not entry.is_rows and entry.start <= reached)
                goal = max(here, key=lambda entry: entry.start, default=None)
                reached = goal.start if goal else 0
                parts = [part for part in parts if part.start < reached]
            if reached - self._model.resumes(min(start, reached)) < LEAST:
                return end if state.state_nbytes else self._behind(ids, start, entries, names, end)
            if self._bring(state, ids[:reached], parts) and (goal is None or self._bring_states(state, goal)):
                self._folder.used([part.entry for part in parts] + ([goal] if goal else []))
                if goal is None and end - 1 - reached >= LEAST:
                    return self._behind(ids, reached, entries, names, end)
                return end

    def _behind(self, ids: Ids, reached: int, entries: Sequence[Entry], names: dict[int, str], end: int) -> int:
        """The first position behind a hole from which on enough is kept."""
        rows = [entry for entry in entries if entry.is_rows]
        for start in sorted({entry.start for entry in rows if entry.start > reached}):
            parts = cover(ids, start, rows, names, self._tokens)
            if parts and parts[-1].stop - start >= LEAST:
                return start
        return end

    def _tokens(self, entry: Entry) -> Ids | None:
        try:
            return self._folder.tokens(entry)
        except (DamagedError, OSError) as error:
            self._refuse(entry, error)
            return None

    def _bring(self, state: CacheState, ids: Ids, parts: Sequence[Part]) -> bool:
        """The rows of the parts into the model, in order; False where one could not be had, which ends them."""
        if not parts:
            return True
        row_nbytes, model = state.row_nbytes, self._folder.model
        largest = max(file_nbytes(part.entry, _tokens_of(part.entry) * row_nbytes) for part in parts)
        free = deque(np.empty(largest, np.uint8) for _ in range(AHEAD))
        waiting = deque(parts)
        reading: deque[tuple[Part, Bytes, Future[tuple[Ids, Bytes]]]] = deque()
        state.cut(parts[0].start)
        pool = Pool(READERS)
        try:
            while waiting or reading:
                while waiting and free:
                    entry, buffer = waiting[0].entry, free.popleft()
                    job = pool.submit(read_rows, self._folder.place(entry), model, entry, buffer, row_nbytes)
                    reading.append((waiting.popleft(), buffer, job))
                part, buffer, job = reading.popleft()
                tokens, rows = pool.result(job)
                wanted = ids[part.start : part.stop]
                first, stop = part.first, part.first + wanted.size
                if not np.array_equal(tokens[first:stop], wanted):
                    raise DamagedError("it is not what its name says")
                state.put_rows(part.start, rows, first, stop)
                state.extend(wanted.tolist())
                free.append(buffer)
        except (DamagedError, OSError) as error:
            self._refuse(part.entry, error)
            return False
        finally:
            pool.close()
        return True

    def _bring_states(self, state: CacheState, entry: Entry) -> bool:
        slot, targets = state.room_for_states()
        try:
            read_states(self._folder.place(entry), self._folder.model, entry, targets)
        except (DamagedError, OSError) as error:
            self._refuse(entry, error)
            return False
        state.states_stand(slot, entry.start)
        return True

    def _refuse(self, entry: Entry, error: DamagedError | OSError) -> None:
        """Do without a file, and say why, unless another process has removed it."""
        if isinstance(error, DamagedError):
            self._messages.append(
                f"the kept state of a conversation is damaged ({entry.place}: {error}): what is needed of it is "
                "computed again"
            )
        elif not isinstance(error, FileNotFoundError):
            self._tell(f"the kept state of this conversation cannot be read: {_said(error)}")
        if not isinstance(error, OSError):
            self._folder.remove(entry)
        self._unusable.add(entry)
        self._known = _no_ids()

    def _keep(self, ids: Ids, done: bool) -> None:
        state = self._model.cache_state
        start = shared(self._known, ids)
        if start < self._known.size:
            self._own = set()  # another conversation, or another branch
        if ids.size - start < (LEAST if done else self._segment_tokens) and not state.state_nbytes:
            return
        entries, names = self._entries(ids)
        path = [entry for entry in entries if names.get(entry.stop) == entry.after]
        self._own.update(map(self._folder.place, path))
        parts = cover(ids, start, [entry for entry in entries if entry.is_rows], names, self._tokens)
        start = parts[-1].stop if parts else start
        least = (1 if state.state_nbytes else LEAST) if done else self._segment_tokens
        while ids.size - start >= least:
            stop = min(start + self._segment_tokens, ids.size)
            if self._failed or not self._put_rows(state, ids, start, stop, done):
                break
            start = stop
        self._known = ids[:start]
        new, gone = self._states_to_keep(state, ids[:start], path, done) if state.state_nbytes else ([], [])
        if new or done:
            changes = state.changes

            def finish() -> None:
                for entry, head, content in new:
                    self._write(entry, head, content, lambda: state.changes == changes)
                for entry in gone:
                    self._folder.remove(entry)
                self._folder.used(path)

            self._writer.put(finish)
        if not done and new:
            self._writer.drain()  # before the next step changes them

    def _put_rows(self, state: CacheState, ids: Ids, start: int, stop: int, done: bool) -> bool:
        found = digests(self._folder.model, ids, (start, stop))
        entry = Entry(start, stop, named(found[start]), named(found[stop]))
        rows = np.empty((stop - start) * state.row_nbytes, np.uint8)
        state.copy_rows(start, stop, rows)
        head = header(self._folder.model, entry, found[start], ids[start:stop])
        return self._writer.put(lambda: self._write(entry, head, [rows]), briefly=not done)

    def _states_to_keep(
        self, state: CacheState, ids: Ids, path: Sequence[Entry], done: bool
    ) -> tuple[list[tuple[Entry, bytes, list[Bytes]]], list[Entry]]:
        """Headers and views of the states at the newest positions, and which are too many with them."""
        kept = sorted(entry.start for entry in path if not entry.is_rows)
        here = [position for position in state.state_positions() if LEAST <= position <= ids.size]
        wanted = here[-2:] if done else here[-1:] if here and here[-1] - max(kept, default=0) >= STATES_APART else []
        found = digests(self._folder.model, ids, [position for position in wanted if position not in kept])
        new = []
        for position, digest in found.items():
            entry = Entry(position, position, named(digest), named(digest))
            new.append((entry, header(self._folder.model, entry, digest, _no_ids()), state.states(position)))
        most = sorted({*kept, *found})[:-STATES_KEPT]
        return new, [entry for entry in path if not entry.is_rows and entry.start in most]

    def _write(self, entry: Entry, head: bytes, content: list[Bytes], sound: Callable[[], bool] = lambda: True) -> None:
        place = self._folder.place(entry)
        try:
            self._space.root.mkdir(mode=0o700, parents=True, exist_ok=True)
            nbytes = file_nbytes(entry, sum(piece.size for piece in content))
            if self._space.make_room(nbytes, self._own):
                self._folder.path.mkdir(mode=0o700, exist_ok=True)
                write(place, head, content, sound)
                self._own.add(place)
                self._unusable.discard(entry)
                return
            most = readable_size(self._space.limit())
            self._tell(
                f"the state of this conversation outgrows the {most} that it may take on disk: it is kept in part"
            )
        except OSError as error:
            self._cannot_keep(error)
        self._failed = True

    def _cannot_keep(self, error: OSError) -> None:
        self._failed = True
        self._tell(f"the state of this conversation cannot be kept on disk: {_said(error)}")

    def _tell(self, message: str) -> None:
        """Once, however often it happens."""
        if message not in self._told:
            self._told.add(message)
            self._messages.append(message)


def open_prompt_cache(model: Model, folder: Path | None = None, limit: int | None = None) -> PromptCache:
    """Kept states of a model in `folder`, else beside the compiled kernels; nothing is read yet. `limit`: bytes that
    those of all models may take; None takes 8 GiB or a tenth of the free disk, whichever is less."""
    from localmoe.prompt_cache.identity import identity

    return PromptCache(model, lambda: identity(model), folder or cache_folder().parent / "prompts", limit)


def _no_ids() -> Ids:
    return np.zeros(0, np.int32)


def _tokens_of(entry: Entry) -> int:
    return entry.stop - entry.start


def _said(error: OSError) -> str:
    place = f" ({error.filename})" if error.filename else ""
    return f"{error.strerror or error}{place}"
