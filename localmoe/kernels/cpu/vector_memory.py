"""Vector operations on memory: loads, stores, tables, stack, prefetch, atomics, calls by address. Addresses are int64
values."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.extending import intrinsic

from localmoe.kernels.cpu.isa import Isa
from localmoe.kernels.cpu.vector import F32, I32, I64, Lowering, Vector, call, operation

I8, I16, HALF = ir.IntType(8), ir.IntType(16), ir.HalfType()
Defined = tuple[types.Type, Lowering] | None


def storage(of: Any) -> ir.Type:
    """How a value of a Numba type lies in memory."""
    if isinstance(of, Vector):
        return of.ir
    return F32 if of == types.float32 else ir.IntType(of.bitwidth)


def pointer(b: ir.IRBuilder, address: ir.Value, to: ir.Type) -> ir.Value:
    return b.inttoptr(address, to.as_pointer())


def fetch(b: ir.IRBuilder, address: ir.Value, of: ir.Type) -> ir.Value:
    return b.load(pointer(b, address, of), align=1)


def like(of: ir.Type, element: ir.Type) -> ir.Type:
    """`element`, in as many lanes as `of` has."""
    return ir.VectorType(element, of.count) if isinstance(of, ir.VectorType) else element


def number(of: ir.Type, value: float) -> ir.Constant:
    """The same constant in every lane."""
    if isinstance(of, ir.VectorType):
        return ir.Constant(of, [ir.Constant(of.element, value)] * of.count)
    return ir.Constant(of, value)


def half_to_float(b: ir.IRBuilder, isa: Isa, bits: ir.Value) -> ir.Value:
    """float16 bits (integers of 16 bits) to float32, exact for every input including subnormal values."""
    floats, words = like(bits.type, F32), like(bits.type, I32)
    if isa.halves:
        return b.fpext(b.bitcast(bits, like(bits.type, HALF)), floats)
    wide = b.zext(bits, words)
    magnitude = b.and_(wide, number(words, 0x7FFF))
    rebased = b.add(b.shl(magnitude, number(words, 13)), number(words, 112 << 23))
    special = b.icmp_unsigned(">=", magnitude, number(words, 0x7C00))
    rebased = b.select(special, b.or_(rebased, number(words, 0x7F800000)), rebased)
    tiny = b.fmul(b.sitofp(magnitude, floats), number(floats, 2.0**-24))
    chosen = b.select(b.icmp_unsigned("<", magnitude, number(words, 0x400)), b.bitcast(tiny, words), rebased)
    return b.bitcast(b.or_(chosen, b.shl(b.and_(wide, number(words, 0x8000)), number(words, 16))), floats)


def float_to_half(b: ir.IRBuilder, isa: Isa, x: ir.Value) -> ir.Value:
    """float32 to float16 bits, to nearest even, as the processor's own instruction does."""
    words, short = like(x.type, I32), like(x.type, I16)
    if isa.halves:
        return b.bitcast(b.fptrunc(x, like(x.type, HALF)), short)
    bits = b.bitcast(x, words)
    magnitude = b.and_(bits, number(words, 0x7FFFFFFF))
    odd = b.and_(b.lshr(magnitude, number(words, 13)), number(words, 1))
    normal = b.lshr(b.add(b.add(magnitude, number(words, 0xC8000FFF - (1 << 32))), odd), number(words, 13))
    shifted = b.fadd(b.bitcast(magnitude, x.type), number(x.type, 0.5))  # subnormal: the adder of 0.5 rounds to 2^-24
    tiny = b.sub(b.bitcast(shifted, words), number(words, 0x3F000000))
    small = b.icmp_unsigned("<", magnitude, number(words, 113 << 23))
    large = b.icmp_unsigned(">=", magnitude, number(words, 143 << 23))
    not_a_number = b.icmp_unsigned(">", magnitude, number(words, 0x7F800000))
    over = b.select(not_a_number, number(words, 0x7E00), number(words, 0x7C00))
    chosen = b.select(large, over, b.select(small, tiny, normal))
    sign = b.lshr(b.and_(bits, number(words, 0x80000000 - (1 << 32))), number(words, 16))
    return b.trunc(b.or_(chosen, sign), short)


