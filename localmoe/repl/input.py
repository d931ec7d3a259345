"""What the user types, one message at a time, over several lines if wished; knows no conversation."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Thread
from typing import TextIO

from prompt_toolkit import PromptSession
from prompt_toolkit.filters import is_searching
from prompt_toolkit.history import InMemoryHistory
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
from prompt_toolkit.keys import Keys

from localmoe.errors import LocalMoeError
from localmoe.folders import state_folder
from localmoe.interrupt import start_threads
from localmoe.repl.commands import COMMANDS
from localmoe.repl.completion import SlashCompleter
from localmoe.repl.history import history_at
from localmoe.repl.talk import END_OF_BLOCK, Reader, Talk

PROMPT, CONTINUATION = ">>> ", "... "
QUOTES = '"""'


def continuation(columns: int, line: int, wraps: int) -> str:
    """What stands before a further line; a line that is merely wrapped has spaces there."""
    return " " * len(CONTINUATION) if wraps else CONTINUATION


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

    def read(self, text: str = "") -> str:
        typed = self._line()
        while not is_complete(typed):
            try:
                typed += "\n" + self._line()
            except EOFError:
                break
        return message_of(typed)

    def read_block(self) -> str:
        lines = []
        with suppress(EOFError):
            while (line := self._line()) != END_OF_BLOCK:
                lines.append(line)
        return "\n".join(lines)

    def _line(self) -> str:
        line = self._stream.readline()
        if not line:
            raise EOFError
        return line.rstrip("\r\n")


def command_completer(talk: Talk | None = None) -> SlashCompleter:
    """Completes `/commands` and the words that they take in this chat."""
    return SlashCompleter(
        lambda: {entry.name: entry.help for entry in COMMANDS.values()},
        lambda name, typed: COMMANDS[name].complete(talk, typed) if talk else (),
        lambda name: COMMANDS[name].paths,
    )


@dataclass(slots=True)
class Pasted:
    """Whether the text that is being typed began with several pasted lines: they are taken as they are, without a
    meaning of quotes and backslashes."""

    whole: bool = False


class TerminalReader:
    """Messages typed at a terminal, with history, completion and several lines."""

    def __init__(
        self, history: Path | None = None, prepare: Callable[[], None] = lambda: None, talk: Talk | None = None
    ) -> None:
        """`prepare` is run once, in a thread of its own, when the first prompt stands."""
        self._pasted = Pasted()
        self._session: PromptSession[str] = PromptSession(
            PROMPT,
            multiline=True,
            prompt_continuation=continuation,
            history=history_at(history) if history else InMemoryHistory(),
            completer=command_completer(talk),
            complete_while_typing=False,
            reserve_space_for_menu=4,
            key_bindings=_keys(self._pasted),
            tempfile_suffix=".md",
            enable_suspend=True,
        )
        drawn = self._session.app.after_render

        def begin(_: object) -> None:
            drawn.remove_handler(begin)
            start_threads([Thread(target=prepare)])

        drawn.add_handler(begin)

    def read(self, text: str = "") -> str:
        self._pasted.whole = False
        typed = self._session.prompt(default=text)
        return typed.rstrip() if self._pasted.whole else message_of(typed)

    def read_block(self) -> str:
        """Enter begins a new line here, and Ctrl+D ends."""
        keys = KeyBindings()

        @keys.add("enter")
        def line(event: KeyPressEvent) -> None:
            buffer = event.current_buffer
            if buffer.document.current_line == END_OF_BLOCK:
                buffer.validate_and_handle()
            else:
                buffer.insert_text("\n")

        @keys.add("c-d")
        def end(event: KeyPressEvent) -> None:
            event.current_buffer.validate_and_handle()

        typed: str = PromptSession(
            CONTINUATION, multiline=True, prompt_continuation=continuation, key_bindings=keys
        ).prompt()
        *lines, last = typed.split("\n")
        return "\n".join(lines if last == END_OF_BLOCK else [*lines, last])


def open_reader(on_terminal: bool, prepare: Callable[[], None] = lambda: None, talk: Talk | None = None) -> Reader:
    """A reader for standard input: with line editing where a person sits at both ends. `prepare` gets ready what the
    first message will need: beside the first prompt, or now where nobody waits for one. Raises what it raises now."""
    if on_terminal and sys.stdin.isatty():
        return TerminalReader(state_folder() / "history", _quiet(prepare), talk)
    prepare()
    return LineReader(sys.stdin)


def _quiet(prepare: Callable[[], None]) -> Callable[[], None]:
    """Without its errors: the first message meets them again, where they can be shown."""

    def run() -> None:
        with suppress(LocalMoeError):
            prepare()

    return run


def _keys(pasted: Pasted) -> KeyBindings:
    keys = KeyBindings()

    @keys.add("enter", filter=~is_searching)
    def end_or_continue(event: KeyPressEvent) -> None:
        buffer = event.current_buffer
        if buffer.complete_state and buffer.complete_state.current_completion:
            buffer.apply_completion(buffer.complete_state.current_completion)
        elif pasted.whole or is_complete(buffer.text):
            buffer.validate_and_handle()
        else:
            buffer.insert_text("\n")

    @keys.add(Keys.BracketedPaste)
    def paste(event: KeyPressEvent) -> None:
        """Several lines are one message and never a command: a space before a slash says so."""
        text, buffer = event.data.replace("\r\n", "\n").replace("\r", "\n"), event.current_buffer
        text = text.rstrip("\n")
        if "\n" in text.lstrip() and not buffer.text.strip():
            pasted.whole = True
            buffer.reset()
            text = " " + text if text.startswith("/") else text
        buffer.insert_text(text)

    @keys.add("escape", "e")
    @keys.add("c-x", "c-e")
    def open_editor(event: KeyPressEvent) -> None:
        """$EDITOR; what comes back is sent by Enter, not by leaving the editor."""
        event.current_buffer.open_in_editor()

    @keys.add("escape", "enter")
    def new_line(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    @keys.add("c-c", filter=~is_searching)
    @keys.add("<sigint>")
    def drop_line(event: KeyPressEvent) -> None:
        buffer = event.current_buffer
        if buffer.text:
            buffer.append_to_history()
            buffer.reset()
            pasted.whole = False
        else:
            event.app.exit(exception=KeyboardInterrupt, style="class:aborting")

    return keys
