"""The table of slash commands: one decorated function each; `/help`, completion and the manual read it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from difflib import get_close_matches

from localmoe.errors import SettingError
from localmoe.repl.talk import Talk

Action = Callable[[Talk, str], None]
Complete = Callable[[Talk, str], Iterable[str]]


@dataclass(frozen=True, slots=True)
class Command:
    """A slash command: `usage` is what the user types after the name, `complete(talk, typed)` gives the words that may
    stand there; with `paths`, so may those of files."""

    name: str
    help: str
    usage: str
    aliases: tuple[str, ...]
    complete: Complete
    paths: bool
    run: Action


COMMANDS: dict[str, Command] = {}


def command(
    name: str,
    *,
    help: str,
    usage: str = "",
    aliases: tuple[str, ...] = (),
    complete: Complete = lambda talk, typed: (),
    paths: bool = False,
) -> Callable[[Action], Action]:
    """Enter a function (talk, rest of the line) into the table under `/name`."""

    def enter(run: Action) -> Action:
        COMMANDS[name] = Command(name, help, usage, aliases, complete, paths, run)
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
    word, *rest = line[1:].split(None, 1) or [""]
    find(word).run(talk, "".join(rest).strip())
