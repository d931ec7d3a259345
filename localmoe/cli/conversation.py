"""`chat` and `run`: a model that answers; knows how a conversation is opened and shown, not how it is led."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any

import typer

from localmoe.cli.command import (
    Context,
    DeviceName,
    KeyValueFormat,
    ModelArgument,
    ModelOrBundled,
    Quantize,
    System,
    TemplateName,
    Threads,
    app,
    load,
    opened,
    with_sampling_flags,
)
from localmoe.cli.loading import with_loading_flags
from localmoe.errors import SettingError
from localmoe.experts.loading import read_loading
from localmoe.settings import SamplingSettings

if TYPE_CHECKING:
    from localmoe.model import Model
    from localmoe.repl.render import Screen
    from localmoe.session import Session


@app.command()
@with_sampling_flags
@with_loading_flags
def chat(
    model: ModelOrBundled = None,
    system: System = None,
    template: TemplateName = None,
    context: Context = None,
    threads: Threads = None,
    device: DeviceName = "cpu",
    kv: KeyValueFormat = "f16",
    quantize: Quantize = None,
    *,
    loading: dict[str, Any],
    sampling: dict[str, float | None],
) -> None:
    """Talk to a model in the terminal."""
    from localmoe.repl.input import open_reader
    from localmoe.repl.loop import converse
    from localmoe.repl.render import Screen
    from localmoe.repl.talk import Talk

    screen = Screen()
    how = {"context": context, "threads": threads, "device": device, "kv_format": kv, "quantize": quantize}
    with opened(screen, model, lazy=read_loading(**loading), **how) as found:
        session = open_session(found, template, system, sampling)
        greet(screen, found, session)
        talk = Talk(session, screen, lambda asked: load(screen, model, lazy=asked, **how))
        try:
            converse(talk, open_reader(screen.is_terminal, session.prepare))
        finally:
            talk.model.close()  # which /reopen may have changed


@app.command()
@with_sampling_flags
@with_loading_flags
def run(
    model: ModelArgument,
    prompt: Annotated[str, typer.Option("--prompt", "-p", help="What to say; text piped in is added below it.")] = "",
    raw: Annotated[bool, typer.Option("--raw", help="Continue the prompt as it is, without a chat template.")] = False,
    system: System = None,
    template: TemplateName = None,
    context: Context = None,
    threads: Threads = None,
    device: DeviceName = "cpu",
    kv: KeyValueFormat = "f16",
    quantize: Quantize = None,
    *,
    loading: dict[str, Any],
    sampling: dict[str, float | None],
) -> None:
    """Print one answer and nothing else."""
    from localmoe.repl.render import Screen

    piped = "" if sys.stdin is None or sys.stdin.isatty() else sys.stdin.read()
    text = piped if not prompt else f"{prompt}\n\n{piped}" if piped.strip() else prompt
    if not text.strip():
        raise SettingError('run needs a prompt: -p "…", or text piped in')
    screen = Screen()
    how = {"context": context, "threads": threads, "device": device, "kv_format": kv}
    with opened(screen, model, quantize=quantize, lazy=read_loading(**loading), **how) as found:
        if raw:
            complete(screen, found, text, settings_for(found, sampling))
        else:
            answer_once(screen, open_session(found, template, system, sampling), text.strip())


def settings_for(model: Model, sampling: Mapping[str, float | None]) -> SamplingSettings:
    """Defaults, then what the model recommends, then the flags."""
    given = {name: value for name, value in sampling.items() if value is not None}
    return SamplingSettings().changed(**model.recommended).changed(**given)


def open_session(
    model: Model, template: str | None, system: str | None, sampling: Mapping[str, float | None]
) -> Session:
    from localmoe.session import Session, open_template

    chosen = open_template(model, template) if template else None
    return Session(model, chosen, settings_for(model, sampling), system)


def greet(screen: Screen, model: Model, session: Session) -> None:
    """What is running, and what its file says about sampling."""
    from localmoe.memory import available_nbytes, readable_size
    from localmoe.repl.residency import runs_because
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
    if model.loading.mode == "auto" and (model.residency_mode == "slots" or model.nbytes > available_nbytes()):
        screen.notice(f"(loading {runs_because(model)})")
    if model.loading_problem:
        screen.notice(f"({model.loading_problem})")
    for entry in not_followed(model.metadata):
        screen.notice(f"(the model recommends {entry}, which is not implemented)")
    screen.line()


def answer_once(screen: Screen, session: Session, text: str) -> None:
    """The answer on standard output; reasoning on standard error where someone sees it."""
    from localmoe.repl.residency import reads
    from localmoe.repl.talk import READING

    answer, reasoning = screen.answer(exact=True), screen.aside()
    try:
        with screen.progress(READING, reads(session.model.counts)) as bar:
            for piece in session.send(text, bar.tokens(READING)):
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
    from localmoe.repl.residency import reads
    from localmoe.repl.talk import READING

    tokens = model.tokenizer.encode_prompt(text)
    try:
        with screen.progress(READING, reads(model.counts)) as bar:
            for step in Engine(model).generate(tokens, settings, progress=bar.tokens(READING)):
                bar.close()
                screen.verbatim(step.text)
    finally:
        screen.verbatim("\n")
