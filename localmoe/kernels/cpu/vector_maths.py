"""Vector operations on values: arithmetic, conversions, shuffles, sums of lanes, products, exp; touches no memory."""

from __future__ import annotations

import operator
from typing import Any

from llvmlite import ir
from numba import types
from numba.core.extending import lower_builtin
from numba.core.typing.templates import AbstractTemplate, infer_global, signature

from localmoe.kernels.cpu.isa import Isa
from localmoe.kernels.cpu.vector import (
    F32,
    I32,
    Lowering,
    Vector,
    call,
    constant,
    kind,
    mangled,
    operation,
    shuffled,
    spread,
)
from localmoe.kernels.cpu.vector_memory import like, number, storage

I1, I16 = ir.IntType(1), ir.IntType(16)
Defined = tuple[types.Type, Lowering] | None


@infer_global(operator.neg)
class _Negation(AbstractTemplate):  # type: ignore[misc]
    key = operator.neg

    def generic(self, args: Any, kws: Any) -> Any:
        return signature(args[0], args[0]) if isinstance(args[0], Vector) else None


@lower_builtin(operator.neg, Vector)
def _negate(context: Any, b: ir.IRBuilder, signature: Any, values: Any) -> ir.Value:
    return b.fneg(values[0]) if signature.args[0].floating else b.neg(values[0])


def operations(isa: Isa) -> dict[str, Any]:
    return {**_floats(isa), **_lanes(), **_across(), **_products(isa)}


def fused(b: ir.IRBuilder, isa: Isa, x: ir.Value, y: ir.Value, z: ir.Value) -> ir.Value:
    """x·y + z, rounded once where the processor has the instruction, twice elsewhere."""
    return call(b, f"llvm.fma.{mangled(x.type)}", x.type, x, y, z) if isa.fused else b.fadd(b.fmul(x, y), z)


def nearest_integers(b: ir.IRBuilder, x: ir.Value) -> ir.Value:
    """To nearest even for |x| < 2^22: adding 1.5·2^23 leaves the integer in the low bits, on every processor."""
    words = like(x.type, I32)
    return b.sub(b.bitcast(b.fadd(x, number(x.type, 12582912.0)), words), number(words, 0x4B400000))


def exponential(b: ir.IRBuilder, isa: Isa, x: ir.Value) -> ir.Value:
    """exp by 2^n · p(r), |r| <= ln(2)/2, p of degree 7; relative error about 1e-7. -inf gives 0, +inf gives inf, NaN
    stays."""
    f = lambda value: number(x.type, value)  # noqa: E731
    words = like(x.type, I32)
    x = b.select(b.fcmp_ordered("<", x, f(-104.0)), f(-104.0), x)
    x = b.select(b.fcmp_ordered(">", x, f(89.0)), f(89.0), x)
    n = nearest_integers(b, b.fmul(x, f(1.44269502162933349609375)))
    whole = b.sitofp(n, x.type)
    r = fused(b, isa, whole, f(-0.693359375), x)
    r = fused(b, isa, whole, f(2.12194440e-4), r)
    p = f(1.0 / 5040)
    for coefficient in (1.0 / 720, 1.0 / 120, 1.0 / 24, 1.0 / 6, 0.5, 1.0, 1.0):
        p = fused(b, isa, p, r, f(coefficient))
    first = b.ashr(n, number(words, 1))  # 2^n in two factors: n = 128 and subnormal results need both
    for power in (first, b.sub(n, first)):
        p = b.fmul(p, b.bitcast(b.shl(b.add(power, number(words, 127)), number(words, 23)), x.type))
    return p


