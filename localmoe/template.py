"""Chat templates, a model's own jinja2 source or one by name: messages to a prompt's text; knows nothing of tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from localmoe.errors import TemplateError

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
    """The names in `NAMED`, sorted."""
    return sorted(NAMED)


def _reason(error: Exception) -> str:
    if isinstance(error, RecursionError):
        return "macros or values nested too deep"
    text = str(error) if isinstance(error, TemplateError) else f"{type(error).__name__}: {error}"
    return " ".join("".join(c if c.isprintable() else " " for c in text[:300]).split())


# Written from the models' documented prompt formats; "mistral" is the v3 form, "deepseek" that of V2.5, V3 and R1.
_TURN = "{% for message in messages %}"
_ALTERNATING = (
    "{% set system = messages[0].content if messages and messages[0].role == 'system' else '' %}"
    "{% for message in (messages[1:] if system else messages) %}"
    "{% set lead = SYSTEM if loop.first and system else '' %}"
)
NAMED: Mapping[str, str] = {
    "alpaca": _TURN + "{% if message.role == 'user' %}### Instruction:\n{{ message.content }}\n\n"
    "{% elif message.role == 'assistant' %}### Response:\n{{ message.content }}{{ eos_token }}\n\n"
    "{% else %}{{ message.content }}\n\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}### Response:\n{% endif %}",
    "chatml": _TURN + "{{ '<|im_start|>' ~ message.role ~ '\n' ~ message.content ~ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
    "command-r": "{{ bos_token }}{% set roles = {'user': 'USER', 'assistant': 'CHATBOT'} %}"
    + _TURN
    + "<|START_OF_TURN_TOKEN|><|{{ roles.get(message.role, 'SYSTEM') }}_TOKEN|>"
    "{{ message.content }}<|END_OF_TURN_TOKEN|>"
    "{% endfor %}{% if add_generation_prompt %}<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>{% endif %}",
    "deepseek": "{{ bos_token }}" + _TURN + "{% if message.role == 'user' %}<\uff5cUser\uff5c>{{ message.content }}"
    "{% elif message.role == 'assistant' %}<\uff5cAssistant\uff5c>"
    "{{ message.content.split('</think>') | last }}{{ eos_token }}"
    "{% else %}{{ message.content }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<\uff5cAssistant\uff5c>{% endif %}",
    "gemma": "{{ bos_token }}"
    + _ALTERNATING.replace("SYSTEM", "system ~ '\n\n'")
    + "<start_of_turn>{{ 'model' if message.role == 'assistant' else message.role }}\n"
    "{{ lead ~ message.content | trim }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}",
    "llama2": _ALTERNATING.replace("SYSTEM", "'<<SYS>>\n' ~ system ~ '\n<</SYS>>\n\n'")
    + "{% if message.role == 'user' %}{{ bos_token }}[INST] {{ lead ~ message.content | trim }} [/INST]"
    "{% else %} {{ message.content | trim }} {{ eos_token }}{% endif %}{% endfor %}",
    "llama3": "{{ bos_token }}" + _TURN + "<|start_header_id|>{{ message.role }}<|end_header_id|>\n\n"
    "{{ message.content | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}",
    "mistral": "{{ bos_token }}"
    + _ALTERNATING.replace("SYSTEM", "system ~ '\n\n'")
    + "{% if message.role == 'user' %}[INST] {{ lead ~ message.content }}[/INST]"
    "{% else %} {{ message.content | trim }}{{ eos_token }}{% endif %}{% endfor %}",
    "phi3": _TURN + "{{ '<|' ~ message.role ~ '|>\n' ~ message.content ~ '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}",
    "vicuna": _TURN + "{% if message.role == 'user' %}USER: {{ message.content }}\n"
    "{% elif message.role == 'assistant' %}ASSISTANT: {{ message.content }}{{ eos_token }}\n"
    "{% else %}{{ message.content }}\n\n{% endif %}{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}",
    "zephyr": _TURN + "{{ '<|' ~ message.role ~ '|>\n' ~ message.content ~ eos_token ~ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}",
}
