"""What the chat says about weights in memory: rows for `/lazy`, `/memory` and `/stats`, and the line below an answer;
draws nothing, knows no command and no session."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Protocol

import numpy as np
import numpy.typing as npt

from localmoe.errors import SettingError
from localmoe.experts.loading import MODES, Loading
from localmoe.experts.telemetry import Counts, Room
from localmoe.kernels.program import Progress
from localmoe.memory import available_nbytes, parse_size, pressure, readable_size, resident, total_nbytes

Rows = list[tuple[str, str]]
HOW_TO_COUNT = "nobody counts here which experts are chosen: /lazy slots does, from then on"


class ResidentModel(Protocol):
    """What is asked of a model about its weights and its memory."""

    @property
    def nbytes(self) -> int: ...
    @property
    def context(self) -> int: ...
    @property
    def cached(self) -> list[int]: ...
    @property
    def loading(self) -> Loading: ...
    @property
    def residency_mode(self) -> str: ...
    @property
    def loading_reason(self) -> str: ...
    def change_loading(self, loading: Loading, progress: Progress | None = None) -> None: ...
    def close(self) -> None: ...
    def cache_nbytes(self, tokens: int) -> int: ...
    def room(self) -> Room | None: ...
    def uses(self) -> npt.NDArray[np.int64] | None: ...
    @property
    def expert_blocks(self) -> list[int]: ...


def changed(loading: Loading, words: str) -> Loading:
    """What `/lazy words` asks for, where `loading` was asked for before. A size is that of the expert cache and stays
    for the next time; auto chooses it anew. Raises SettingError."""
    mode, _, size = words.partition(" ")
    if mode not in MODES:
        raise SettingError(f"there is no loading mode {mode!r}; possible: {', '.join(MODES)}")
    if size and mode != "slots":
        raise SettingError(f"only slots takes a size, as in /lazy slots 4GiB, not {mode}")
    nbytes = parse_size(size) if size else None if mode == "auto" else loading.expert_cache
    return replace(loading, mode=mode, expert_cache=nbytes)


def runs_because(model: ResidentModel) -> str:
    """The mode that runs and why, "slots: 7.80 GB of weights, 4.20 GB free"."""
    return f"{model.residency_mode}: {_why(model)}"


def _why(model: ResidentModel) -> str:
    return model.loading_reason.removeprefix(f"{model.residency_mode}: ")


def loading_rows(model: ResidentModel) -> Rows:
    """What runs, why, and what was asked for."""
    rows = [("loading", model.residency_mode), ("why", _why(model)), ("asked", _flags(model.loading))]
    return rows + [("experts", _experts(room)) for room in [model.room()] if room]


def memory_rows(model: ResidentModel) -> Rows:
    """What is where: the process, its budget, weights, KV cache, and what is left of the machine."""
    own, room, used = resident(), model.room(), len(model.cached)
    rows = [
        (
            "process",
            f"{readable_size(own.anonymous)} of its own, {readable_size(own.files)} of files; "
            f"{readable_size(own.peak)} at most until now",
        )
    ]
    if room:
        rows += [
            ("budget", readable_size(room.budget_nbytes)),
            ("dense weights", f"{readable_size(room.dense_nbytes)}, always in memory"),
            ("experts", _experts(room)),
            ("beside", f"{readable_size(room.beside_nbytes)} for KV cache, working memory, vocabulary and Python"),
        ]
    else:
        rows.append(("weights", f"{readable_size(model.nbytes)} in files, loaded as {model.residency_mode}"))
    cache = f"{readable_size(model.cache_nbytes(used))} of {readable_size(model.cache_nbytes(model.context))} used"
    stalled = pressure()
    trouble = "" if stalled is None else f"; memory pressure {stalled:.0f} %"
    return [
        *rows,
        ("KV cache", f"{cache}, {used} of {model.context} tokens"),
        ("machine", f"{readable_size(available_nbytes())} of {readable_size(total_nbytes())} free{trouble}"),
    ]


def figures(counts: Counts) -> list[str]:
    """What experts cost, in short phrases, the most telling first; none where nobody counted."""
    if not counts.chosen:
        return []
    nbytes, share = counts.nbytes_per_token, 100 * counts.reading_share
    each = f"{nbytes / 1e9:.2f} GB" if nbytes >= 1e7 or not nbytes else readable_size(nbytes)
    told = [f"hit {100 * counts.hit_rate:.0f} %", f"{each}/token"]
    if counts.seconds > 0:
        told.append(f"read {share:.0f} % compute {100 - round(share)} %")
    return told


def status(counts: Counts, room: Room | None, width: int) -> str:
    """The line below an answer, as much of it as fits `width` columns; empty where nobody counted."""
    told = figures(counts)
    if told and room:
        told.append(f"RSS {resident().nbytes / 1e9:.1f}/{room.budget_nbytes / 1e9:.1f} GB")
    while told and len(" · ".join(told)) > width:
        shorter = told.pop().rpartition(" compute ")[0]
        told += [shorter] if shorter else []
    return " · ".join(told)


def reads(counts: Callable[[], Counts]) -> Callable[[], str]:
    """What was read from disk since this call, to be told behind a label; nothing where nothing was."""
    before = counts()

    def told() -> str:
        nbytes = (counts() - before).nbytes_read
        return f" · {readable_size(nbytes)} read" if nbytes else ""

    return told


def experts_told(counts: Counts) -> str:
    """The figures of a whole answer, and how good the guesses of the next layer's experts were."""
    told = figures(counts)
    if counts.ahead_read:
        told.append(f"guesses {100 * counts.ahead_used / counts.ahead_read:.0f} % right")
    return " · ".join(told)


def _experts(room: Room) -> str:
    return (
        f"{readable_size(room.held_nbytes)} in {readable_size(room.room_nbytes)} of slots; "
        f"all of them are {readable_size(room.experts_nbytes)}"
    )


def _flags(loading: Loading) -> str:
    """As on the command line."""
    sizes: Sequence[tuple[str, int | None]] = (("--memory", loading.memory), ("--expert-cache", loading.expert_cache))
    told = [f"--lazy {loading.mode}", *(f"{flag} {_exactly(nbytes)}" for flag, nbytes in sizes if nbytes)]
    told += [f"--expert-policy {loading.policy}"] if loading.policy != Loading().policy else []
    told += ["--lookahead"] if loading.lookahead else []
    told += [f"--trace {loading.trace}"] if loading.trace else []
    return " ".join(told)


def _exactly(nbytes: int) -> str:
    """A size as someone would write it: 8589934592 -> "8GiB"."""
    for unit, size in (("GiB", 1 << 30), ("GB", 10**9), ("MiB", 1 << 20), ("MB", 10**6)):
        if nbytes % size == 0:
            return f"{nbytes // size}{unit}"
    return f"{nbytes / 1e9:.2f}GB" if nbytes >= 1e8 else f"{nbytes}B"
