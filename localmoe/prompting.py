"""From messages to the token ids of a prompt: a pure function of messages, template and tokenizer; knows no session.

Ids that a model chose are kept where they spell an answer's text: tokenising an answer anew may cut it elsewhere, and
would lose the cached prefix. Who opens the same conversation elsewhere gets the same ids.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from localmoe.engine import TextDecoder

Markers = tuple[str, str]
LONGEST_SPECIAL = 256  # characters; the longest control token that we know has 40


class ChatTemplate(Protocol):
    """What a prompt asks of a chat template."""

    @property
    def name(self) -> str: ...
    @property
    def source(self) -> str: ...
    def render(
        self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = True, **variables: Any
    ) -> str: ...


class ChatTokenizer(TextDecoder, Protocol):
    """What a prompt asks of a tokenizer."""

    @property
    def bos(self) -> int | None: ...
    @property
    def eos(self) -> int | None: ...
    @property
    def vocabulary_size(self) -> int: ...
    def token(self, id: int) -> str: ...
    def encode(self, text: str, *, special: bool = True, bos: bool | None = None) -> list[int]: ...
    def encode_prompt(self, rendered: str) -> list[int]: ...


@dataclass(frozen=True, slots=True)
class Turn:
    """One message as a prompt needs it: `tokens` are the ids that spell an answer, none where nobody knows them."""

    role: str
    content: str
    tokens: Sequence[int] = ()


@dataclass(frozen=True, slots=True)
class Prompt:
    """A conversation as the template renders it and as token ids."""

    text: str
    tokens: list[int]


def prompt_of(turns: Sequence[Turn], template: ChatTemplate, tokenizer: ChatTokenizer, **variables: Any) -> Prompt:
    """The prompt for an answer to these turns; `variables` are the template's own. Raises TemplateError,
    TokenizerError."""
    messages = [{"role": turn.role, "content": turn.content} for turn in turns]
    rendered = template.render(messages, add_generation_prompt=True, **variables)
    tokens: list[int] = []
    done = 0
    for start, turn in _kept(turns, rendered, tokenizer):
        tokens += _encoded(tokenizer, rendered[done:start], first=not done)
        tokens += turn.tokens
        done = start + len(turn.content)
    return Prompt(rendered, tokens + _encoded(tokenizer, rendered[done:], first=not done))


def _kept(turns: Sequence[Turn], rendered: str, tokenizer: ChatTokenizer) -> Iterator[tuple[int, Turn]]:
    """Answers whose own ids can stand in the prompt, and where their text begins."""
    at = 0
    for turn in turns:
        if not turn.content or (start := rendered.find(turn.content, at)) < 0:
            continue
        end = start + len(turn.content)
        if turn.role != "assistant":
            at = end
        elif turn.tokens and start and _begins_special(rendered, end, tokenizer):
            yield start, turn
            at = end


def _begins_special(rendered: str, at: int, tokenizer: ChatTokenizer) -> bool:
    """Text after a special token is tokenised by itself; anywhere else the seam could change the ids."""
    following = tokenizer.encode(rendered[at : at + LONGEST_SPECIAL], special=True, bos=False)
    return bool(following) and tokenizer.is_special(following[0])


def _encoded(tokenizer: ChatTokenizer, text: str, *, first: bool) -> list[int]:
    if first:
        return tokenizer.encode_prompt(text)
    return tokenizer.encode(text, special=True, bos=False)


def marker_of(tokenizer: ChatTokenizer, token: int, markers: Markers | None) -> str:
    """The text of a reasoning marker that is one control token, which a decoder drops; "" for any other token."""
    if markers and tokenizer.is_special(token):
        for marker in markers:
            if tokenizer.encode(marker, special=True, bos=False) == [token]:
                return marker
    return ""


def spelled(tokenizer: ChatTokenizer, tokens: Sequence[int], markers: Markers | None) -> str:
    """The text of an answer by its ids, reasoning markers in their places."""
    stream = tokenizer.stream(continues=True)
    return "".join(stream.push(id) or marker_of(tokenizer, id, markers) for id in tokens) + stream.finish()
