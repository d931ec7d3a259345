"""Matrix products on the cpu: one row by matrix-vector kernels, many rows by a GEMM; contracts `linear` and
`head_linear`.

Rows are quantised to the form that a weight's kernels read, once for all weights of that form, or stay float32.
Threads share out the rows of a weight, each row's sum has one order: results do not depend on the number of threads.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from localmoe.kernels.cpu import gemm, products
from localmoe.kernels.cpu.activations import QUANTISERS, activation_nbytes
from localmoe.kernels.cpu.arguments import Argument, At, Function, row_count, share, slots
from localmoe.kernels.cpu.build import kernel
from localmoe.kernels.cpu.matmul import dequantise_kernel, gemv_kernel
from localmoe.kernels.program import Op, Tensor

if TYPE_CHECKING:
    from localmoe.kernels.cpu.lower import Lowering


@kernel("quantise_rows", 3)
def quantise_rows(v: Any) -> Any:
    """Arguments: control, rows, x, token and head strides (bytes), heads, activations, bytes of a row of them,
    columns, quantiser."""
    slot, rows = slots(v), row_count(v)

    def run(a, thread, threads):
        heads = slot(a, 5)
        units = rows(a) * heads
        for row in range(units * thread // threads, units * (thread + 1) // threads):
            source = slot(a, 2) + row // heads * slot(a, 3) + row % heads * slot(a, 4)
            v.call(slot(a, 9), source, slot(a, 6) + row * slot(a, 7), slot(a, 8))

    return run


@kernel("quantise_for_itself", 3)
def quantise_for_itself(v: Any) -> Any:
    """Rows of one token, all of them by each thread: shorter than waiting for others to do a part. Arguments: control,
    rows, x, bytes to the next thread's copy of it (0: shared), its row stride (bytes), count, activations, bytes of a
    row of them, columns, quantiser."""
    slot = slots(v)

    def run(a, thread, threads):
        source, count = slot(a, 2) + thread * slot(a, 3), slot(a, 5)
        target = slot(a, 6) + thread * count * slot(a, 7)
        for row in range(count):
            v.call(slot(a, 9), source + row * slot(a, 4), target + row * slot(a, 7), slot(a, 8))

    return run


@kernel("gemv_weights", 3)
def gemv_weights(v: Any) -> Any:
    """One row times several weights. Arguments: control, rows, count, then for each weight: matrix-vector kernel,
    weights, row bytes, activations, bytes to the next thread's copy of them (0: shared), out, columns, rows, bias (0:
    none)."""
    slot, part = slots(v), share(v)

    def run(a, thread, threads):
        for w in range(a + 24, a + 24 + 72 * slot(a, 2), 72):
            start, stop = part(slot(w, 7), thread, threads)
            x, out = slot(w, 3) + thread * slot(w, 4), slot(w, 5)
            v.call(slot(w, 0), slot(w, 1), slot(w, 2), x, out, slot(w, 6), start, stop)
            if slot(w, 8) != 0:
                for r in range(4 * start, 4 * stop, 4):
                    v.store(out + r, v.load(v.float32, out + r) + v.load(v.float32, slot(w, 8) + r))

    return run


@kernel("pack_rows", 3)
def pack_rows(v: Any) -> Any:
    """Rows into panels for a GEMM. Arguments: control, rows, x, its row stride (bytes), columns, panels, packing
    kernel, tokens of a panel, its bytes."""
    slot, rows = slots(v), row_count(v)

    def run(a, thread, threads):
        tokens, stride, columns, wide = rows(a), slot(a, 3), slot(a, 4), slot(a, 7)
        panels = (tokens + wide - 1) // wide
        for p in range(panels * thread // threads, panels * (thread + 1) // threads):
            first = p * wide
            count = min(wide, tokens - first)
            v.call(slot(a, 6), slot(a, 2) + first * stride, stride, count, columns, slot(a, 5) + p * slot(a, 8))

    return run


@kernel("gemm_weights", 3)
def gemm_weights(v: Any) -> Any:
    """Packed rows times several weights. Arguments: control, rows, count, columns, scratch, its bytes a thread, then
    for each weight: GEMM kernel, unpacking kernel, weights, row bytes, panels, out, rows, rows of a strip, bias (0:
    none)."""
    slot, rows = slots(v), row_count(v)
    block = v.stack(8 * products.ARGUMENTS)

    def run(a, thread, threads):
        tokens, b = rows(a), block()
        for w in range(a + 48, a + 48 + 72 * slot(a, 2), 72):
            out, count, strip = slot(w, 5), slot(w, 6), slot(w, 7)
            strips = (count + strip - 1) // strip
            start, stop = strips * thread // threads * strip, min(count, strips * (thread + 1) // threads * strip)
            if start >= stop:
                continue
            v.store(b, slot(w, 1))
            v.store(b + 8, slot(w, 2))
            v.store(b + 16, slot(w, 3))
            v.store(b + 24, slot(w, 4))
            v.store(b + 32, out)
            v.store(b + 40, 4 * count)
            v.store(b + 48, tokens)
            v.store(b + 56, slot(a, 3))
            v.store(b + 64, start)
            v.store(b + 72, stop)
            v.store(b + 80, slot(a, 4) + thread * slot(a, 5))
            v.call(slot(w, 0), b)
            if slot(w, 8) != 0:
                for t in range(tokens):
                    row = out + 4 * t * count
                    for r in range(4 * start, 4 * stop, 4):
                        v.store(row + r, v.load(v.float32, row + r) + v.load(v.float32, slot(w, 8) + r))

    return run


@kernel("gemv_heads", 3)
def gemv_heads(v: Any) -> Any:
    """One token: each head's row times its matrix. Arguments: control, rows, heads, matrix-vector kernel, table of
    matrices, row bytes, activations, their token and head strides (bytes), out, columns, rows of a matrix."""
    slot, rows = slots(v), row_count(v)

    def run(a, thread, threads):
        tokens, heads, height = rows(a), slot(a, 2), slot(a, 11)
        units = tokens * heads
        for unit in range(units * thread // threads, units * (thread + 1) // threads):
            head, t = unit // tokens, unit % tokens  # all tokens of a head in turn: its matrix stays in cache
            x = slot(a, 6) + t * slot(a, 7) + head * slot(a, 8)
            out = slot(a, 9) + 4 * (t * heads + head) * height
            v.call(slot(a, 3), slot(slot(a, 4), head), slot(a, 5), x, out, slot(a, 10), 0, height)

    return run


@kernel("gemm_heads", 3)
def gemm_heads(v: Any) -> Any:
    """Each head's rows times its matrix; a thread packs and multiplies a whole head. Arguments: control, rows, heads,
    GEMM kernel, dequantise kernel, table of matrices, row bytes, x, its token and head strides (bytes), columns, out,
    rows of a matrix, packing kernel, panels, their bytes a thread, scratch, its bytes a thread."""
    slot, rows = slots(v), row_count(v)
    block = v.stack(8 * gemm.ARGUMENTS)

    def run(a, thread, threads):
        tokens, heads, columns, height, b = rows(a), slot(a, 2), slot(a, 10), slot(a, 12), block()
        panels = slot(a, 14) + thread * slot(a, 15)
        for head in range(heads * thread // threads, heads * (thread + 1) // threads):
            v.call(slot(a, 13), slot(a, 7) + head * slot(a, 9), slot(a, 8), tokens, columns, panels)
            v.store(b, slot(a, 4))
            v.store(b + 8, slot(slot(a, 5), head))
            v.store(b + 16, slot(a, 6))
            v.store(b + 24, panels)
            v.store(b + 32, slot(a, 11) + 4 * head * height)
            v.store(b + 40, 4 * heads * height)
            v.store(b + 48, tokens)
            v.store(b + 56, columns)
            v.store(b + 64, 0)
            v.store(b + 72, height)
            v.store(b + 80, slot(a, 16) + thread * slot(a, 17))
            v.call(slot(a, 3), b)

    return run


@kernel("gemv_heads_transposed", 3)
def gemv_heads_transposed(v: Any) -> Any:
    """Each head's row times its matrix transposed: rows are dequantised one by one and added up. Arguments: control,
    rows, heads, dequantise kernel, table of matrices, row bytes, x, token and head strides (bytes), out, columns, rows
    of a matrix, scratch, its bytes a thread."""
    slot, rows = slots(v), row_count(v)

    def run(a, thread, threads):
        tokens, heads, columns, height = rows(a), slot(a, 2), slot(a, 10), slot(a, 11)
        values = slot(a, 12) + thread * slot(a, 13)
        for head in range(heads * thread // threads, heads * (thread + 1) // threads):
            for t in range(tokens):
                for i in range(columns):
                    v.store(slot(a, 9) + 4 * ((t * heads + head) * columns + i), v.convert(v.float32, 0))
            for r in range(height):
                v.call(slot(a, 3), slot(slot(a, 4), head), slot(a, 5), r, 0, values, columns)
                for t in range(tokens):
                    x = v.load(v.float32, slot(a, 6) + t * slot(a, 7) + head * slot(a, 8) + 4 * r)
                    out = slot(a, 9) + 4 * (t * heads + head) * columns
                    for i in range(0, 4 * columns, 4):
                        v.store(out + i, v.load(v.float32, out + i) + x * v.load(v.float32, values + i))

    return run


def quantised(lowering: Lowering, x: Tensor, kind: str) -> tuple[At, int, int]:
    """Where the activations of x stand in the form `kind`, with their token and head strides in bytes; x itself for
    f32."""
    heads, head_stride = (x.shape[1], 4 * x.strides[1]) if len(x.shape) == 3 else (1, 0)
    if kind == "f32":
        return lowering.at(x), 4 * x.strides[0], head_stride
    columns = x.shape[-1]
    nbytes = activation_nbytes(kind, columns)
    place = lowering.temporary(nbytes * x.shape[0] * heads)
    source = (lowering.at(x), 4 * x.strides[0], head_stride, heads)
    lowering.emit("quantise_rows", x, *source, place, nbytes, columns, Function(QUANTISERS[kind]))
    return place, nbytes * heads, nbytes


def for_itself(lowering: Lowering, x: Tensor, kind: str) -> tuple[At, int, int]:
    """Where a token's activations stand in the form `kind`, each thread's own: with the bytes from one thread's copy to
    the next and from one row of x (1, D) or (1, rows, D) to the next; x itself for f32."""
    count, stride = (x.shape[1], 4 * x.strides[1]) if len(x.shape) == 3 else (1, 0)
    if kind == "f32":
        return lowering.at(x), lowering.apart(x), stride
    columns = x.shape[-1]
    nbytes = activation_nbytes(kind, columns)
    place = lowering.temporary(nbytes * count * lowering.threads)
    source = (lowering.at(x), lowering.apart(x), stride, count)
    lowering.emit("quantise_for_itself", x, *source, place, nbytes, columns, Function(QUANTISERS[kind]))
    return place, nbytes * count, nbytes


def packed(lowering: Lowering, x: Tensor, form: str) -> At:
    """Room for the panels of x (T, K) in that form, and the op that fills it."""
    isa, columns = lowering.isa, x.shape[1]
    wide, nbytes = products.panel_tokens(form, isa), products.panel_nbytes(form, isa, columns)
    panels = lowering.temporary(-(-x.shape[0] // wide) * nbytes)
    packing = (panels, Function(products.packing_kernel(form)), wide, nbytes)
    lowering.emit("pack_rows", x, lowering.at(x), 4 * x.strides[0], columns, *packing)
    return panels


def by_vectors(op: Op) -> bool:
    """Whether a `linear` of one row goes to the matrix-vector kernels: not where these would round an exact input."""
    weights = op.weights[: len(op.outputs)]
    exact = op.attributes["exact"] and any(gemv_kernel(w.format)[1] != "f32" for w in weights)
    return op.inputs[0].shape[0] == 1 and not exact


def lower_linear(lowering: Lowering, op: Op) -> None:
    (x,), flags = op.inputs, op.attributes["biased"]
    biases = iter(op.weights[len(flags) :])
    shift = [lowering.floats(next(biases)) if biased else 0 for biased in flags]
    pairs = list(zip(op.weights, op.outputs, shift, strict=False))
    arguments: list[Argument] = []
    if by_vectors(op):
        forms = {
            kind: for_itself(lowering, x, kind)[:2]
            for kind in dict.fromkeys(gemv_kernel(w.format)[1] for w, _, _ in pairs)
        }
        for weight, out, bias in pairs:
            name, kind = gemv_kernel(weight.format)
            place = (Function(name), lowering.address(weight), weight.row_nbytes, *forms[kind], lowering.at(out))
            arguments += [*place, weight.columns, weight.rows, bias]
        lowering.emit("gemv_weights", x, len(pairs), *arguments)
        return
    chosen = [products.product(w.format, lowering.isa, exact=op.attributes["exact"]) for w, _, _ in pairs]
    panels = {form: packed(lowering, x, form) for form in dict.fromkeys(p.form for p in chosen)}
    for (weight, out, bias), how in zip(pairs, chosen, strict=True):
        arguments += [Function(how.gemm), Function(how.unpack), lowering.address(weight), weight.row_nbytes]
        arguments += [panels[how.form], lowering.at(out), weight.rows, how.strip, bias]
    nbytes = max(products.scratch_nbytes(form, lowering.isa, *x.shape) for form in panels)
    scratch = lowering.temporary(nbytes * lowering.threads)
    lowering.emit("gemm_weights", x, len(pairs), x.shape[1], scratch, nbytes, *arguments)


def lower_head_linear(lowering: Lowering, op: Op) -> None:
    (x,), (out,), (weight,) = op.inputs, op.outputs, op.weights
    heads, table = x.shape[1], lowering.addresses(weight)
    if op.attributes["transposed"]:
        nbytes = -(-4 * weight.columns // 64) * 64
        source = (lowering.at(x), 4 * x.strides[0], 4 * x.strides[1], lowering.at(out), weight.columns, weight.rows)
        scratch = lowering.temporary(nbytes * lowering.threads)
        function = Function(dequantise_kernel(weight.format))
        lowering.emit("gemv_heads_transposed", x, heads, function, table, weight.row_nbytes, *source, scratch, nbytes)
        return
    if x.shape[0] > 1:
        panels_nbytes = gemm.panels_nbytes(lowering.isa, x.shape[0], x.shape[2])
        scratch_nbytes = gemm.scratch_nbytes(x.shape[0], x.shape[2], lowering.isa)
        matrices = (Function("gemm"), Function(dequantise_kernel(weight.format)), table, weight.row_nbytes)
        flow = (lowering.at(x), 4 * x.strides[0], 4 * x.strides[1], weight.columns, lowering.at(out), weight.rows)
        panels = (lowering.temporary(panels_nbytes * lowering.threads), panels_nbytes)
        scratch = lowering.temporary(scratch_nbytes * lowering.threads)
        packing = Function("pack_panel")
        lowering.emit("gemm_heads", x, heads, *matrices, *flow, packing, *panels, scratch, scratch_nbytes)
        return
    name, kind = gemv_kernel(weight.format)
    place, token_stride, head_stride = quantised(lowering, x, kind)
    source = (place, token_stride, head_stride, lowering.at(out), weight.columns, weight.rows)
    lowering.emit("gemv_heads", x, heads, Function(name), table, weight.row_nbytes, *source)
