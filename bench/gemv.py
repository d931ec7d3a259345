"""How near each matrix-vector kernel comes to the speed of memory: its bytes a second against a loop that only reads.

    python bench/gemv.py [--isa avx512] [--threads 1 2] [--megabytes 512] [--columns 4096] [--rounds 5]
                         [--only Q8_0 Q4_K]

Reading and multiplying alternate, so that both meet the same weather; the best round of each counts. Rows are shared
out evenly.
"""

from __future__ import annotations

import argparse
import ctypes
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from localmoe.formats import FORMATS, Bytes
from localmoe.kernels.cpu import activations, matmul
from localmoe.kernels.cpu.build import Kernels, kernel
from localmoe.kernels.cpu.isa import host_isa, named


@kernel("bench_read", arguments=3)
def bench_read(v):
    """(address, nbytes, out): every byte loaded and joined into one number, four streams of cache lines at once."""
    lanes = v.lanes

    def read(address, nbytes, out):
        a, b, c, d = v.zero(v.i32), v.zero(v.i32), v.zero(v.i32), v.zero(v.i32)
        for i in range(0, nbytes, 16 * lanes):
            for ahead in range(1024, 1024 + 16 * lanes, 64):
                v.prefetch_second(address + i + ahead)
            a = a | v.load(v.i32, address + i)
            b = b | v.load(v.i32, address + i + 4 * lanes)
            c = c | v.load(v.i32, address + i + 8 * lanes)
            d = d | v.load(v.i32, address + i + 12 * lanes)
        v.store(out, v.total((a | b) | (c | d)))

    return read


def together(threads: int, work: Callable[[int], None]) -> float:
    """Seconds until `work(thread)` has ended in all threads."""
    gate = threading.Barrier(threads + 1)

    def body(number: int) -> None:
        gate.wait()
        work(number)

    crew = [threading.Thread(target=body, args=(n,)) for n in range(threads)]
    for one in crew:
        one.start()
    gate.wait()
    start = time.perf_counter()
    for one in crew:
        one.join()
    return time.perf_counter() - start


def measure(
    kernels: Kernels, name: str, weights: Bytes, columns: int, threads: int, rounds: int
) -> tuple[float, float]:
    """(GB/s of the product, GB/s of reading) over the same bytes."""

    def function(kernel_name: str, arguments: int) -> Callable[..., None]:
        return ctypes.CFUNCTYPE(None, *[ctypes.c_int64] * arguments)(kernels.address(kernel_name))

    gemv_name, form = matmul.FAST[name]
    gemv, read, row_nbytes = function(gemv_name, 7), function("bench_read", 3), FORMATS[name].row_nbytes(columns)
    x, row = np.ones(columns, np.float32), np.zeros(activations.activation_nbytes(form, columns), np.uint8)
    if form == "f32":
        row[:] = x.view(np.uint8)
    else:
        function(activations.QUANTISERS[form], 3)(x.ctypes.data, row.ctypes.data, columns)
    share = weights.size // row_nbytes // threads
    nbytes = share * row_nbytes // 1024 * 1024
    out, sink = np.zeros(share * threads, np.float32), np.zeros((threads, 16), np.int32)

    def multiply(n: int) -> None:
        place = (weights.ctypes.data, row_nbytes, row.ctypes.data, out.ctypes.data)
        gemv(*place, columns, n * share, (n + 1) * share)

    def only_read(n: int) -> None:
        read(weights.ctypes.data + n * share * row_nbytes, nbytes, sink[n].ctypes.data)

    times = [(together(threads, only_read), together(threads, multiply)) for _ in range(rounds)]
    plain, product = (threads * nbytes / min(t) / 1e9 for t in zip(*times, strict=True))
    return product, plain


def mapped(path: Path, nbytes: int) -> Bytes:
    """A mapped file, as weights are, in the page cache's small pages. No float of it is subnormal: these cost extra."""
    with path.open("wb", buffering=0) as file:
        for _ in range(nbytes // 4096):
            file.write(b"\x38" * 4096)
    return np.asarray(np.memmap(path, np.uint8, "r"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--isa", default=host_isa().name)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--megabytes", type=int, default=512)
    parser.add_argument("--columns", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", nargs="+", default=list(matmul.FAST))
    chosen = parser.parse_args()
    print(f"{chosen.isa}, {chosen.megabytes} MB, {chosen.columns} columns, best of {chosen.rounds}, GB/s")
    print(f"{'format':8}{'threads':>8}{'gemv':>8}{'read':>8}{'ratio':>8}")
    with tempfile.TemporaryDirectory() as folder:
        weights = mapped(Path(folder) / "weights", chosen.megabytes << 20)
        kernels = Kernels(named(chosen.isa), Path(folder))
        for name in chosen.only:
            for threads in chosen.threads:
                product, plain = measure(kernels, name, weights, chosen.columns, threads, chosen.rounds)
                print(f"{name:8}{threads:8}{product:8.1f}{plain:8.1f}{product / plain:8.2f}", flush=True)


if __name__ == "__main__":
    main()
