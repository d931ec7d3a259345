"""Whether and how long a model reasons before it answers: what its template is told, and the budget; knows no model."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Any

from localmoe.errors import SettingError
from localmoe.prompting import Markers

# The names by which templates ask: Qwen3, GLM-4.5, SmolLM3, Hunyuan, ERNIE; DeepSeek-V3.1, Granite; gpt-oss.
SWITCHES = ("enable_thinking", "thinking")
EFFORT = "reasoning_effort"
EFFORTS = ("low", "medium", "high")
USAGE = "on, off, low, medium, high, budget N (0 lifts it), show, hide"


@dataclass(frozen=True, slots=True)
class Thinking:
    """`mode` is "" (as the template does by itself), "on", "off", or an effort; `budget` is the most tokens of
    reasoning, 0 for any number."""

    mode: str = ""
    budget: int = 0

    def __str__(self) -> str:
        return (self.mode or "as the template has it") + (f", at most {self.budget} tokens" if self.budget else "")

    def variables(self, source: str) -> dict[str, Any]:
        """What a template with this source is told."""
        if self.mode in ("on", "off"):
            return {name: self.mode == "on" for name in SWITCHES if _asks(source, name)}
        return {EFFORT: self.mode} if self.mode and _asks(source, EFFORT) else {}

    def changed(self, words: str, source: str, markers: Markers | None) -> Thinking:
        """As `/think words` asks, for a model with this template. Raises SettingError where it cannot be so."""
        word, _, value = words.partition(" ")
        if word == "budget":
            return self._with_budget(value.strip(), markers)
        if word not in ("on", "off", *EFFORTS) or value:
            raise SettingError(f"/think takes {USAGE}, not {words[:40]!r}")
        wanted = replace(self, mode=word)
        if not wanted.variables(source):
            known = [name for name in (*SWITCHES, EFFORT) if _asks(source, name)]
            efforts = known == [EFFORT]
            possible = f"it takes {', '.join(EFFORTS)}" if efforts else "it takes on or off" if known else "it has none"
            raise SettingError(f"the template has no switch for /think {word}: {possible}")
        return wanted

    def _with_budget(self, value: str, markers: Markers | None) -> Thinking:
        if not value.isascii() or not value.isdecimal() or len(value) > 9:
            raise SettingError(f"a budget is a whole number of tokens from 0 up (0 lifts it), not {value[:40]!r}")
        if int(value) and closing_of(markers) is None:
            raise SettingError("this model has no marker that ends its reasoning: a budget is not possible")
        return replace(self, budget=int(value))


def closing_of(markers: Markers | None) -> str | None:
    """The text that ends reasoning in mid-sentence; None where a marker alone would not begin the answer."""
    if markers is None or not markers[1].startswith(("</", "[/", "\u25c1/")):
        return None
    return f"\n{markers[1]}\n\n"


def _asks(source: str, name: str) -> bool:
    return re.search(rf"\b{name}\b", source) is not None
