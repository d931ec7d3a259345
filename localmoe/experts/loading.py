"""How the weights of a model are to be loaded: the modes and their settings; must not know numpy or models."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from localmoe.errors import SettingError
from localmoe.memory import parse_size

MODES = ("auto", "mmap", "slots", "off")
SLOTTED = ("slots", "auto")  # what may keep experts in slots
POLICIES = ("lfru", "lru", "history")


@dataclass(frozen=True, slots=True)
class Loading:
    """`mode` as `--lazy` has it; sizes in bytes, None: as much as is free.

    off: everything is read at start. mmap: the system's page cache keeps what it likes. slots: experts are read into
    slots of our own, everything else stays in memory. auto: chosen by size, free memory and disk. What a mode has no
    use for waits for one that has.
    """

    mode: str = "auto"
    memory: int | None = None  # of the whole process: its own memory, and its pages of files
    expert_cache: int | None = None  # of that, for experts
    policy: str = "lfru"
    lookahead: bool = False  # read ahead what the next layer's router would choose now
    trace: Path | None = None  # where every choice of experts is written
    learned: bool = True  # begin with what earlier sessions used most, and add this one to it

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise SettingError(f"loading mode {self.mode!r} is not known; these are: {', '.join(MODES)}")
        if self.policy not in POLICIES:
            raise SettingError(f"expert policy {self.policy!r} is not known; these are: {', '.join(POLICIES)}")


def read_loading(
    lazy: str | Loading = "auto",
    *,
    memory: str | int | None = None,
    expert_cache: str | int | None = None,
    expert_policy: str | None = None,
    lookahead: bool = False,
    trace: str | Path | None = None,
) -> Loading:
    """What was asked for, flag by flag; sizes in bytes or as they are written, "8GiB".

    Raises SettingError for values that are not possible, and for flags that contradict each other.
    """
    given = {
        "--memory": memory,
        "--expert-cache": expert_cache,
        "--expert-policy": expert_policy,
        "--lookahead": lookahead or None,
    }
    asked = [flag for flag, value in given.items() if value is not None]
    if isinstance(lazy, Loading):
        if asked or trace is not None:
            raise SettingError(f"{[*asked, '--trace'][0]} is part of the Loading that was given: set it there")
        return lazy
    loading = Loading(
        lazy,
        memory=_nbytes("--memory", memory),
        expert_cache=_nbytes("--expert-cache", expert_cache),
        policy="lfru" if expert_policy is None else expert_policy,
        lookahead=lookahead,
        trace=None if trace is None else Path(trace),
    )
    if asked and lazy not in SLOTTED:
        raise SettingError(f"{asked[0]} is for --lazy {' or '.join(SLOTTED)}, not for --lazy {lazy}")
    if loading.memory and loading.expert_cache and loading.expert_cache >= loading.memory:
        raise SettingError(
            f"--expert-cache {expert_cache} must be smaller than --memory {memory}: other weights, KV cache and Python "
            "take their part of it"
        )
    return loading


def _nbytes(flag: str, value: str | int | None) -> int | None:
    """Raises SettingError, which names the flag."""
    if value is None:
        return None
    try:
        return parse_size(str(value))
    except SettingError as error:
        raise SettingError(f"{flag}: {error}") from None