def _floats(isa: Isa) -> dict[str, Any]:
    @operation
    def fma(x: types.Type, y: types.Type, z: types.Type) -> Defined:
        """v.fma(x, y, z): x·y + z; vectors of one kind, or float32 scalars."""
        return (x, lambda b, p, q, r: fused(b, isa, p, q, r)) if x == y == z else None

    @operation
    def sqrt(x: types.Type) -> Defined:
        return x, lambda b, p: call(b, f"llvm.sqrt.{mangled(p.type)}", p.type, p)

    @operation
    def absolute(x: types.Type) -> Defined:
        return x, lambda b, p: call(b, f"llvm.fabs.{mangled(p.type)}", p.type, p)

    @operation
    def minimum(x: types.Type, y: types.Type) -> Defined:
        """v.minimum(x, y): y where either is NaN."""
        return (x, lambda b, p, q: b.select(b.fcmp_ordered("<", p, q), p, q)) if x == y else None

    @operation
    def maximum(x: types.Type, y: types.Type) -> Defined:
        """v.maximum(x, y): y where either is NaN."""
        return (x, lambda b, p, q: b.select(b.fcmp_ordered(">", p, q), p, q)) if x == y else None

    @operation
    def above(p: types.Type, q: types.Type, x: types.Type, y: types.Type) -> Defined:
        """v.above(p, q, x, y): the lanes of x where p > q, of y elsewhere."""
        return (x, lambda b, r, s, t, u: b.select(b.fcmp_ordered(">", r, s), t, u)) if p == q and x == y else None

    @operation
    def exp(x: types.Type) -> Defined:
        return x, lambda b, p: exponential(b, isa, p)

    @operation
    def nearest(x: types.Type) -> Defined:
        """v.nearest(x): the nearest integers (ties to even) as i32, for |x| < 2^22."""
        return kind("i32", x.lanes) if isinstance(x, Vector) else types.int32, nearest_integers

    return {
        "fma": fma, "sqrt": sqrt, "absolute": absolute, "minimum": minimum, "maximum": maximum, "exp": exp, "nearest":
        nearest, "above": above,
    }  # fmt: skip


def _converted(b: ir.IRBuilder, x: ir.Value, source: Any, target: Any) -> ir.Value:
    to, signed = storage(target), source.signed
    floating = target == types.float32 or (isinstance(target, Vector) and target.floating)
    if floating:
        return b.sitofp(x, to) if signed else b.uitofp(x, to)
    before, after = (t.element.width if isinstance(t, ir.VectorType) else t.width for t in (x.type, to))
    if before >= after:
        return x if before == after else b.trunc(x, to)
    return b.sext(x, to) if signed else b.zext(x, to)


def _lanes() -> dict[str, Any]:
    @operation
    def splat(of: Any, scalar: types.Type) -> Defined:
        """v.splat(kind, scalar): the same value in every lane; the scalar has the kind's element type, or is a wider
        integer."""
        target = of.instance_type

        def lowered(b: ir.IRBuilder, _: ir.Value, x: ir.Value) -> ir.Value:
            if isinstance(x.type, ir.DoubleType):
                x = b.fptrunc(x, F32)
            elif not target.floating and x.type.width > target.ir.element.width:
                x = b.trunc(x, target.ir.element)
            return spread(b, x, target.lanes)

        return target, lowered

    @operation
    def zero(of: Any) -> Defined:
        return of.instance_type, lambda b, _: constant(of.instance_type, 0)

    @operation
    def bits(of: Any, x: types.Type) -> Defined:
        """v.bits(kind, x): the same bits seen as another kind; scalars too (a u64 of bytes as u8x8)."""
        return of.instance_type, lambda b, _, p: b.bitcast(p, storage(of.instance_type))

    @operation
    def convert(of: Any, x: Any) -> Defined:
        """v.convert(kind, x): integers widened by their own sign, narrowed by cutting, or as float32."""
        return of.instance_type, lambda b, _, p: _converted(b, p, x, of.instance_type)

    @operation
    def marked(of: Any, mask: Any) -> Defined:
        """v.marked(kind of integers, mask): all bits of lane i are bit i of an integer of at least as many bits."""
        target = of.instance_type

        def lowered(b: ir.IRBuilder, _: ir.Value, x: ir.Value) -> ir.Value:
            bits = x if x.type.width == target.lanes else b.trunc(x, ir.IntType(target.lanes))
            return b.sext(b.bitcast(bits, ir.VectorType(I1, target.lanes)), target.ir)

        return target, lowered

    def constants(of: Vector, values: list[Any]) -> Any:
        """v.constants(kind, values) in the factory, `name()` in the kernel."""

        @operation
        def constant_vector() -> Defined:
            return of, lambda b: constant(of, values)

        return constant_vector

    def shuffle(indices: list[int]) -> Any:
        """v.shuffle(indices) in the factory, `name(x, y)` in the kernel: lane i is lane indices[i] of x, then y."""

        @operation
        def shuffle_lanes(x: Any, y: Any) -> Defined:
            return (kind(x.element, len(indices)), lambda b, p, q: shuffled(b, p, q, indices)) if x == y else None

        return shuffle_lanes

    return {
        "splat": splat,
        "zero": zero,
        "bits": bits,
        "convert": convert,
        "marked": marked,
        "constants": constants,
        "shuffle": shuffle,
    }


def _folded(b: ir.IRBuilder, x: ir.Value, join: Any) -> ir.Value:
    """A fixed tree: the upper half onto the lower half until one lane is left."""
    lanes = x.type.count
    while lanes > 1:
        lanes //= 2
        x = join(shuffled(b, x, x, list(range(lanes))), shuffled(b, x, x, list(range(lanes, 2 * lanes))))
    return b.extract_element(x, ir.Constant(I32, 0))


