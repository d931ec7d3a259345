"""The flags for how weights are loaded, with one meaning in every command; knows neither modes nor models.

Imports nothing heavy at the top: `localmoe --help` and a mistyped flag should answer at once.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from localmoe.cli.command import Flags, with_flags
from localmoe.experts.loading import MODES, POLICIES, Loading

PANEL = "Loading"
Lazy = Annotated[
    str,
    typer.Option(
        metavar="|".join(MODES),
        help="Loading of weights: off (all at start), mmap (when first used), slots (experts when they are chosen, "
        "within a budget of memory), or auto, which decides by size, memory and disk.",
        rich_help_panel=PANEL,
    ),
]
Memory = Annotated[
    str | None,
    typer.Option(
        metavar="SIZE",
        help="Budget of the whole process, such as 8GiB; by default what is free.",
        rich_help_panel=PANEL,
    ),
]
ExpertCache = Annotated[
    str | None,
    typer.Option(metavar="SIZE", help="Memory for experts; by default what the budget leaves.", rich_help_panel=PANEL),
]
ExpertPolicy = Annotated[
    str | None,
    typer.Option(
        metavar="|".join(POLICIES),
        help=f"Which experts stay where not all have room (default {Loading().policy}).",
        rich_help_panel=PANEL,
    ),
]
Lookahead = Annotated[
    bool,
    typer.Option(
        "--lookahead",
        help="Read experts ahead that the next layer may choose; seldom pays.",
        rich_help_panel=PANEL,
    ),
]
Trace = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="Write down which experts each token chose.", rich_help_panel=PANEL),
]
LOADING_FLAGS: Flags = {
    "lazy": (Lazy, Loading().mode),
    "memory": (Memory, None),
    "expert_cache": (ExpertCache, None),
    "expert_policy": (ExpertPolicy, None),
    "lookahead": (Lookahead, False),
    "trace": (Trace, None),
}


def with_loading_flags(command: Callable[..., None]) -> Callable[..., None]:
    """Gives a command the flags of `read_loading`; they reach it as its parameter `loading`."""
    return with_flags(command, LOADING_FLAGS, "loading")
