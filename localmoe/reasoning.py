"""What a model thinks before it answers, told apart from the answer; knows text and its markers alone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

Kind = Literal["answer", "reasoning"]


@dataclass(frozen=True, slots=True)
class Piece:
    """Some text of an answer, or of the reasoning before it, in the order in which it was generated."""

    kind: Kind
    text: str


class ReasoningSplitter:
    """Cuts a stream of text into pieces at the reasoning markers, which may arrive split over tokens.

    Reasoning opens only as the first thing of an answer and closes once: a later mention of a marker is text.
    """

    def __init__(self, markers: tuple[str, str] | None, opened: bool = False) -> None:
        self._open, self._close = markers or ("", "")
        self._state: Literal["start", "reasoning", "answer"] = (
            "answer" if markers is None else "reasoning" if opened else "start"
        )
        self._held = ""

    @property
    def reasoning(self) -> bool:
        """Whether what comes next is reasoning, as far as anyone can tell."""
        return self._state == "reasoning"

    def push(self, text: str) -> Iterator[Piece]:
        """The pieces that are certain by now; a possible beginning of a marker is held back."""
        self._held += text
        if self._state == "start":
            begun = self._held.lstrip()
            if begun.startswith(self._open):
                self._state, self._held = "reasoning", begun[len(self._open) :]
            elif not self._open.startswith(begun):
                self._state = "answer"
        if self._state == "reasoning":
            before, marker, after = self._held.partition(self._close)
            if marker:
                self._state, self._held = "answer", after
            else:
                kept = overlap(before, self._close)
                self._held = before[len(before) - kept :]
                before = before[: len(before) - kept]
            if before:
                yield Piece("reasoning", before)
        if self._state == "answer":
            yield from self.finish()

    def finish(self) -> Iterator[Piece]:
        """What was held back, when nothing more will come."""
        text, self._held = self._held, ""
        if text:
            yield Piece("reasoning" if self._state == "reasoning" else "answer", text)


class Channels:
    """Cuts an answer of gpt-oss (the harmony format) into pieces. It is made of messages, each with a header:
    `<|channel|>analysis<|message|>…<|end|><|start|>assistant<|channel|>final<|message|>…`. What is said in the final
    channel is the answer, any other channel is reasoning."""

    OPENING = "<|channel|>analysis<|message|>"

    def __init__(self) -> None:
        self._header = ""
        self._open = False
        self._kind: Kind = "answer"

    @property
    def reasoning(self) -> bool:
        """Whether what comes next is no part of the answer."""
        return not self._open or self._kind == "reasoning"

    def push(self, text: str, control: str) -> Iterator[Piece]:
        """The pieces of one token: its text, or of a control token its name."""
        if control == "<|message|>":
            self._open = True
            self._kind = "answer" if self._header.strip() in ("", "final") else "reasoning"
        elif control:
            self._header, self._open = "", False
        elif not self._open:
            self._header += text
        elif text:
            yield Piece(self._kind, text)


def overlap(text: str, marker: str) -> int:
    """The longest end of `text` that begins `marker`."""
    return next((n for n in range(min(len(text), len(marker)), 0, -1) if text.endswith(marker[:n])), 0)
