"""Chat templates: jinja2 in a sandbox with bounds on time and size, and templates by name; knows nothing of tokens.

The dialect is that of Hugging Face `transformers` (utils/chat_template_utils.py). A template comes with a downloaded model,
so it is hostile until proved otherwise: whatever can loop or grow passes through `Budget`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, ItemsView, Iterable, Iterator, KeysView, Mapping, Sequence, ValuesView
from datetime import datetime
from functools import wraps
from time import monotonic
from typing import Any

from jinja2 import Template as JinjaTemplate
from jinja2 import TemplateSyntaxError, nodes, pass_context
from jinja2.ext import Extension, LoopControlExtension
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

from localmoe.errors import TemplateError

SOURCE_LIMIT = 1 << 16  # characters of a template; the longest real ones have 20 thousand
SIZE_LIMIT = 1 << 23  # characters or items of one value, and of what is rendered
WORK_LIMIT = 1 << 26  # characters and items made in one rendering
BITS_LIMIT = 1 << 12  # of a whole number
SECONDS_LIMIT = 2.0
WIDTH_LIMIT = 10_000  # of one field of a format

WIDE_PERCENT = re.compile(r"%(\([^)]*\))?[-#0 +]*(\d*\.)?(\*|\d{5,})")
WIDE_BRACES = re.compile(r"\{[^{}]*:[^{}]*(\d{5,}|\{)")
PADDING = ("center", "ljust", "rjust", "zfill")
# jinja2 filters that no chat template needs and whose cost is hard to bound.
LEFT_OUT = ("pprint", "random", "striptags", "urlize", "wordwrap", "xmlattr")

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


class Budget:
    """What one rendering may cost; each method raises TemplateError where that is exceeded."""

    def __init__(self) -> None:
        self._deadline = monotonic() + SECONDS_LIMIT
        self._work = WORK_LIMIT
        self._weights: dict[int, tuple[object, int]] = {}  # the value is kept so that its id stays its own

    def tick(self) -> None:
        if monotonic() > self._deadline:
            raise TemplateError(f"still rendering after {SECONDS_LIMIT:g} seconds")

    def allow(self, size: int) -> None:
        """To be asked before something of `size` characters or items is made."""
        if size > SIZE_LIMIT:
            raise TemplateError(f"a value of {size:,} characters or items, possible are {SIZE_LIMIT:,}")

    def weight(self, value: object) -> int:
        """Characters and items of a value with all that it holds, counted as often as it is reached."""
        if isinstance(value, str | bytes):
            return len(value)
        if not isinstance(value, list | tuple | set | frozenset | dict | KeysView | ValuesView | ItemsView):
            return 1
        if id(value) not in self._weights:
            items: Iterable[object] = value.items() if isinstance(value, dict) else value
            self._weights[id(value)] = (value, 1 + sum(map(self.weight, items)))
        return self._weights[id(value)][1]

    def measured(self, value: Any) -> Any:
        """`value` itself, once it is found to be small enough."""
        self.tick()
        if isinstance(value, int) and value.bit_length() > BITS_LIMIT:
            raise TemplateError(f"a whole number of {value.bit_length():,} bits, possible are {BITS_LIMIT:,}")
        if isinstance(value, str | bytes | list | tuple | set | frozenset | dict):
            self._work -= len(value)
            if self._work < 0:
                raise TemplateError(f"more than {WORK_LIMIT:,} characters and items made in one rendering")
        self.allow(self.weight(value))
        return value


class QuietNamespace(Namespace):
    """jinja2's namespace, without its contents in print: those may lead back to itself."""

    def __repr__(self) -> str:
        return "<Namespace>"


class Generation(Extension):
    """`{% generation %} ... {% endgeneration %}`: marks the assistant's text for training; here it is what it encloses."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


class Guarded(NodeTransformer):
    """Sends loops, `~` and made containers of a parsed template through the environment's checks."""

    def visit_For(self, node: nodes.For) -> nodes.Node:
        self.generic_visit(node)
        node.iter = self._call("counted", node.iter, [node.iter])
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return self._call("concatenated", node, node.nodes)

    def visit_List(self, node: nodes.List) -> nodes.Node:
        return self._made(node, node.items)

    def visit_Tuple(self, node: nodes.Tuple) -> nodes.Node:
        return self._made(node, node.items) if node.ctx == "load" else node

    def visit_Dict(self, node: nodes.Dict) -> nodes.Node:
        return self._made(node, [part for pair in node.items for part in (pair.key, pair.value)])

    def _made(self, node: nodes.Expr, parts: Sequence[nodes.Node]) -> nodes.Node:
        constant = all(isinstance(part, nodes.Const) for part in parts)
        self.generic_visit(node)
        return node if constant else self._call("measured", node, [node])

    def _call(self, name: str, at: nodes.Node, arguments: list[nodes.Expr]) -> nodes.Call:
        where = {"lineno": at.lineno, "environment": at.environment}
        return nodes.Call(nodes.EnvironmentAttribute(name, **where), arguments, [], None, None, **where)