def operations(isa: Isa) -> dict[str, Any]:
    return {**_plain(), **_prefetching(isa), **_converting(isa), **_static(), **_machine(isa)}


def _plain() -> dict[str, Any]:
    @operation
    def load(of: Any, address: types.Type) -> Defined:
        """v.load(kind, address): a vector or scalar of that kind; no alignment is needed."""
        return of.instance_type, lambda b, _, a: fetch(b, a, storage(of.instance_type))

    @operation
    def store(address: types.Type, x: types.Type) -> Defined:
        """v.store(address, value): in the value's own kind; no alignment is needed."""

        def lowered(b: ir.IRBuilder, a: ir.Value, value: ir.Value) -> ir.Value:
            b.store(value, pointer(b, a, storage(x)), align=1)
            return ir.Constant(I8.as_pointer(), None)

        return types.void, lowered

    return {"load": load, "store": store}


def _prefetching(isa: Isa) -> dict[str, Any]:
    """v.prefetch(address), v.prefetch_second(address): a line into the first or second level; v.prefetch_stream: into
    `Isa.stream_level`. Any address will do."""

    def prefetch_into(level: int) -> Any:
        @operation
        def prefetch(address: types.Type) -> Defined:
            def lowered(b: ir.IRBuilder, a: ir.Value) -> ir.Value:
                prefetched(b, pointer(b, a, I8), level)
                return ir.Constant(I8.as_pointer(), None)

            return types.void, lowered

        return prefetch

    levels = {"prefetch": 1, "prefetch_second": 2, "prefetch_stream": isa.stream_level}
    return {name: prefetch_into(level) for name, level in levels.items()}


def prefetched(b: ir.IRBuilder, place: ir.Value, level: int) -> None:
    """Ask for a line of memory into the first or second level."""
    locality = 4 - level
    call(b, "llvm.prefetch.p0", ir.VoidType(), place, I32(0), I32(locality), I32(1))


def _converting(isa: Isa) -> dict[str, Any]:
    @operation
    def load_half(of: Any, address: types.Type) -> Defined:
        """v.load_half(kind, address): float16 values as float32."""
        result = of.instance_type
        return result, lambda b, _, a: half_to_float(b, isa, fetch(b, a, like(storage(result), I16)))

    @operation
    def load_bfloat(of: Any, address: types.Type) -> Defined:
        """v.load_bfloat(kind, address): bfloat16 values as float32."""
        result = of.instance_type
        words = like(storage(result), I32)

        def lowered(b: ir.IRBuilder, _: ir.Value, a: ir.Value) -> ir.Value:
            wide = b.zext(fetch(b, a, like(storage(result), I16)), words)
            return b.bitcast(b.shl(wide, number(words, 16)), storage(result))

        return result, lowered

    @operation
    def half(bits: types.Type) -> Defined:
        """v.half(bits): float16 bits, in a 16-bit or wider integer or vector, as float32."""
        result = _float_like(bits)
        return result, lambda b, x: half_to_float(b, isa, x if _width(bits) == 16 else b.trunc(x, like(x.type, I16)))

    @operation
    def store_half(address: types.Type, x: types.Type) -> Defined:
        """v.store_half(address, value): float32 stored as float16, to nearest even."""

        def lowered(b: ir.IRBuilder, a: ir.Value, value: ir.Value) -> ir.Value:
            bits = float_to_half(b, isa, value)
            b.store(bits, pointer(b, a, bits.type), align=1)
            return ir.Constant(I8.as_pointer(), None)

        return types.void, lowered

    return {"load_half": load_half, "load_bfloat": load_bfloat, "half": half, "store_half": store_half}


def _float_like(of: types.Type) -> types.Type:
    from localmoe.kernels.cpu.vector import kind

    return kind("f32", of.lanes) if isinstance(of, Vector) else types.float32


def _width(of: Any) -> Any:
    return of.ir.element.width if isinstance(of, Vector) else of.bitwidth


