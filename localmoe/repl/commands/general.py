"""Commands about the chat itself: help, leaving, settings, the last answer's figures."""

from __future__ import annotations

from difflib import get_close_matches

from localmoe.errors import SettingError
from localmoe.repl.commands.table import COMMANDS, command, find
from localmoe.repl.residency import experts_told
from localmoe.repl.talk import Talk
from localmoe.settings import SETTINGS, SamplingSettings, allowed, is_whole


@command("help", help="list the commands", usage="[command]", aliases=("?",), complete=lambda talk, typed: COMMANDS)
def show_help(talk: Talk, argument: str) -> None:
    chosen = [find(argument.lstrip("/"))] if argument else list(COMMANDS.values())
    talk.screen.rows((f"/{c.name} {c.usage}".strip(), c.help) for c in chosen)
    for entry in chosen if argument else ():
        if entry.aliases:
            talk.screen.notice("also " + ", ".join("/" + alias for alias in entry.aliases))
    if not argument:
        talk.screen.notice(
            'Alt+Enter or a \\ at the end of a line starts a new line; """ opens and closes a longer text.'
        )
        talk.screen.notice("Ctrl+X Ctrl+E opens your editor, Ctrl+R searches what you typed.")
        talk.screen.notice("Ctrl+C stops an answer; Ctrl+D leaves.")


@command("exit", help="leave", aliases=("quit", "bye", "q"))
def leave(talk: Talk, argument: str) -> None:
    talk.open = False


@command("system", help='show or replace the system prompt; "" removes it', usage="[text]")
def system(talk: Talk, argument: str) -> None:
    if argument:
        talk.session.set_system("" if argument in ('""', "''") else argument)
        talk.screen.notice("(system prompt set)" if talk.session.system else "(system prompt removed)")
    else:
        talk.screen.line(talk.session.system or "(no system prompt)")


def settings_and_values(talk: Talk, typed: str) -> list[str]:
    """Each setting; behind its name, its value of now."""
    settings = talk.session.settings
    return [f"{name} {told(settings, name)}" for name in SETTINGS] if " " in typed else list(SETTINGS)


@command("set", help="show or change sampling settings", usage="[name [value]]", complete=settings_and_values)
def change(talk: Talk, argument: str) -> None:
    name, _, value = argument.replace("=", " ", 1).partition(" ")
    if name and name not in SETTINGS:
        near = get_close_matches(name, SETTINGS, n=1)
        raise SettingError(
            f"there is no setting {name!r}: " + (f"did you mean {near[0]}?" if near else "/set lists them")
        )
    settings = talk.session.settings
    if value.strip():
        talk.session.set(name, value.strip())
        talk.screen.notice(f"({name} = {told(talk.session.settings, name)}, was {told(settings, name)})")
        return
    talk.screen.rows(
        (f"{key} = {told(settings, key)}", f"{SETTINGS[key].metadata['help']} ({allowed(key)})")
        for key in ([name] if name else SETTINGS)
    )


def told(settings: SamplingSettings, name: str) -> str:
    """A value as someone would write it: 0.9, where a file says it in 32 bits."""
    value = getattr(settings, name)
    return str(value) if is_whole(name) else str(float(f"{value:.6g}"))


@command(
    "markdown",
    help="draw answers as what their marks mean, or as they are",
    usage="[on|off]",
    complete=lambda talk, typed: ("on", "off"),
)
def markdown(talk: Talk, argument: str) -> None:
    if argument not in ("", "on", "off"):
        raise SettingError(f"/markdown takes on or off, not {argument[:40]!r}")
    if argument:
        talk.screen.markdown = argument == "on"
    talk.screen.notice(f"(markdown: {'on' if talk.screen.markdown else 'off'})")


@command("params", help="every sampling setting with its value and range")
def parameters(talk: Talk, argument: str) -> None:
    change(talk, "")


@command("stats", help="tokens and speed of the last answer")
def stats(talk: Talk, argument: str) -> None:
    s, session = talk.session.engine.stats, talk.session
    if not s.generated_tokens:
        raise SettingError("there is no answer yet to count")
    run = s.prompt_tokens - s.reused_tokens - s.restored_tokens
    answer = f"{s.generated_tokens} tokens in {s.decode_seconds:.2f} s{_rate(s.generated_tokens, s.decode_seconds)}"
    rows = [
        ("prompt", f"{s.prompt_tokens} tokens, {s.reused_tokens} of them kept from before"),
        ("from disk", f"{s.restored_tokens} tokens in {s.restore_seconds:.2f} s" if s.restored_tokens else ""),
        ("reading", f"{run} tokens in {s.prefill_seconds:.2f} s{_rate(run, s.prefill_seconds)}"),
        ("", experts_told(s.prefill_counts)),
        ("answer", answer),
        ("", experts_told(s.decode_counts)),
        ("context", f"{session.used_tokens} of {session.model.context} tokens used"),
    ]
    talk.screen.rows(row for row in rows if row[1])


def _rate(tokens: int, seconds: float) -> str:
    return f", {tokens / seconds:.1f} tokens/s" if seconds > 0 else ""
