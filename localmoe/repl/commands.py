"""The slash commands: one decorated function each; `/help`, completion and the manual read the table."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from difflib import get_close_matches

from localmoe.errors import LocalMoeError, SettingError
from localmoe.experts.loading import MODES
from localmoe.repl.keyboard import silent_keyboard
from localmoe.repl.residency import HOW_TO_COUNT, changed, experts_told, loading_rows, memory_rows, runs_because
from localmoe.repl.talk import Talk
from localmoe.settings import SETTINGS, allowed

BESIDE_MAP = 10  # lines of the screen: the prompt, what was typed, and the figures below the map, which may be wrapped
Action = Callable[[Talk, str], None]


@dataclass(frozen=True, slots=True)
class Command:
    """A slash command: `complete` gives the words that may follow, `usage` what the user types after the name."""

    name: str
    help: str
    usage: str
    aliases: tuple[str, ...]
    complete: Callable[[], Iterable[str]]
    run: Action


COMMANDS: dict[str, Command] = {}


def command(
    name: str,
    *,
    help: str,
    usage: str = "",
    aliases: tuple[str, ...] = (),
    complete: Callable[[], Iterable[str]] = tuple,
) -> Callable[[Action], Action]:
    """Enter a function (talk, rest of the line) into the table under `/name`."""

    def enter(run: Action) -> Action:
        COMMANDS[name] = Command(name, help, usage, aliases, complete, run)
        return run

    return enter


def find(word: str) -> Command:
    """The command of that name or alias, without its slash; SettingError with the nearest names."""
    names = {alias: entry for entry in COMMANDS.values() for alias in (entry.name, *entry.aliases)}
    if word in names:
        return names[word]
    begun = [name for name in COMMANDS if word and name.startswith(word)]
    near = begun or get_close_matches(word, names, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join('/' + name for name in near)}?" if near else "/help lists the commands"
    raise SettingError(f"there is no command /{word}: {hint} (a message may begin with a slash after a space)")


def execute(talk: Talk, line: str) -> None:
    """Run one line that begins with a slash."""
    word, _, argument = line[1:].partition(" ")
    find(word.strip()).run(talk, argument.strip())


@command("help", help="list the commands", usage="[command]", aliases=("?",), complete=lambda: COMMANDS)
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
        talk.screen.notice("Ctrl+C stops an answer; Ctrl+D leaves.")


@command("exit", help="leave", aliases=("quit", "bye", "q"))
def leave(talk: Talk, argument: str) -> None:
    talk.open = False


@command("clear", help="forget the conversation; system prompt and settings stay")
def clear(talk: Talk, argument: str) -> None:
    talk.session.clear()
    talk.screen.notice("(conversation forgotten)")


@command("system", help='show or replace the system prompt; "" removes it', usage="[text]")
def system(talk: Talk, argument: str) -> None:
    if argument:
        talk.session.set_system("" if argument in ('""', "''") else argument)
        talk.screen.notice("(system prompt set)" if talk.session.system else "(system prompt removed)")
    else:
        talk.screen.line(talk.session.system or "(no system prompt)")


@command("set", help="show or change sampling settings", usage="[name [value]]", complete=lambda: SETTINGS)
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
        talk.screen.notice(f"({name} = {getattr(talk.session.settings, name)}, was {getattr(settings, name)})")
        return
    talk.screen.rows(
        (f"{key} = {getattr(settings, key)}", f"{SETTINGS[key].metadata['help']} ({allowed(key)})")
        for key in ([name] if name else SETTINGS)
    )


@command("stats", help="tokens and speed of the last answer")
def stats(talk: Talk, argument: str) -> None:
    s, session = talk.session.engine.stats, talk.session
    if not s.generated_tokens:
        raise SettingError("there is no answer yet to count")
    run = s.prompt_tokens - s.reused_tokens
    answer = f"{s.generated_tokens} tokens in {s.decode_seconds:.2f} s{_rate(s.generated_tokens, s.decode_seconds)}"
    rows = [
        ("prompt", f"{s.prompt_tokens} tokens, {s.reused_tokens} of them kept from before"),
        ("reading", f"{run} tokens in {s.prefill_seconds:.2f} s{_rate(run, s.prefill_seconds)}"),
        ("", experts_told(s.prefill_counts)),
        ("answer", answer),
        ("", experts_told(s.decode_counts)),
        ("context", f"{session.used_tokens} of {session.model.context} tokens used"),
    ]
    talk.screen.rows(row for row in rows if row[1])


@command(
    "lazy",
    help="show or change how weights are loaded; the conversation stays",
    usage="[off|mmap|slots [SIZE]|auto]",
    complete=lambda: MODES,
)
def lazy(talk: Talk, argument: str) -> None:
    model = talk.model
    if not argument:
        talk.screen.rows(loading_rows(model))
        return
    asked, before = changed(model.loading, argument), model.residency_mode
    try:
        with silent_keyboard(), talk.screen.progress("changing how weights are loaded") as bar:
            model.change_loading(asked, bar)
    except LocalMoeError as error:
        talk.screen.error(str(error))
        talk.screen.notice(f"({before} goes on)")
    except KeyboardInterrupt:
        talk.screen.notice(f"(stopped: {model.residency_mode} goes on)")
    else:
        talk.screen.notice(f"(loading {runs_because(model)}; was {before})")


@command("experts", help="which experts are chosen: a heat map, the busiest, the idle, load balance and entropy")
def experts(talk: Talk, argument: str) -> None:
    from localmoe.experts.heatmap import facts, rows  # numpy, which /help and the manual need not load

    model, screen = talk.model, talk.screen
    uses = model.uses()
    if uses is None:
        raise SettingError(HOW_TO_COUNT)
    blocks = model.expert_blocks
    for line in rows(uses, screen.width, screen.lines_beside(BESIDE_MAP), plain=screen.is_ascii, blocks=blocks):
        screen.line(line)
    screen.rows(facts(uses, blocks))


@command("reopen", help="open the model anew, as after its file changed; the conversation stays")
def reopen(talk: Talk, argument: str) -> None:
    if talk.load is None:
        raise SettingError("this model cannot be opened anew")
    before = talk.model
    found = talk.load(replace(before.loading, trace=None))
    try:
        talk.session.take(found)
    except BaseException:
        found.close()
        raise
    before.close()
    talk.screen.notice(f"({found.name} opened anew)")


@command("memory", help="what is where: weights, experts, KV cache, and what is free")
def memory(talk: Talk, argument: str) -> None:
    talk.screen.rows(memory_rows(talk.model))


@command("template", help="show the chat template")
def template(talk: Talk, argument: str) -> None:
    talk.screen.notice(talk.session.template.name)
    talk.screen.line(talk.session.template.source)


@command("regen", help="answer the last message again; a fixed seed gives the same answer")
def regenerate(talk: Talk, argument: str) -> None:
    talk.answer(talk.session.regenerate)


def _rate(tokens: int, seconds: float) -> str:
    return f", {tokens / seconds:.1f} tokens/s" if seconds > 0 else ""
