"""LLVM vectors as values inside Numba functions, and the way from such a function to an LLVM module; knows no kernel.

`vectors(isa)` gives the module `v` that a kernel factory receives. In a kernel, `x + y`, `x * 2`, `x >> 4`, `x & 15`
work on vectors of one kind (a scalar is spread over the lanes); everything else is a function of `v` from
`vector_memory.py`, `vector_maths.py` and `vector_tile.py`. Imports numba: to be imported only where something must be
compiled.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from functools import cache
from types import ModuleType
from typing import Any

import llvmlite.binding as llvm
from llvmlite import ir
from numba import njit, types
from numba.core import compiler
from numba.core.codegen import JITCodeLibrary
from numba.core.compiler_lock import global_compiler_lock
from numba.core.extending import intrinsic, lower_builtin, models, register_model
from numba.core.registry import cpu_target
from numba.core.typing.templates import AbstractTemplate, infer_global, signature

from localmoe.kernels.cpu.isa import Isa

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
    6: lambda f: lambda typingctx, a, b, c, d, e, g: f(a, b, c, d, e, g),
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


@cache
def vectors(isa: Isa) -> ModuleType:
    """The operations of one instruction set, as a module so that Numba resolves `v.name` while compiling.

    Kinds of vectors are v.f32, v.i32 (as many lanes as the instruction set has) and v.u8x64, v.i16x8 …; scalars are
    v.float32, v.int64 ….
    """
    from localmoe.kernels.cpu import vector_maths, vector_memory, vector_tile

    v = ModuleType(f"vectors_{isa.name}")
    members: dict[str, Any] = {"isa": isa, "lanes": isa.lanes}
    members.update(f32=kind("f32", isa.lanes), i32=kind("i32", isa.lanes))
    members.update({f"{e}x{n}": kind(e, n) for e in SCALARS for n in (2, 4, 8, 16, 32, 64)})
    members.update({str(t): t for t in SCALARS.values()})
    members["function"] = njit(inline="always", error_model="numpy", boundscheck=False)
    members.update(vector_memory.operations(isa))
    members.update(vector_maths.operations(isa))
    members.update(vector_tile.operations(isa))
    for name, member in members.items():
        setattr(v, name, member)
    return v


class _PlainLibrary(JITCodeLibrary):  # type: ignore[misc]
    """Collects what Numba lowers and leaves it as it is: Numba's own passes would optimise for the host's widest
    instructions."""

    def _optimize_functions(self, ll_module: Any) -> None:
        ll_module.data_layout = self._codegen._data_layout

    def _optimize_final_module(self) -> None:
        return

    def _finalize_final_module(self) -> None:
        self._finalized = True


@global_compiler_lock
def lower(function: Callable[..., None], name: str, arguments: int) -> llvm.ModuleRef:
    """The unoptimised LLVM module of `void name(int64 x arguments)`; everything else in it is internal."""
    flags = compiler.Flags()
    flags.nrt, flags.no_cpython_wrapper, flags.no_cfunc_wrapper, flags.no_compile = False, True, True, True
    flags.error_model, flags.boundscheck, flags.enable_pyobject = "numpy", False, False
    context = cpu_target.target_context
    library = _PlainLibrary(context.codegen(), name)
    compiled = compiler.compile_extra(
        cpu_target.typing_context, context, function, (types.int64,) * arguments, types.void, flags, {}, library=library
    )
    library.finalize()
    module = llvm.parse_assembly(f"{library.get_llvm_str()}\n{_entry(name, compiled.fndesc.mangled_name, arguments)}")
    module.triple = llvm.get_process_triple()
    for symbol in (*module.functions, *module.global_variables):
        if not symbol.is_declaration and symbol.name != name:
            symbol.linkage = "internal"
    module.verify()
    return module


def _entry(name: str, inner: str, arguments: int) -> str:
    """C entry point over Numba's calling convention: (result address, exception address, arguments) -> status, here
    always 0."""
    values = ", ".join(f"i64 %a{i}" for i in range(arguments))
    passed = ", ".join(["ptr %result", "ptr %exception", *(f"i64 %a{i}" for i in range(arguments))])
    return (
        f'define void @"{name}"({values}) {{\n  %result = alloca ptr\n  %exception = alloca ptr\n'
        f'  %status = call i32 @"{inner}"({passed})\n  ret void\n}}\n'
    )
