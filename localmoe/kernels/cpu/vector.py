"""LLVM vectors as values inside Numba functions: types, operators, how an operation is defined; knows no kernel.

In a kernel, `x + y`, `x * 2`, `x >> 4`, `x & 15` work on vectors of one kind (a scalar is spread over the lanes).
Imports numba: to be imported only where something must be compiled.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from functools import cache
from typing import Any

from llvmlite import ir
from numba import types
from numba.core.extending import intrinsic, lower_builtin, models, register_model
from numba.core.typing.templates import AbstractTemplate, infer_global, signature

SCALARS: dict[str, types.Type] = {
    "u8": types.uint8, "i8": types.int8, "u16": types.uint16, "i16": types.int16, "u32": types.uint32, "i32":
    types.int32, "i64": types.int64, "f32": types.float32,
}  # fmt: skip
I32, I64, F32 = ir.IntType(32), ir.IntType(64), ir.FloatType()


def element_type(element: str) -> ir.Type:
    return F32 if element == "f32" else ir.IntType(int(element[1:]))


class Vector(types.Type):
    """Numba's type of `lanes` values of one element kind: u8 i8 u16 i16 u32 i32 i64 f32."""

    def __init__(self, element: str, lanes: int) -> None:
        self.element, self.lanes = element, lanes
        self.ir = ir.VectorType(element_type(element), lanes)
        super().__init__(name=f"{element}x{lanes}")

    @property
    def scalar(self) -> types.Type:
        return SCALARS[self.element]

    @property
    def floating(self) -> bool:
        return self.element == "f32"

    @property
    def signed(self) -> bool:
        return self.element[0] == "i"


@register_model(Vector)
class _VectorModel(models.PrimitiveModel):  # type: ignore[misc]
    def __init__(self, manager: Any, kind: Vector) -> None:
        super().__init__(manager, kind, kind.ir)


@cache
def kind(element: str, lanes: int) -> Vector:
    return Vector(element, lanes)


Lowering = Callable[..., ir.Value]
_ARITIES: dict[int, Callable[[Any], Any]] = {
    0: lambda f: lambda typingctx: f(),
    1: lambda f: lambda typingctx, a: f(a),
    2: lambda f: lambda typingctx, a, b: f(a, b),
    3: lambda f: lambda typingctx, a, b, c: f(a, b, c),
    4: lambda f: lambda typingctx, a, b, c, d: f(a, b, c, d),
    6: lambda f: lambda typingctx, a, b, c, d, e, g: f(a, b, c, d, e, g),
    8: lambda f: lambda typingctx, a, b, c, d, e, g, h, i: f(a, b, c, d, e, g, h, i),
}


def operation(define: Callable[..., tuple[types.Type, Lowering] | None]) -> Any:
    """Make an intrinsic of `define(*argument types) -> (result type, lower(builder, *values))`; None refuses the
    types."""

    def typed(*arguments: types.Type) -> Any:
        defined = define(*arguments)
        if defined is None:
            return None
        result, lower_values = defined

        def codegen(context: Any, builder: ir.IRBuilder, signature: Any, values: Any) -> ir.Value:
            return lower_values(builder, *values)

        return result(*arguments), codegen

    definition = _ARITIES[define.__code__.co_argcount](typed)
    definition.__name__ = definition.__qualname__ = define.__name__
    return intrinsic(definition)


def constant(of: Vector, values: float | list[float] | list[int]) -> ir.Constant:
    many = values if isinstance(values, list) else [values] * of.lanes
    return ir.Constant(of.ir, [ir.Constant(of.ir.element, float(x) if of.floating else int(x)) for x in many])


def shuffled(b: ir.IRBuilder, x: ir.Value, y: ir.Value, indices: list[int]) -> ir.Value:
    return b.shuffle_vector(x, y, ir.Constant(ir.VectorType(I32, len(indices)), [ir.Constant(I32, i) for i in indices]))


def spread(b: ir.IRBuilder, scalar: ir.Value, lanes: int) -> ir.Value:
    undefined = ir.Constant(ir.VectorType(scalar.type, lanes), ir.Undefined)
    return shuffled(b, b.insert_element(undefined, scalar, ir.Constant(I32, 0)), undefined, [0] * lanes)


def call(b: ir.IRBuilder, name: str, result: ir.Type, *values: ir.Value) -> ir.Value:
    """Call an LLVM intrinsic by its mangled name."""
    kept = b.module.globals.get(name)
    return b.call(kept or ir.Function(b.module, ir.FunctionType(result, [x.type for x in values]), name), values)


def mangled(of: ir.Type) -> str:
    """The suffix of an overloaded LLVM intrinsic: v16f32, f32, i64."""
    if isinstance(of, ir.VectorType):
        return f"v{of.count}{mangled(of.element)}"
    return "f32" if isinstance(of, ir.FloatType) else f"i{of.width}"


_OPERATORS: dict[Any, tuple[str | None, str, str]] = {
    operator.add: ("fadd", "add", "add"), operator.sub: ("fsub", "sub", "sub"), operator.mul: ("fmul", "mul", "mul"),
    operator.truediv: ("fdiv", "", ""), operator.and_: (None, "and_", "and_"), operator.or_: (None, "or_", "or_"),
    operator.xor: (None, "xor", "xor"), operator.lshift: (None, "shl", "shl"), operator.rshift: (None, "ashr", "lshr"),
}  # fmt: skip


def _register_operator(symbol: Any, instructions: tuple[str | None, str, str]) -> None:
    class Typing(AbstractTemplate):  # type: ignore[misc]
        key = symbol

        def generic(self, args: Any, kws: Any) -> Any:
            if len(args) != 2 or not isinstance(args[0], Vector) or not instructions[0 if args[0].floating else 1]:
                return None
            x, y = args
            return signature(x, x, x if y == x else x.scalar) if y == x or isinstance(y, types.Number) else None

    infer_global(symbol)(Typing)

    def lower_operator(context: Any, builder: ir.IRBuilder, signature: Any, values: Any) -> ir.Value:
        x, y = values
        of = signature.args[0]
        if signature.args[1] != of:
            y = spread(builder, y, of.lanes)
        return getattr(builder, instructions[0 if of.floating else 1 if of.signed else 2] or "")(x, y)

    for other in (Vector, types.Integer, types.Float):
        lower_builtin(symbol, Vector, other)(lower_operator)


for _symbol, _instructions in _OPERATORS.items():
    _register_operator(_symbol, _instructions)
