"""What the commands share: the application, flags with one meaning everywhere, how a model is opened; knows no command.

Imports nothing heavy at the top: `localmoe --help` and a mistyped flag should answer at once.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from localmoe.errors import SettingError
from localmoe.named_templates import ALIASES, NAMED
from localmoe.settings import SETTINGS, SamplingSettings, is_whole

if TYPE_CHECKING:
    from localmoe.model import Model
    from localmoe.repl.render import Screen

app = typer.Typer(
    name="localmoe",
    help="Chat with open-weight language models, Mixture-of-Experts among them, on the machine you have.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def model_path(name: str) -> Path:
    """Where the model lies that was asked for, by path or by name. Raises FileFormatError."""
    if os.path.exists(name):
        return Path(name)
    from localmoe.discovery.names import resolve

    return resolve(name)


MODEL_HELP = "A GGUF file (of a split model: any part), a Hugging Face folder, or a name that `localmoe models` lists."
ModelArgument = Annotated[Path, typer.Argument(metavar="MODEL", help=MODEL_HELP, show_default=False, parser=model_path)]
ModelOrBundled = Annotated[
    Path | None,
    typer.Argument(
        metavar="MODEL", help=MODEL_HELP + " Without it, the small model that comes along.", parser=model_path
    ),
]
System = Annotated[str | None, typer.Option("--system", "-s", help="System prompt.")]
TemplateName = Annotated[
    str | None,
    typer.Option(
        "--template",
        metavar="NAME|FILE",
        help=f"Chat template instead of the model's own: a file, or {', '.join(sorted({*NAMED, *ALIASES}))}.",
    ),
]
Context = Annotated[int | None, typer.Option("--context", "-c", min=1, help="Tokens that the conversation may have.")]
Threads = Annotated[
    int | None,
    typer.Option("--threads", "-t", min=1, help="CPU threads; by default the physical cores that are quick."),
]
Pin = Annotated[
    str | None,
    typer.Option(
        "--pin",
        metavar="auto|CPUS",
        help="Keep each thread on a CPU of its own, for a machine that nothing else uses (Linux): auto (the quick "
        "physical cores), or a list such as 0-3,8.",
    ),
]
DeviceName = Annotated[str, typer.Option("--device", help="Where to compute: cpu, or reference (slow, for checking).")]
KeyValues = Literal["f32", "f16", "q8_0", "q4_0"]
KV_HELP = "Format of the KV cache: f32, f16, q8_0 (half the memory of f16) or q4_0 (a quarter)."
KeyValueFormat = Annotated[KeyValues, typer.Option("--kv", help=KV_HELP)]
Quantize = Annotated[
    str | None,
    typer.Option("--quantize", metavar="TYPE", help="Of a folder: quantise its weights on loading: q4_K_M, q8_0 …"),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


Flags = Mapping[str, tuple[Any, Any]]  # a parameter's name -> its annotation and its default


def with_flags(command: Callable[..., None], flags: Flags, gathered: str) -> Callable[..., None]:
    """Gives a command more flags, which reach it as one dict, its parameter `gathered`."""
    added = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)
        for name, (annotation, default) in flags.items()
    ]

    @wraps(command)
    def run(**values: Any) -> None:
        given = {name: values.pop(name) for name in flags}
        command(**values, **{gathered: given})

    own = inspect.signature(command, eval_str=True)
    parameters = [p.replace(kind=p.KEYWORD_ONLY) for p in own.parameters.values() if p.name != gathered]
    run.__signature__ = own.replace(parameters=[*parameters, *added])  # type: ignore[attr-defined]
    return run


def with_sampling_flags(command: Callable[..., None]) -> Callable[..., None]:
    """Gives a command a flag for each sampling setting; all reach it as `sampling`, those not given as None."""
    flags = {
        name: (
            Annotated[
                int | None if is_whole(name) else float | None,
                typer.Option(
                    help=f"{setting.metadata['help']} (default {setting.default:g}{or_recommended(name)})",
                    rich_help_panel="Sampling",
                ),
            ],
            None,
        )
        for name, setting in SETTINGS.items()
    }
    return with_flags(command, flags, "sampling")


def or_recommended(name: str) -> str:
    return " unless the model says" if name in SamplingSettings.FILE_KEYS.values() else ""


def load(screen: Screen, path: Path | None, **how: Any) -> Model:
    """The model, with a progress bar while it opens; the bundled one without a path."""
    import localmoe

    if path is None:
        from localmoe.loader.locate import bundled

        path = bundled()
    with screen.progress(f"opening {path.name}") as bar:
        return localmoe.load(path, progress=bar, **how)


@contextmanager
def opened(screen: Screen, path: Path | None, **how: Any) -> Iterator[Model]:
    """The model, closed after the `with` block."""
    model = load(screen, path, **how)
    try:
        if model.loading.trace and model.uses() is None:
            raise SettingError(f"--trace: {model.name} has no experts whose choices could be written")
        yield model
    finally:
        model.close()
