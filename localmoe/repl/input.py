"""What the user types, one message at a time, over several lines if wished; knows no conversation."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from threading import Thread
from typing import Protocol, TextIO

from prompt_toolkit import PromptSession
from prompt_toolkit.completion import CompleteEvent, Completer, Completion
from prompt_toolkit.document import Document
from prompt_toolkit.history import FileHistory, History, InMemoryHistory
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent

from localmoe.errors import LocalMoeError
from localmoe.repl.commands import COMMANDS

PROMPT, CONTINUATION = ">>> ", "... "
QUOTES = '"""'


class Reader(Protocol):
    """Where messages come from."""

    def read(self) -> str:
        """The next message; EOFError at the end, KeyboardInterrupt for Ctrl+C on an empty line."""
        ...


def is_complete(typed: str) -> bool:
    """Whether Enter ends the message: not inside triple quotes, nor after a backslash at the end of the line."""
    if typed.lstrip().startswith(QUOTES):
        return typed.count(QUOTES) >= 2
    return not typed.endswith("\\")


def message_of(typed: str) -> str:
    """The message that was meant: without the quotes around it and the backslashes that continued its lines."""
    text = typed.strip()
    if text.startswith(QUOTES):
        inside, _, after = text[len(QUOTES) :].partition(QUOTES)
        quoted = (inside.strip("\n") + after).strip()
        return " " + quoted if quoted.startswith("/") else quoted  # quoted text is never a command
    return typed.replace("\\\n", "\n").rstrip()


class LineReader:
    """Messages from a pipe or a file, without prompts."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def read(self) -> str:
        typed = self._line()
        while not is_complete(typed):
            try:
                typed += "\n" + self._line()
            except EOFError:
                break
        return message_of(typed)

    def _line(self) -> str:
        line = self._stream.readline()
        if not line:
            raise EOFError
        return line.rstrip("\r\n")


class CommandCompleter(Completer):
    """Completes `/commands` and the words that they take."""

    def get_completions(self, document: Document, complete_event: CompleteEvent) -> Iterable[Completion]:
        typed = document.text_before_cursor
        if not typed.startswith("/") or "\n" in typed:
            return
        name, space, argument = typed[1:].partition(" ")
        if not space:
            for entry in COMMANDS.values():
                if entry.name.startswith(name):
                    yield Completion(entry.name, start_position=-len(name), display_meta=entry.help)
        elif name in COMMANDS and " " not in argument:
            for word in COMMANDS[name].complete():
                if word.startswith(argument):
                    yield Completion(word, start_position=-len(argument))


class TerminalReader:
    """Messages typed at a terminal, with history, completion and several lines."""

    def __init__(self, history: Path | None = None, prepare: Callable[[], None] = lambda: None) -> None:
        """`prepare` is run once, in a thread of its own, when the first prompt stands."""
        self._session: PromptSession[str] = PromptSession(
            PROMPT,
            multiline=True,
            prompt_continuation=CONTINUATION,
            history=history_at(history) if history else InMemoryHistory(),
            completer=CommandCompleter(),
            complete_while_typing=False,
            reserve_space_for_menu=4,
            key_bindings=_keys(),
        )
        drawn = self._session.app.after_render

        def begin(_: object) -> None:
            drawn.remove_handler(begin)
            Thread(target=prepare).start()

        drawn.add_handler(begin)

    def read(self) -> str:
        return message_of(self._session.prompt())


def open_reader(on_terminal: bool, prepare: Callable[[], None] = lambda: None) -> Reader:
    """A reader for standard input: with line editing where a person sits at both ends. `prepare` gets ready what the
    first message will need: beside the first prompt, or now where nobody waits for one. Raises what it raises now."""
    if on_terminal and sys.stdin.isatty():
        return TerminalReader(state_folder() / "history", _quiet(prepare))
    prepare()
    return LineReader(sys.stdin)


def _quiet(prepare: Callable[[], None]) -> Callable[[], None]:
    """Without its errors: the first message meets them again, where they can be shown."""

    def run() -> None:
        with suppress(LocalMoeError):
            prepare()

    return run


def state_folder() -> Path:
    """Where localmoe keeps what it remembers: the user's state directory (XDG; %LOCALAPPDATA% on Windows)."""
    named = os.environ.get("LOCALAPPDATA") if os.name == "nt" else os.environ.get("XDG_STATE_HOME")
    return (Path(named) if named else Path.home() / ".local" / "state") / "localmoe"


def history_at(path: Path) -> History:
    """The history file, readable by its owner only; without a place to write, a history in memory."""
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        os.close(os.open(path, os.O_CREAT | os.O_APPEND | os.O_WRONLY, 0o600))
        path.chmod(0o600)
    except OSError:
        return InMemoryHistory()
    return FileHistory(path)


def _keys() -> KeyBindings:
    keys = KeyBindings()

    @keys.add("enter")
    def end_or_continue(event: KeyPressEvent) -> None:
        buffer = event.current_buffer
        if buffer.complete_state and buffer.complete_state.current_completion:
            buffer.apply_completion(buffer.complete_state.current_completion)
        elif is_complete(buffer.text):
            buffer.validate_and_handle()
        else:
            buffer.insert_text("\n")

    @keys.add("escape", "enter")
    def new_line(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    @keys.add("c-c")
    @keys.add("<sigint>")
    def drop_line(event: KeyPressEvent) -> None:
        buffer = event.current_buffer
        if buffer.text:
            buffer.append_to_history()
            buffer.reset()
        else:
            event.app.exit(exception=KeyboardInterrupt, style="class:aborting")

    return keys
