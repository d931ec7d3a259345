"""A jinja2 sandbox for templates that come with downloaded models; knows nothing of what they are for.

The dialect is that of Hugging Face `transformers` (utils/chat_template_utils.py). Such a template is hostile until
proved otherwise: whatever can loop or grow passes through a `Budget`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, ItemsView, Iterable, Iterator, KeysView, Mapping, Sequence, ValuesView
from datetime import datetime
from functools import wraps
from time import monotonic
from typing import Any

from jinja2 import nodes, pass_context
from jinja2.ext import Extension, LoopControlExtension
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

from localmoe.errors import TemplateError

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
    """`{% generation %} ... {% endgeneration %}`: marks text for training; here it is what it encloses."""

    tags = {"generation"}  # noqa: RUF012

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

    def _made(self, node: nodes.Expr, parts: Sequence[nodes.Expr]) -> nodes.Node:
        constant = all(isinstance(part, nodes.Const) for part in parts)
        self.generic_visit(node)
        return node if constant else self._call("measured", node, [node])

    def _call(self, name: str, at: nodes.Node, arguments: Sequence[nodes.Node]) -> nodes.Call:
        where = {"lineno": at.lineno, "environment": at.environment}
        return nodes.Call(nodes.EnvironmentAttribute(name, **where), list(arguments), [], None, None, **where)


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
        self.finalize = self.shown
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

    def concat(self, parts: Iterable[str]) -> str:
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
        """A filter with its checks; jinja2 may pass a context or environment in front of the input."""
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
