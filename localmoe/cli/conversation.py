"""`chat` and `run`: a model that answers; knows how a conversation is opened and shown, not how it is led."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, cast

import typer

from localmoe.cli.command import (
    KV_HELP,
    Context,
    DeviceName,
    KeyValueFormat,
    KeyValues,
    ModelArgument,
    ModelOrBundled,
    Pin,
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
from localmoe.conversation.library import Library
from localmoe.errors import ConversationError, SettingError
from localmoe.experts.loading import read_loading
from localmoe.settings import SamplingSettings

if TYPE_CHECKING:
    from localmoe.conversation.saved import Saved
    from localmoe.conversation.tree import Conversation
    from localmoe.engine import KeptState
    from localmoe.model import Model
    from localmoe.prompt_cache.cache import PromptCache
    from localmoe.repl.render import Screen
    from localmoe.repl.talk import Talk
    from localmoe.session import Session


KeptKeyValueFormat = Annotated[
    KeyValues | None, typer.Option("--kv", help=f"{KV_HELP} By default f16, or what the conversation had.")
]
Continue = Annotated[bool, typer.Option("--continue", help="Go on with the conversation that was changed last.")]
Resume = Annotated[str | None, typer.Option(metavar="NAME", help="Go on with a conversation (/list shows them).")]
NoSave = Annotated[bool, typer.Option("--no-save", help="Keep nothing of this conversation, unless /save names it.")]
Overflow = Annotated[
    Literal["stop", "drop", "shift"] | None,
    typer.Option(help="When the context is full: stop, drop the oldest turns, or shift (drop without reading again)."),
]
KeptPrompts = Annotated[
    str,
    typer.Option("--prompt-cache", metavar="SIZE|off", help="Room on disk for what was read of conversations, or off."),
]
Think = Annotated[
    str | None,
    typer.Option(metavar="on|off|EFFORT|show", help="Whether the model reasons, how much, and whether that is shown."),
]


@app.command()
@with_sampling_flags
@with_loading_flags
def chat(
    model: ModelOrBundled = None,
    system: System = None,
    template: TemplateName = None,
    context: Context = None,
    threads: Threads = None,
    pin: Pin = None,
    device: DeviceName = "cpu",
    kv: KeptKeyValueFormat = None,
    quantize: Quantize = None,
    overflow: Overflow = None,
    think: Think = None,
    go_on: Continue = False,
    resume: Resume = None,
    no_save: NoSave = False,
    prompt_cache: KeptPrompts = "auto",
    *,
    loading: dict[str, Any],
    sampling: dict[str, float | None],
) -> None:
    """Talk to a model in the terminal."""
    from localmoe.repl.input import open_reader
    from localmoe.repl.loop import converse
    from localmoe.repl.models import OpenModels
    from localmoe.repl.render import Screen
    from localmoe.repl.talk import Talk

    screen = Screen()
    library = Library()
    saved = saved_conversation(library, resume, go_on=go_on, keep=not no_save)
    path = model or kept_model(saved)
    opening = how_it_was_opened(saved, context=context, kv_format=kv, quantize=quantize)
    how = {"threads": threads, "pin": pin, "device": device, **opening, "kv_format": opening["kv_format"] or "f16"}
    try:
        own = template_of(template, saved.conversation) is None
        with opened(screen, path, lazy=read_loading(**loading), for_chat=own, **how) as found:
            models = OpenModels(
                found,
                lambda path, asked: load(screen, path, lazy=asked, for_chat=not talk.session.given_template, **how),
                lambda model: None if no_save else kept_state(cast("Model", model), prompt_cache),
                {key: value for key, value in opening.items() if value},
            )
            kept = models.kept(found)
            session = open_session(found, template, system, sampling, saved.conversation, kept)
            talk = Talk(session, screen, models, library=library, saved=saved)
            try:
                greet(screen, found, session)
                begin(talk, overflow, think)
                converse(talk, open_reader(screen.is_terminal, talk.prepare, talk))
            finally:
                talk.close()
                models.close()
    finally:
        saved.close()


def kept_state(model: Model, asked: str) -> PromptCache | None:
    """What keeps a model's KV state, in the room that was asked for. Raises SettingError for a size that is none."""
    from localmoe.memory import parse_size
    from localmoe.prompt_cache.cache import open_prompt_cache

    if asked == "off":
        return None
    return open_prompt_cache(model, limit=None if asked == "auto" else parse_size(asked))


