"""The command line: flags to function calls, and the ONE place where an error becomes a message and an exit status.

Imports nothing heavy at the top: `localmoe --help` and a mistyped flag should answer at once.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NoReturn

import typer

from localmoe.errors import LocalMoeError, SettingError
from localmoe.sampling_flags import with_sampling_flags
from localmoe.settings import SamplingSettings

if TYPE_CHECKING:
    from localmoe.model import Model
    from localmoe.repl.render import Screen
    from localmoe.session import Session

app = typer.Typer(
    name="localmoe",
    help="Chat with open-weight language models, Mixture-of-Experts among them, on the machine you have.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

MODEL_HELP = "A GGUF file (of a split model: any part) or a Hugging Face folder."
ModelArgument = Annotated[Path, typer.Argument(metavar="MODEL", help=MODEL_HELP, show_default=False)]
ModelOrBundled = Annotated[
    Path | None, typer.Argument(metavar="MODEL", help=MODEL_HELP + " Without it, the small model that comes along.")
]
System = Annotated[str | None, typer.Option("--system", "-s", help="System prompt.")]
TemplateName = Annotated[
    str | None, typer.Option("--template", metavar="NAME|FILE", help="Chat template instead of the model's own.")
]
Context = Annotated[int | None, typer.Option("--context", "-c", min=1, help="Tokens that the conversation may have.")]
Threads = Annotated[
    int | None,
    typer.Option("--threads", "-t", min=1, help="CPU threads; by default the physical cores that are quick."),
]
DeviceName = Annotated[str, typer.Option("--device", help="Where to compute: cpu, or reference (slow, for checking).")]
Lazy = Annotated[
    str,
    typer.Option(
        "--lazy",
        help="Loading: mmap (read weights when first used), auto (also ahead, if they fit) or off (all at start).",
    ),
]
KeyValueFormat = Annotated[
    Literal["f32", "f16", "q8_0"],
    typer.Option("--kv", help="Format of the KV cache: f32, f16, or q8_0 (8 bits, about half the memory of f16)."),
]
Quantize = Annotated[
    str | None,
    typer.Option("--quantize", metavar="TYPE", help="Of a folder: quantise its weights on loading: q4_K_M, q8_0 …"),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def print_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import PackageNotFoundError, version

        try:
            print("localmoe", version("localmoe"))
        except PackageNotFoundError:
            print("localmoe, run from its source without being installed")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=print_version, is_eager=True, help="Print the version.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show where a bug happened (also LOCALMOE_DEBUG=1).")] = False,
) -> None:
    """Flags before the command; `main` looks for --debug itself."""


@app.command()
@with_sampling_flags
def chat(
    model: ModelOrBundled = None,
    system: System = None,
    template: TemplateName = None,
    context: Context = None,
    threads: Threads = None,
    device: DeviceName = "cpu",
    lazy: Lazy = "auto",
    kv: KeyValueFormat = "f16",
    quantize: Quantize = None,
    sampling: dict[str, float] | None = None,
) -> None:
    """Talk to a model in the terminal."""
    from localmoe.repl.input import open_reader
    from localmoe.repl.loop import converse
    from localmoe.repl.render import Screen
    from localmoe.repl.talk import Talk

    screen = Screen()
    how = {"context": context, "threads": threads, "device": device, "lazy": lazy, "kv_format": kv}
    with opened(screen, model, quantize=quantize, **how) as found:
        session = open_session(found, template, system, sampling)
        greet(screen, found, session)
        converse(Talk(session, screen), open_reader(screen.is_terminal, session.prepare))


@app.command()
@with_sampling_flags
def run(
    model: ModelArgument,
    prompt: Annotated[str, typer.Option("--prompt", "-p", help="What to say; text piped in is added below it.")] = "",
    raw: Annotated[bool, typer.Option("--raw", help="Continue the prompt as it is, without a chat template.")] = False,
    system: System = None,
    template: TemplateName = None,
    context: Context = None,
    threads: Threads = None,
    device: DeviceName = "cpu",
    lazy: Lazy = "auto",
    kv: KeyValueFormat = "f16",
    quantize: Quantize = None,
    sampling: dict[str, float] | None = None,
) -> None:
    """Print one answer and nothing else."""
    from localmoe.repl.render import Screen

    piped = "" if sys.stdin is None or sys.stdin.isatty() else sys.stdin.read()
    text = piped if not prompt else f"{prompt}\n\n{piped}" if piped.strip() else prompt
    if not text.strip():
        raise SettingError('run needs a prompt: -p "…", or text piped in')
    screen = Screen()
    how = {"context": context, "threads": threads, "device": device, "lazy": lazy, "kv_format": kv}
    with opened(screen, model, quantize=quantize, **how) as found:
        if raw:
            complete(screen, found, text, settings_for(found, sampling))
        else:
            answer_once(screen, open_session(found, template, system, sampling), text.strip())


@app.command(name="inspect")
def inspect_model(
    model: Annotated[Path | None, typer.Argument(metavar="MODEL", help=MODEL_HELP + " Settings will do.")] = None,
    config: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Plan from a config.json (or Mistral's params.json) alone.")
    ] = None,
    program: Annotated[bool, typer.Option("--program", help="List the operations of one step.")] = False,
    context: Context = None,
    kv: KeyValueFormat = "f16",
    quantize: Quantize = None,
    as_json: AsJson = False,
) -> None:
    """Say what a model is, what it needs and whether it fits this machine."""
    from localmoe import inspection
    from localmoe.repl.render import Screen

    path = config or model
    if path is None or (config and model):
        raise SettingError("inspect needs one of MODEL and --config FILE")
    screen = Screen()
    sections = inspection.report(path, context=context, kv_format=kv, quantize=quantize)
    header, rows = inspection.program_table(path, quantize) if program else ([], [])
    if as_json:
        found: dict[str, Any] = {title: dict(entries) for title, entries in sections}
        if program:
            found["program"] = [dict(zip(header, row, strict=True)) for row in rows]
        print(json.dumps(found, indent=2, ensure_ascii=False))
        return
    for title, entries in sections:
        screen.line(title, "bold")
        screen.rows([("  " + key, value) for key, value in entries])
    if program:
        screen.rows(rows, header)


@app.command()
def convert(
    model: ModelArgument,
    out: Annotated[Path, typer.Argument(metavar="OUT.gguf", help="The file to write.", show_default=False)],
    type: Annotated[
        str, typer.Option("--type", metavar="TYPE", help="f32, f16, bf16, q8_0, q6_K, q5_K_M, q4_K_M, q3_K_M, q2_K …")
    ] = "q4_K_M",
    threads: Threads = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite a file that is there.")] = False,
    allow_requantize: Annotated[
        bool, typer.Option("--allow-requantize", help="Quantise once more what is quantised already.")
    ] = False,
) -> None:
    """Write a model as one GGUF file, which llama.cpp opens too.

    Types have llama.cpp's names, and each tensor gets the format that llama-quantize would give it.
    """
    from localmoe.conversion.convert import convert as write
    from localmoe.repl.render import Screen

    screen = Screen()
    with screen.progress(f"reading {model.name}") as bar:
        again = allow_requantize
        written = write(model, out, type, threads=threads, force=force, allow_requantize=again, progress=bar)
    screen.line(written.summary)


@app.command()
def bench(
    model: ModelArgument,
    prompt: Annotated[str, typer.Option("-p", "--prompt", help="Prompts to read, in tokens; 0: none.")] = "512",
    generate: Annotated[str, typer.Option("-n", "--generate", help="Tokens to generate; 0: none.")] = "64",
    depth: Annotated[str, typer.Option("-d", "--depth", help="Tokens in the cache before each test.")] = "0",
    repeat: Annotated[int, typer.Option("-r", "--repeat", min=1, help="Rounds: each runs every test once.")] = 5,
    threads: Annotated[
        str, typer.Option("--threads", "-t", help="CPU threads; by default the physical cores that are quick.")
    ] = "",
    kv: Annotated[str, typer.Option("--kv", help="Formats of the KV cache: f32, f16, q8_0.")] = "f16",
    lazy: Annotated[str, typer.Option("--lazy", help="Loading modes: auto, mmap, off.")] = "auto",
    device: DeviceName = "cpu",
    quantize: Quantize = None,
    ops: Annotated[
        bool, typer.Option("--ops", help="Instead of the tests: where a step's time goes, op by op.")
    ] = False,
    against: Annotated[
        Path | None, typer.Option(metavar="PATH", help="A llama-bench binary to measure in turns with localmoe.")
    ] = None,
    as_json: AsJson = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print a Markdown table.")] = False,
    plot: Annotated[bool, typer.Option("--plot", help="Draw bars below the table.")] = False,
    svg: Annotated[Path | None, typer.Option(metavar="FILE", help="Draw the bars into an SVG file.")] = None,
    save: Annotated[
        Path | None, typer.Option(metavar="PATH", help="Append tables and the machine's description to a file.")
    ] = None,
) -> None:
    """Measure speed, in tokens per second and in per cent of what this machine could reach.

    Sizes, depths, threads and formats may be lists, such as -p 128,512; every combination is measured.
    """
    from localmoe.benchmark import chart, measure, peer, report, request, roofline
    from localmoe.repl.render import Screen

    how = {"prompt": prompt, "generate": generate, "depth": depth, "threads": threads, "kv": kv, "lazy": lazy}
    asked, screen = request.read_request(model, **how, device=device, repeat=repeat, quantize=quantize), Screen()
    if ops and against:
        raise SettingError("--ops looks into localmoe alone; leave --against out")
    with screen.progress("measuring") as bar:
        if ops:
            found = report.report_of_profiles(roofline.run(asked, bar))
        else:
            found = report.report_of_results(measure.run(asked, peer.Peer(against) if against else None, bar))
    if save:
        print(f"saved in {found.save(save)}", file=sys.stderr)
    if svg:
        chart.save_svg(found.bars, svg)
    if as_json:
        print(found.json())
    elif markdown:
        print(found.markdown(), end="")
    else:
        for table in found.tables:
            if table.title:
                screen.line(table.title, "bold")
            screen.rows(table.rows, table.header)
        for remark in found.remarks:
            screen.notice(remark)
        if plot:
            screen.console.print(chart.drawn(found.bars))


@contextmanager
def opened(screen: Screen, path: Path | None, **how: Any) -> Iterator[Model]:
    """The model, with a progress bar while it opens; the bundled one without a path. Closed after the `with` block."""
    import localmoe

    if path is None:
        from localmoe.loader.locate import bundled

        path = bundled()
    with screen.progress(f"opening {path.name}") as bar:
        model = localmoe.load(path, progress=bar, **how)
    try:
        yield model
    finally:
        model.close()


def settings_for(model: Model, sampling: dict[str, float] | None) -> SamplingSettings:
    """Defaults, then what the model recommends, then the flags."""
    return SamplingSettings().changed(**model.recommended).changed(**(sampling or {}))


def open_session(model: Model, template: str | None, system: str | None, sampling: dict[str, float] | None) -> Session:
    from localmoe.session import Session, open_template

    chosen = open_template(model, template) if template else None
    return Session(model, chosen, settings_for(model, sampling), system)


def greet(screen: Screen, model: Model, session: Session) -> None:
    """What is running, and what its file says about sampling."""
    from localmoe.memory import readable_size
    from localmoe.settings import not_followed

    facts = [model.name, model.architecture, readable_size(model.nbytes), f"context {model.context}"]
    threads = "1 thread" if model.threads == 1 else f"{model.threads} threads"
    screen.line(" · ".join([*facts, threads, "/help for commands"]))
    followed = [
        f"{name} {value:g}" for name, value in model.recommended.items() if getattr(session.settings, name) == value
    ]
    if followed:
        screen.notice(f"(sampling as the model recommends: {', '.join(followed)})")
    if model.context > model.trained_context:
        screen.notice(f"(the model was trained on {model.trained_context} tokens: beyond them its answers get worse)")
    if model.left_out:
        screen.notice(f"(text alone: left out are {model.left_out})")
    for entry in not_followed(model.metadata):
        screen.notice(f"(the model recommends {entry}, which is not implemented)")
    screen.line()


def answer_once(screen: Screen, session: Session, text: str) -> None:
    """The answer on standard output; reasoning on standard error where someone sees it."""
    answer, reasoning = screen.answer(exact=True), screen.aside()
    try:
        with screen.progress("reading the prompt") as bar:
            for piece in session.send(text, partial(bar, "reading the prompt")):
                bar.close()
                if piece.kind == "answer":
                    reasoning.end()
                    answer.write(piece.kind, piece.text)
                elif screen.errors.is_terminal:
                    reasoning.write(piece.kind, piece.text)
    finally:
        reasoning.end()
        answer.end()


def complete(screen: Screen, model: Model, text: str, settings: SamplingSettings) -> None:
    """The continuation of a text, exactly as generated."""
    from localmoe.engine import Engine

    tokens = model.tokenizer.encode_prompt(text)
    try:
        with screen.progress("reading the prompt") as bar:
            for step in Engine(model).generate(tokens, settings, progress=partial(bar, "reading the prompt")):
                bar.close()
                screen.verbatim(step.text)
    finally:
        screen.verbatim("\n")


def give_up(message: str) -> NoReturn:
    """One line on standard error, exit status 2."""
    from localmoe.repl.render import visible

    print(f"localmoe: {visible(message).replace(chr(10), ' ')}", file=sys.stderr)
    with suppress(OSError, AttributeError, ValueError):  # what could not be written must not fail again at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(2)


def main(arguments: list[str] | None = None) -> None:
    """The command `localmoe`; ends by SystemExit: 0, 2 for what the user can mend, 1 for a bug, 130 after Ctrl+C."""
    words = sys.argv[1:] if arguments is None else arguments
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        with suppress(AttributeError, ValueError):  # absent, or replaced by something that is no text file
            stream.reconfigure(errors="replace" if stream is sys.stdin else "backslashreplace")  # type: ignore[union-attr]
    try:
        app(words, prog_name="localmoe")
        sys.stdout.flush()
    except LocalMoeError as error:
        give_up(str(error))
    except OSError as error:  # a full disk, a device that went away: not ours to mend, and no bug
        give_up(f"{error.filename or 'the output'}: {error.strerror or error}")
    except MemoryError:
        give_up("memory ran out; a smaller --context needs less")
    except Exception as error:
        debug = "--debug" in words or os.environ.get("LOCALMOE_DEBUG", "0") != "0"
        if debug:
            traceback.print_exc()
        hint = "" if debug else " (localmoe --debug … shows where)"
        print(f"localmoe: sorry, this is a bug: {error!r}{hint}", file=sys.stderr)
        sys.exit(1)
