"""From a kernel's factory to an LLVM module: the operations it is given, Numba without its optimiser; knows no kernel.

`vectors(isa)` gives the module `v` that a factory receives: the kinds of vectors (`vector.py`) and what
`vector_memory.py`, `vector_maths.py`, `vector_tile.py`, `vector_integer.py` and `vector_words.py` define. Imports
numba: to be imported only where something must be compiled.
"""

# Numba's own types are incomplete.

from __future__ import annotations

import re
from collections.abc import Callable
from functools import cache
from types import ModuleType
from typing import Any

import llvmlite.binding as llvm
from numba import njit, types
from numba.core import compiler
from numba.core.codegen import JITCodeLibrary
from numba.core.compiler_lock import global_compiler_lock
from numba.core.registry import cpu_target

from localmoe.kernels.cpu import vector_integer, vector_maths, vector_memory, vector_tile, vector_words
from localmoe.kernels.cpu.isa import Isa
from localmoe.kernels.cpu.vector import SCALARS, kind


@cache
def vectors(isa: Isa) -> ModuleType:
    """The operations of one instruction set, as a module so that Numba resolves `v.name` while compiling.

    Kinds of vectors are v.f32, v.i32 (as many lanes as the instruction set has) and v.u8x64, v.i16x8 …; scalars are
    v.float32, v.int64 ….
    """
    v = ModuleType(f"vectors_{isa.name}")
    members: dict[str, Any] = {"isa": isa, "lanes": isa.lanes}
    members.update(f32=kind("f32", isa.lanes), i32=kind("i32", isa.lanes))
    members.update({f"{e}x{n}": kind(e, n) for e in SCALARS for n in (2, 4, 8, 16, 32, 64)})
    members.update({str(t): t for t in SCALARS.values()})
    members["function"] = njit(inline="always", error_model="numpy", boundscheck=False)
    members.update(vector_memory.operations(isa))
    members.update(vector_maths.operations(isa))
    members.update(vector_tile.operations(isa))
    members.update(vector_integer.operations(isa))
    members.update(vector_words.operations(isa))
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
def lower(function: Callable[..., None], name: str, arguments: int, isa: Isa) -> llvm.ModuleRef:
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
    entry = _entry(name, compiled.fndesc.mangled_name, arguments, isa)
    # Without the attribute, a loop that stores zeros would become a call of the C library's memset.
    text = f"{library.get_llvm_str()}\n{entry}"
    text = re.sub(r"^(define .*\))( (?:#\d+ )?\{)$", r'\1 "no-builtins"\2', text, flags=re.MULTILINE)
    module = llvm.parse_assembly(text)
    module.triple = isa.triple
    for symbol in (*module.functions, *module.global_variables):
        if not symbol.is_declaration and symbol.name != name:
            symbol.linkage = "internal"
    module.verify()
    return module


def _entry(name: str, inner: str, arguments: int, isa: Isa) -> str:
    """C entry point over Numba's calling convention: (result address, exception address, arguments) -> status, here
    always 0. LLVM aligns no stack for the registers that it keeps there: those of 64 bytes would cross lines."""
    values = ", ".join(f"i64 %a{i}" for i in range(arguments))
    aligned = "alignstack(64) " if isa.name == "avx512" else ""
    passed = ", ".join(["ptr %result", "ptr %exception", *(f"i64 %a{i}" for i in range(arguments))])
    return (
        f'define void @"{name}"({values}) {aligned}{{\n  %result = alloca ptr\n  %exception = alloca ptr\n'
        f'  %status = call i32 @"{inner}"({passed})\n  ret void\n}}\n'
    )