def _across() -> dict[str, Any]:
    @operation
    def total(x: Any) -> Defined:
        """v.total(x): the sum over the lanes, always in the same order."""
        return x.scalar, lambda b, p: _folded(b, p, b.fadd if x.floating else b.add)

    @operation
    def largest(x: Any) -> Defined:
        """v.largest(x): the maximum over the lanes."""

        def lowered(b: ir.IRBuilder, p: ir.Value) -> ir.Value:
            return _folded(b, p, lambda q, r: b.select(b.fcmp_ordered(">", q, r), q, r))

        return x.scalar, lowered

    return {"total": total, "largest": largest}


def _pair_sums(b: ir.IRBuilder, x: ir.Value, y: ir.Value, of: ir.Type) -> ir.Value:
    """Sums of neighbouring products x·y of already widened integers."""
    product = b.mul(x, y)
    assert product.type.count == 2 * of.count
    even, odd = (shuffled(b, product, product, list(range(i, product.type.count, 2))) for i in (0, 1))
    return b.add(even, odd)


def _by_halves(b: ir.IRBuilder, isa: Isa, x: ir.Value, y: ir.Value, operation: Any) -> ir.Value:
    """An operation on vectors twice as wide as the processor's, half by half."""
    count = x.type.count
    parts = [list(range(i, i + count // 2)) for i in (0, count // 2)]
    low, high = (operation(b, isa, shuffled(b, x, x, part), shuffled(b, y, y, part)) for part in parts)
    return shuffled(b, low, high, list(range(2 * low.type.count)))


def _word_pairs(b: ir.IRBuilder, isa: Isa, x: ir.Value, y: ir.Value) -> ir.Value:
    """i16 × i16, neighbours added, as i32."""
    lanes = x.type.count // 2
    words = ir.VectorType(I32, lanes)
    if isa.name == "avx2" and lanes == 16:
        return _by_halves(b, isa, x, y, _word_pairs)
    if isa.name != "portable" and lanes >= 4:
        name = {4: "sse2.pmadd.wd", 8: "avx2.pmadd.wd", 16: "avx512.pmaddw.d.512"}[lanes]
        return call(b, f"llvm.x86.{name}", words, x, y)
    wide = ir.VectorType(I32, 2 * lanes)
    return _pair_sums(b, b.sext(x, wide), b.sext(y, wide), words)


def _byte_pairs(b: ir.IRBuilder, isa: Isa, x: ir.Value, y: ir.Value) -> ir.Value:
    """u8 × i8, neighbours added, as i16; the sums must fit, as one instruction saturates and the other form wraps."""
    lanes = x.type.count // 2
    shorts = ir.VectorType(I16, lanes)
    if isa.name == "avx2" and lanes == 32:
        return _by_halves(b, isa, x, y, _byte_pairs)
    if isa.name != "portable" and lanes >= 8:
        name = {8: "ssse3.pmadd.ub.sw.128", 16: "avx2.pmadd.ub.sw", 32: "avx512.pmaddubs.w.512"}[lanes]
        return call(b, f"llvm.x86.{name}", shorts, x, y)
    wide = ir.VectorType(I16, 2 * lanes)
    return _pair_sums(b, b.zext(x, wide), b.sext(y, wide), shorts)


def small_dot_products(b: ir.IRBuilder, isa: Isa, total: ir.Value, x: ir.Value, y: ir.Value) -> ir.Value:
    """As `dot_products` for u8 of seven bits, which on AVX2 takes three instructions and not seven."""
    if isa.name != "avx2":
        return dot_products(b, isa, total, x, y, signed=False)
    pairs = _byte_pairs(b, isa, x, y)
    return b.add(total, _word_pairs(b, isa, pairs, number(pairs.type, 1)))


def dot_products(b: ir.IRBuilder, isa: Isa, total: ir.Value, x: ir.Value, y: ir.Value, signed: bool) -> ir.Value:
    """total + sums of four neighbouring products, exact for every input; x is i8 where `signed`, else u8; y is i8."""
    lanes = total.type.count
    if isa.name == "avx512":
        name = f"llvm.x86.avx512.vpdpbusd.{32 * lanes}"
        if not signed:
            return call(b, name, total.type, total, x, y)
        offset = number(x.type, -128)  # (x + 128)·y - 128·y
        plus = call(b, name, total.type, total, b.xor(x, offset), y)
        return b.sub(plus, call(b, name, total.type, number(total.type, 0), offset, y))
    if signed and isa.name == "avx2":
        magnitude = call(b, f"llvm.abs.{mangled(x.type)}", x.type, x, ir.Constant(I1, 0))
        turned = call(b, "llvm.x86.avx2.psign.b" if lanes == 8 else "llvm.x86.ssse3.psign.b.128", y.type, y, x)
        pairs = _byte_pairs(b, isa, magnitude, turned)
        return b.add(total, _word_pairs(b, isa, pairs, number(pairs.type, 1)))
    if not isa.x86:
        if not signed:  # (x - 128)·y + 128·y: the instruction that every dot product extension has is signed
            offset = number(x.type, -128)
            total = dot_products(b, isa, total, b.xor(x, offset), y, True)
            return b.sub(total, dot_products(b, isa, number(total.type, 0), offset, y, True))
        wide = ir.VectorType(I32, 4 * lanes)
        product = b.mul(b.sext(x, wide), b.sext(y, wide))
        return call(b, f"llvm.vector.partial.reduce.add.v{lanes}i32.v{4 * lanes}i32", total.type, total, product)
    wide = ir.VectorType(I16, 4 * lanes)
    pairs = _word_pairs(b, isa, b.sext(x, wide) if signed else b.zext(x, wide), b.sext(y, wide))
    even, odd = (shuffled(b, pairs, pairs, list(range(i, 2 * lanes, 2))) for i in (0, 1))
    return b.add(total, b.add(even, odd))


def dot_word_products(b: ir.IRBuilder, isa: Isa, total: ir.Value, x: ir.Value, y: ir.Value) -> ir.Value:
    """total + sums of two neighbouring products of i16."""
    if isa.name != "avx512":
        return b.add(total, _word_pairs(b, isa, x, y))
    name = f"llvm.x86.avx512.vpdpwssd.{32 * total.type.count}"
    return call(b, name, total.type, total, b.bitcast(x, total.type), b.bitcast(y, total.type))


def _looked_up(b: ir.IRBuilder, isa: Isa, table: ir.Value, indices: ir.Value) -> ir.Value:
    """Bytes of `table` at `indices`, inside pieces of 16."""
    lanes = table.type.count
    if isa.x86 and isa.name != "portable" and (lanes <= 32 or isa.name == "avx512"):
        name = {16: "ssse3.pshuf.b.128", 32: "avx2.pshuf.b", 64: "avx512.pshuf.b.512"}[lanes]
        return call(b, f"llvm.x86.{name}", table.type, table, indices)
    if lanes > 16:
        return _by_halves(b, isa, table, indices, _looked_up)
    if not isa.x86:
        return call(b, "llvm.aarch64.neon.tbl1.v16i8", table.type, table, indices)
    found = ir.Constant(table.type, ir.Undefined)
    for i in range(lanes):
        index = b.zext(b.extract_element(indices, I32(i)), I32)
        found = b.insert_element(found, b.extract_element(table, index), I32(i))
    return found


def _products(isa: Isa) -> dict[str, Any]:
    @operation
    def dot(total: Any, x: Any, y: Any) -> Defined:
        """v.dot(total i32xN, x u8x4N or i8x4N, y i8x4N): total + four products a lane, exact unless an i32 overflows.

        With AVX2 an i8 `y` must not be -128 where x is negative (activations are quantised to ±127).
        """
        return total, lambda b, t, p, q: dot_products(b, isa, t, p, q, x.signed)

    @operation
    def byte_pairs(x: Any, y: Any) -> Defined:
        """v.byte_pairs(u8x2N, i8x2N): neighbouring products added, as i16xN; each sum must fit 16 bits."""
        return kind("i16", x.lanes // 2), lambda b, p, q: _byte_pairs(b, isa, p, q)

    @operation
    def word_pairs(x: Any, y: Any) -> Defined:
        """v.word_pairs(i16x2N, i16x2N): neighbouring products added, as i32xN."""
        return kind("i32", x.lanes // 2), lambda b, p, q: _word_pairs(b, isa, p, q)

    @operation
    def dot_words(total: Any, x: Any, y: Any) -> Defined:
        """v.dot_words(total i32xN, x i16x2N, y i16x2N): total + two products a lane."""
        return total, lambda b, t, p, q: dot_word_products(b, isa, t, p, q)

    @operation
    def look_up(table: Any, indices: Any) -> Defined:
        """v.look_up(table of bytes, indices u8): byte indices[i], which must be below 16, of the 16 bytes of the table
        that lane i is among."""
        return table, lambda b, t, i: _looked_up(b, isa, t, i)

    return {"look_up": look_up, "dot": dot, "byte_pairs": byte_pairs, "word_pairs": word_pairs, "dot_words": dot_words}
