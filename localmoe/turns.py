"""What a template writes around the turns of a conversation, found by rendering a short one; knows no tokens."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from localmoe.errors import TemplateError

# Words that no template writes itself, and that none of its filters changes.
SYSTEM, QUESTION, ANSWER, NEXT = "Xqsystem", "Xqquestion", "Xqanswer", "Xqnext"
MARKER = re.compile(r"\s*(<[^<>\s]{1,80}>|\[[^\[\]\s]{1,80}\])")


class Renders(Protocol):
    """What is asked of a chat template."""

    def render(
        self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = True, **variables: Any
    ) -> str: ...


@dataclass(frozen=True, slots=True)
class Turns:
    """The text before the first question, between it and its answer, behind the answer up to the next question, and
    behind that: where the model is to speak."""

    before: str
    between: str
    behind: str
    end: str

    @property
    def marker(self) -> str:
        """What closes an answer, where that looks like a token: `<|im_end|>`, `</s>`; else empty."""
        match = MARKER.match(self.behind)
        return match[1] if match else ""

    @property
    def head(self) -> str:
        """What stands between the end of an answer and the next question, without the marker and the space around."""
        return self.behind.strip().removeprefix(self.marker).strip()


def spoken(*roles_and_words: str) -> list[dict[str, str]]:
    """Messages of (role, words, role, words …)."""
    pairs = zip(roles_and_words[::2], roles_and_words[1::2], strict=True)
    return [{"role": role, "content": words} for role, words in pairs]


def turns_of(template: Renders, system: bool = False) -> Turns:
    """Of two questions and an answer. Raises TemplateError where the template raises or leaves one of them out."""
    first = spoken("system", SYSTEM) if system else []
    messages = first + spoken("user", QUESTION, "assistant", ANSWER, "user", NEXT)
    rendered = template.render(messages, add_generation_prompt=True)
    before, _, rest = rendered.partition(QUESTION)
    between, _, rest = rest.partition(ANSWER)
    behind, found, end = rest.partition(NEXT)
    if not found:
        raise TemplateError("messages of a plain conversation are left out, or stand in another order")
    return Turns(before, between, behind, end)