def saved_conversation(library: Library, resume: str | None, *, go_on: bool, keep: bool) -> Saved:
    """The conversation that the flags mean. Raises ConversationError, SettingError."""
    if go_on and resume:
        raise SettingError("--continue and --resume exclude each other: the last conversation, or one by its name")
    if not go_on and not resume:
        return library.open_new(keep=keep)
    if not keep:
        raise SettingError("--no-save is for new conversations: one that is kept goes on being kept")
    return library.open_named(resume or library.latest())


def kept_model(saved: Saved) -> Path | None:
    """The model that a conversation was led with. Raises ConversationError when it is gone."""
    kept = saved.conversation.facts.get("model")
    if not isinstance(kept, str) or not kept:
        return None
    if not os.path.exists(kept):
        raise ConversationError(f"{saved.name}: was led with {kept}, which is not there any more; name a model")
    return Path(kept)


def how_it_was_opened(saved: Saved, **asked: Any) -> dict[str, Any]:
    """As asked, else as the conversation's model was opened before: it may need that context. What is no such thing
    counts as nothing."""
    from localmoe.formats import KV_FORMATS

    kept = saved.conversation.facts.get("opening")
    before = kept if isinstance(kept, dict) else {}
    context, kv, quantize = (before.get(key) for key in ("context", "kv_format", "quantize"))
    sound = {
        "context": context if type(context) is int and context > 0 else None,
        "kv_format": kv if isinstance(kv, str) and kv in KV_FORMATS else None,
        "quantize": quantize if isinstance(quantize, str) else None,
    }
    return {key: asked[key] or sound[key] for key in sound}


def begin(talk: Talk, overflow: str | None, think: str | None) -> None:
    """Take up the conversation where it was left, then what the flags ask for."""
    from localmoe.repl.commands import execute

    session, screen = talk.session, talk.screen
    for line in session.recall(but=tuple(session.chosen)):
        screen.notice(f"({line})")
    if overflow:
        session.set_overflow(overflow)
    if think:
        execute(talk, f"/think {think}")
    talk.tell_news()
    if session.conversation.messages:
        talk.show_last()


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
    pin: Pin = None,
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
    how = {"context": context, "threads": threads, "pin": pin, "device": device, "kv_format": kv}
    own = not raw and template is None
    with opened(screen, model, quantize=quantize, lazy=read_loading(**loading), for_chat=own, **how) as found:
        if raw:
            complete(screen, found, text, settings_for(found, sampling))
        else:
            answer_once(screen, open_session(found, template, system, sampling), text.strip())


def settings_for(model: Model, sampling: Mapping[str, float | None]) -> SamplingSettings:
    """Defaults, then what the model recommends, then the flags."""
    given = {name: value for name, value in sampling.items() if value is not None}
    return SamplingSettings().changed(**model.recommended).changed(**given)


def template_of(asked: str | None, conversation: Conversation | None) -> str | None:
    """Of a conversation that goes on, the template stays what it was unless another one is asked for; None for the
    model's own."""
    kept = conversation.facts.get("template") if conversation else None
    return asked or (kept if isinstance(kept, str) else None)


def open_session(
    model: Model,
    template: str | None,
    system: str | None,
    sampling: Mapping[str, float | None],
    conversation: Conversation | None = None,
    state: KeptState | None = None,
) -> Session:
    """A session as the flags ask for it, on a conversation that goes on if there is one. Raises TemplateError."""
    from localmoe.session import Session
    from localmoe.template_fit import open_template

    named = template_of(template, conversation)
    chosen = open_template(model.tokenizer, named) if named else None
    return Session(
        model,
        chosen,
        {name: value for name, value in sampling.items() if value is not None},
        system,
        conversation=conversation,
        kept=state,
    )


def greet(screen: Screen, model: Model, session: Session) -> None:
    """What is running, and what its file says about sampling."""
    from localmoe.kernels.cpu.pinning import written
    from localmoe.memory import available_nbytes, readable_size
    from localmoe.repl.residency import runs_because
    from localmoe.settings import not_followed

    facts = [model.name, model.architecture, readable_size(model.nbytes), f"context {model.context}"]
    threads = "1 thread" if model.threads == 1 else f"{model.threads} threads"
    kept = f" on CPU {written(model.device.cpus)}" if model.device.cpus else ""
    screen.line(" · ".join([*facts, threads + kept, "/help for commands"]))
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