class Sandbox(ImmutableSandboxedEnvironment):
    """The environment of one rendering: Hugging Face's dialect, every operation within `budget`."""

    intercepted_binops = frozenset(("+", "-", "*", "/", "//", "**", "%"))

    def __init__(self, budget: Budget) -> None:
        # Constant expressions are not computed while compiling (`optimized`, and `finalize` wanting a context).
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            optimized=False,
            cache_size=0,
            extensions=[LoopControlExtension, Generation],
        )
        self.budget = budget
        self.measured = budget.measured
        self.finalize = self.shown  # type: ignore[assignment]
        self.filters = {name: self._bounded(name, f) for name, f in self.filters.items() if name not in LEFT_OUT}
        self.filters["tojson"] = self._bounded("tojson", _tojson)
        del self.globals["lipsum"]
        self.globals.update(namespace=QuietNamespace, raise_exception=_raise_exception, strftime_now=_strftime_now)

    def counted(self, items: Iterable[Any]) -> Iterator[Any]:
        """The same items; the clock is read at each."""
        for item in items:
            self.budget.tick()
            yield item

    def concatenated(self, *parts: object) -> str:
        self.budget.allow(sum(map(self.budget.weight, parts)))
        return "".join(map(str, parts))

    def concat(self, parts: Iterable[str]) -> str:  # type: ignore[override]
        """jinja2's own joining of what a block, macro or `set` rendered."""
        texts = list(parts)
        self.budget.allow(sum(map(len, texts)))
        return str(self.budget.measured("".join(texts)))

    @pass_context
    def shown(self, context: Context, value: Any) -> Any:
        """What stands between `{{ }}`, before it becomes text."""
        return self.budget.measured(value)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        weight, allow = self.budget.weight, self.budget.allow
        if operator == "*":
            for many, count in ((left, right), (right, left)):
                if isinstance(count, int) and not isinstance(many, int | float):
                    allow(weight(many) * count)
        elif operator == "**" and isinstance(left, int) and isinstance(right, int):
            if left.bit_length() * abs(right) > BITS_LIMIT:
                raise TemplateError(f"a power of more than {BITS_LIMIT:,} bits")
        elif operator == "%" and isinstance(left, str):
            self._check_percent(left, right)
        return self.measured(super().call_binop(context, operator, left, right))

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805
        owner = getattr(__obj, "__self__", None)
        if isinstance(owner, str | bytes):
            args = __self._checked_method(owner, getattr(__obj, "__name__", ""), args, kwargs)
        elif isinstance(owner, int) and getattr(__obj, "__name__", "") == "to_bytes":
            raise TemplateError("to_bytes is not supported in templates")
        __self.budget.tick()
        return __self.measured(super().call(__context, __obj, *args, **kwargs))

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        wrapped = super().wrap_str_format(value)
        if wrapped is None:
            return None

        def bounded(*args: Any, **kwargs: Any) -> str:
            pattern: str = value.__self__
            if WIDE_BRACES.search(pattern):
                raise TemplateError(f"a format with a field wider than {WIDTH_LIMIT:,}")
            self.budget.allow(pattern.count("{") * (WIDTH_LIMIT + self.budget.weight((args, kwargs))))
            return wrapped(*args, **kwargs)

        return bounded

    def _check_percent(self, pattern: str, values: object) -> None:
        if WIDE_PERCENT.search(pattern):
            raise TemplateError(f"a format with a field wider than {WIDTH_LIMIT:,}")
        self.budget.allow(pattern.count("%") * (WIDTH_LIMIT + self.budget.weight(values)))

    def _checked_method(
        self, owner: str | bytes, name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> tuple[Any, ...]:
        """The arguments for a method of a string, once its result is known to be small enough."""
        allow = self.budget.allow
        largest = max((value for value in (*args, *kwargs.values()) if isinstance(value, int)), default=8)
        if name == "translate":
            raise TemplateError("translate is not supported in templates")
        if name in PADDING:
            allow(largest)
        elif name == "expandtabs":
            allow(len(owner) * largest)
        elif name == "replace" and len(args) >= 2 and all(isinstance(text, type(owner)) for text in args[:2]):
            allow(len(owner) + owner.count(args[0]) * len(args[1]))
        elif name == "join" and args:
            items = list(self.counted(args[0]))
            allow(self.budget.weight(items) + len(items) * len(owner))
            return (items,)
        return args

    def _bounded(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """A filter with its checks; the position of its input depends on what jinja2 passes in front (`pass_context` ...)."""
        first = 1 if hasattr(function, "jinja_pass_arg") else 0

        @wraps(function)
        def bounded(*args: Any, **kwargs: Any) -> Any:
            self.budget.tick()
            before, value, options = args[:first], args[first], args[first + 1 :]
            if name in ("join", "sum", "batch", "slice") and isinstance(value, Iterator):
                value = list(self.counted(value))
            if name in ("batch", "center", "indent", "join", "slice", "tojson"):
                sizes = (self._factor(option) for option in (*options, *kwargs.values()))
                self.budget.allow((1 + self.budget.weight(value)) * max(sizes, default=1))
            elif (
                name == "sum"
                and isinstance(value, list | tuple)
                and any(isinstance(item, list | tuple) for item in value)
            ):
                self.budget.allow(len(value) * self.budget.weight(value) // 16)
            elif name == "format" and isinstance(value, str):
                self._check_percent(value, (options, kwargs))
            elif name == "replace":
                self._checked_method(str(value), "replace", tuple(map(str, options[:2])), kwargs)
            return self.measured(function(*before, value, *options, **kwargs))

        return bounded

    def _factor(self, option: object) -> int:
        return option if isinstance(option, int) else self.budget.weight(option)


class Template:
    """A compiled chat template; `bos` and `eos` are what the template sees as bos_token and eos_token."""

    def __init__(self, source: str, *, name: str, bos: str = "", eos: str = "") -> None:
        """Raises TemplateError, with the line, for what is no jinja2."""
        self.source, self.name, self.bos, self.eos = source, name, bos, eos
        if len(source) > SOURCE_LIMIT:
            raise TemplateError(f"template {name}: {len(source):,} characters long, possible are {SOURCE_LIMIT:,}")
        environment = Sandbox(Budget())
        try:
            tree = Guarded().visit(environment.parse(source, name, name))
            self._code = environment.compile(tree, name, name)
        except TemplateSyntaxError as error:
            raise TemplateError(f"template {name}, line {error.lineno}: {error.message}") from error
        except Exception as error:
            raise TemplateError(f"template {name}: {_reason(error)}") from error

    def render(
        self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = True, **variables: Any
    ) -> str:
        """The prompt for `messages` (role, content ...). `variables` are the template's own (tools, enable_thinking ...).

        Raises TemplateError for what the template raises, and where it exceeds its bounds.
        """
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


def _raise_exception(message: object) -> None:
    raise TemplateError(str(message))


def _strftime_now(format: str) -> str:
    if len(format) > 100 or re.search(r"\d{3}", format):
        raise TemplateError("strftime_now: the format is too long")
    return datetime.now().strftime(format)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON as transformers writes it: jinja2's own escapes what is special in HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


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
    "{% else %}{{ message.content }}\n\n{% endif %}{% endfor %}{% if add_generation_prompt %}### Response:\n{% endif %}",
    "chatml": _TURN + "{{ '<|im_start|>' ~ message.role ~ '\n' ~ message.content ~ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
    "command-r": "{{ bos_token }}{% set roles = {'user': 'USER', 'assistant': 'CHATBOT'} %}"
    + _TURN
    + "<|START_OF_TURN_TOKEN|><|{{ roles.get(message.role, 'SYSTEM') }}_TOKEN|>{{ message.content }}<|END_OF_TURN_TOKEN|>"
    "{% endfor %}{% if add_generation_prompt %}<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>{% endif %}",
    "deepseek": "{{ bos_token }}" + _TURN + "{% if message.role == 'user' %}<\uff5cUser\uff5c>{{ message.content }}"
    "{% elif message.role == 'assistant' %}<\uff5cAssistant\uff5c>{{ message.content.split('</think>') | last }}{{ eos_token }}"
    "{% else %}{{ message.content }}{% endif %}{% endfor %}{% if add_generation_prompt %}<\uff5cAssistant\uff5c>{% endif %}",
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