def _static() -> dict[str, Any]:
    def table(values: npt.NDArray[Any]) -> Any:
        """v.table(array) in the factory, `address = name()` in the kernel: the array's bytes, held in the object."""
        data = np.ascontiguousarray(values).tobytes()

        @operation
        def address_of_table() -> Defined:
            def lowered(b: ir.IRBuilder) -> ir.Value:
                held = cgutils.global_constant(b, "table", ir.Constant(ir.ArrayType(I8, len(data)), bytearray(data)))
                held.align = 64
                return b.ptrtoint(held, I64)

            return types.int64, lowered

        return address_of_table

    def stack(nbytes: int) -> Any:
        """v.stack(n) in the factory, `address = name()` in the kernel: n zero bytes of its own stack, aligned to 64.

        Each mention of `name()` is memory of its own: call it once and keep the address.
        """

        @operation
        def address_on_stack() -> Defined:
            def lowered(b: ir.IRBuilder) -> ir.Value:
                held = cgutils.alloca_once(b, ir.ArrayType(I8, nbytes))
                held.align = 64
                return b.ptrtoint(held, I64)

            return types.int64, lowered

        return address_on_stack

    def strided(of: Vector, stride: int) -> Any:
        """v.strided(kind, stride) in the factory, `name(address)` in the kernel: lane i from address + i · stride."""

        @operation
        def load_strided(address: types.Type) -> Defined:
            def lowered(b: ir.IRBuilder, a: ir.Value) -> ir.Value:
                lanes = ir.Constant(of.ir, ir.Undefined)
                for i in range(of.lanes):
                    lane = fetch(b, b.add(a, I64(i * stride)), of.ir.element)
                    lanes = b.insert_element(lanes, lane, I32(i))
                return lanes

            return of, lowered

        return load_strided

    return {"table": table, "stack": stack, "strided": strided}


def _machine(isa: Isa) -> dict[str, Any]:
    nothing = ir.Constant(I8.as_pointer(), None)

    @operation
    def atomic_add(address: types.Type, value: types.Type) -> Defined:
        """v.atomic_add(address, value): the int64 that was there before."""
        return types.int64, lambda b, a, x: b.atomic_rmw("add", pointer(b, a, I64), x, "seq_cst")

    @operation
    def atomic_load(address: types.Type) -> Defined:
        return types.int64, lambda b, a: b.load_atomic(pointer(b, a, I64), "acquire", 8)

    @operation
    def atomic_store(address: types.Type, value: types.Type) -> Defined:
        def lowered(b: ir.IRBuilder, a: ir.Value, x: ir.Value) -> ir.Value:
            b.store_atomic(x, pointer(b, a, I64), "release", 8)
            return nothing

        return types.void, lowered

    @operation
    def pause() -> Defined:
        """v.pause(): a hint inside a spin loop."""

        def lowered(b: ir.IRBuilder) -> ir.Value:
            if isa.x86:
                call(b, "llvm.x86.sse2.pause", ir.VoidType())
            else:
                b.fence("seq_cst")
            return nothing

        return types.void, lowered

    @operation
    def flush_denormals() -> Defined:
        """v.flush_denormals(): this thread reads and writes subnormal numbers as zero (x86; nothing elsewhere)."""

        def lowered(b: ir.IRBuilder) -> ir.Value:
            if isa.x86:
                word = cgutils.alloca_once(b, I32)
                address = b.bitcast(word, I8.as_pointer())
                call(b, "llvm.x86.sse.stmxcsr", ir.VoidType(), address)
                b.store(b.or_(b.load(word), I32(0x8040)), word)
                call(b, "llvm.x86.sse.ldmxcsr", ir.VoidType(), address)
            return nothing

        return types.void, lowered

    return {
        "atomic_add": atomic_add, "atomic_load": atomic_load, "atomic_store": atomic_store, "pause": pause,
        "flush_denormals": flush_denormals, "call": call_address,
    }  # fmt: skip


@intrinsic
def call_address(typingctx: Any, address: types.Type, *arguments: types.Type) -> Any:
    """v.call(address, a, b, …): call `void f(int64, …)` at an address."""

    def codegen(context: Any, b: ir.IRBuilder, signature: Any, values: Any) -> ir.Value:
        given = zip(cgutils.unpack_tuple(b, values[1]), arguments, strict=True)
        passed = [context.cast(b, x, t, types.int64) for x, t in given]
        function = ir.FunctionType(ir.VoidType(), [I64] * len(passed))
        b.call(b.inttoptr(values[0], function.as_pointer()), passed)
        return context.get_dummy_value()

    return types.void(address, types.StarArgTuple.from_types(arguments)), codegen
