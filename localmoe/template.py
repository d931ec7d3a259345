"""Chat templates, a model's own jinja2 source or one by name: messages to a prompt's text; knows nothing of tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from localmoe.errors import TemplateError
from localmoe.named_templates import ALIASES, NAMED

__all__ = ["ALIASES", "NAMED", "Template", "choices", "named_source", "reasoning_markers", "without_template"]

SOURCE_LIMIT = 1 << 16  # characters of a template; the longest real ones have 20 thousand

REASONING_MARKERS = (
    ("<think>", "</think>"),
    ("[THINK]", "[/THINK]"),
    ("<seed:think>", "</seed:think>"),
    ("<|START_THINKING|>", "<|END_THINKING|>"),
    ("<|channel|>analysis<|message|>", "<|end|>"),
    ("<|inner_prefix|>", "<|inner_suffix|>"),
    ("\u25c1think\u25b7", "\u25c1/think\u25b7"),
    ("<thinking>", "</thinking>"),
    ("<reasoning>", "</reasoning>"),
)


class Template:
    """A compiled chat template; `bos` and `eos` are what the template sees as bos_token and eos_token."""

    def __init__(self, source: str, *, name: str, bos: str = "", eos: str = "") -> None:
        """Raises TemplateError, with the line, for what is no jinja2."""
        from jinja2 import TemplateSyntaxError

        from localmoe.sandbox import Budget, Guarded, Sandbox

        self.source, self.name, self.bos, self.eos = source, name, bos, eos
        if len(source) > SOURCE_LIMIT:
            raise TemplateError(f"template {name}: {len(source):,} characters long, possible are {SOURCE_LIMIT:,}")
        environment = Sandbox(Budget())
        try:
            # A file name alone: jinja2 writes a template's name into its code, where an apostrophe would end a string.
            tree = Guarded().visit(environment.parse(source, None, name))
            self._code = environment.compile(tree, None, name)
        except TemplateSyntaxError as error:
            raise TemplateError(f"template {name}, line {error.lineno}: {error.message}") from error
        except Exception as error:
            raise TemplateError(f"template {name}: {_reason(error)}") from error

    def render(
        self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = True, **variables: Any
    ) -> str:
        """The prompt for `messages` (role, content ...); `variables` are the template's own (tools, thinking ...).

        Raises TemplateError for what the template raises, and where it exceeds its bounds.
        """
        from jinja2 import Template as JinjaTemplate

        from localmoe.sandbox import Budget, Sandbox

        budget = Budget()
        given = {"messages": messages, "add_generation_prompt": add_generation_prompt}
        known = {"bos_token": self.bos, "eos_token": self.eos}
        environment = Sandbox(budget)
        pieces: list[str] = []
        size = 0
        try:
            compiled = JinjaTemplate.from_code(environment, self._code, dict(environment.globals))
            for piece in compiled.generate({**known, **given, **variables}):
                budget.tick()
                size += len(piece)
                budget.allow(size)
                pieces.append(piece)
        except Exception as error:
            raise TemplateError(f"template {self.name}{self._line(error)}: {_reason(error)}") from error
        return "".join(pieces)

    def _line(self, error: BaseException) -> str:
        """The template's line in which `error` was raised, jinja2 having put it into the traceback."""
        line, trace = 0, error.__traceback__
        while trace is not None:
            if trace.tb_frame.f_code.co_filename == self.name:
                line = trace.tb_lineno
            trace = trace.tb_next
        return f", line {line}" if line else ""


def reasoning_markers(source: str) -> tuple[str, str] | None:
    """What opens and closes a block of reasoning in the answers of a model with this template; None for one without."""
    for opening, closing in REASONING_MARKERS:
        if closing in source and (opening in source or closing.startswith("</")):
            return opening, closing
    return None


def choices() -> list[str]:
    """The names in `NAMED` and those that mean one of them, sorted."""
    return sorted({*NAMED, *ALIASES})


def without_template(model: str) -> TemplateError:
    """What is wrong with a model that has none, and the ways round it."""
    return TemplateError(
        f"{model} has no chat template: name one with --template (in a chat: /template, then /model): "
        f"{', '.join(choices())}, or a file"
    )


def named_source(name: str) -> str | None:
    """The template of that name; None where there is none."""
    return NAMED.get(ALIASES.get(name, name))


def _reason(error: Exception) -> str:
    if isinstance(error, RecursionError):
        return "macros or values nested too deep"
    text = str(error) if isinstance(error, TemplateError) else f"{type(error).__name__}: {error}"
    return " ".join("".join(c if c.isprintable() else " " for c in text[:300]).split())
