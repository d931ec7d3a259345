"""Which GEMM multiplies a chunk of rows with a weight, and what it needs: one contract over `gemm.py` (float32) and
`gemm_integer.py` (8-bit); emits nothing.

`form` says how rows are packed into panels: f32, or one of the quantised forms of `activations.py`.
"""

from __future__ import annotations

from dataclasses import dataclass

from localmoe.formats import Format
from localmoe.kernels.cpu import gemm, gemm_integer
from localmoe.kernels.cpu.isa import Isa
from localmoe.kernels.cpu.matmul import dequantise_kernel
from localmoe.kernels.cpu.unpack import INTEGER

ARGUMENTS = gemm.ARGUMENTS


@dataclass(frozen=True, slots=True)
class Product:
    """The kernels for one format: `gemm` reads panels of `form` and calls `unpack` for a row's blocks; threads share
    rows by multiples of `strip`."""

    form: str
    gemm: str
    unpack: str
    strip: int


def product(format: Format, isa: Isa, *, exact: bool = False) -> Product:
    """The GEMM for weights of `format`; `exact` keeps the rows float32. Raises UnsupportedError as `gemv_kernel`
    does."""
    if format.name in INTEGER and not exact and isa.name != "portable":
        form, name, unpack = gemm_integer.integer_kernels(format.name, isa)
        return Product(form, name, unpack, gemm_integer.strip_rows(isa))
    return Product("f32", "gemm", dequantise_kernel(format), gemm.STRIP_ROWS)


def packing_kernel(form: str) -> str:
    return "pack_panel" if form == "f32" else f"pack_{form}"


def panel_tokens(form: str, isa: Isa) -> int:
    return gemm.panel_tokens(isa) if form == "f32" else gemm_integer.PANEL_TOKENS


def panel_nbytes(form: str, isa: Isa, columns: int) -> int:
    """Bytes of one panel of `panel_tokens` rows."""
    return gemm.panels_nbytes(isa, 1, columns) if form == "f32" else gemm_integer.panel_nbytes(form, columns)


def scratch_nbytes(form: str, isa: Isa, tokens: int, columns: int) -> int:
    """Bytes of scratch that each thread needs for itself in a product with so many rows, or fewer."""
    return gemm.scratch_nbytes(tokens, columns, isa) if form == "f32" else gemm_integer.scratch_nbytes(tokens, isa)
