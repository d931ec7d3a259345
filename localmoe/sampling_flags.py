"""Flags of the command line made from the sampling settings; knows neither a command nor what a setting does."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import wraps
from typing import Annotated, Any

import typer

from localmoe.settings import SETTINGS, SamplingSettings, is_whole


def with_sampling_flags(command: Callable[..., None]) -> Callable[..., None]:
    """Gives a command a flag for each sampling setting; those given reach it as its last parameter, `sampling`."""
    flags = [
        inspect.Parameter(
            name,
            inspect.Parameter.KEYWORD_ONLY,
            default=None,
            annotation=Annotated[
                int | None if is_whole(name) else float | None,
                typer.Option(
                    help=f"{setting.metadata['help']} (default {setting.default:g}{or_recommended(name)})",
                    rich_help_panel="Sampling",
                ),
            ],
        )
        for name, setting in SETTINGS.items()
    ]

    @wraps(command)
    def run(**values: Any) -> None:
        given = {name: values.pop(name) for name in SETTINGS}
        command(**values, sampling={name: value for name, value in given.items() if value is not None})

    own = inspect.signature(command, eval_str=True)
    parameters = [p.replace(kind=p.KEYWORD_ONLY) for p in own.parameters.values() if p.name != "sampling"]
    run.__signature__ = own.replace(parameters=[*parameters, *flags])  # type: ignore[attr-defined]
    return run


def or_recommended(name: str) -> str:
    return " unless the model says" if name in SamplingSettings.FILE_KEYS.values() else ""
