"""How the weights of a model are to be loaded: the modes and their settings; must not know numpy or models."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from localmoe.errors import SettingError

MODES = ("auto", "mmap", "slots", "off")


@dataclass(frozen=True, slots=True)
class Loading:
    """`mode` as `--lazy` has it; sizes in bytes, None: as much as is free.

    off: everything is read at start. mmap: the system's page cache keeps what it likes. slots: experts are read into
    slots of our own, everything else stays in memory. auto: chosen by size, free memory and disk.
    """

    mode: str = "auto"
    memory: int | None = None  # of the whole process: its own memory, and its pages of files
    expert_cache: int | None = None  # of that, for experts
    policy: str = "lfru"
    lookahead: bool = False  # read ahead what the next layer's router would choose now
    trace: Path | None = None  # where every choice of experts is written

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise SettingError(f"loading mode {self.mode!r} is not known; these are: {', '.join(MODES)}")
