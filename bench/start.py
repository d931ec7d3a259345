"""Start: from the command to a chat that takes input, as a whole process; and opening a file whatever its size.

    .venv/bin/python bench/start.py [MODEL.gguf] [--repeat 7]

The first run of a fresh kernel cache is timed too (in a temporary LOCALMOE_CACHE). Then a header is measured with
tensors of 16 MB and of 16 GB behind it, as sparse files. Medians and the range; run it on an idle machine.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from statistics import median
from time import perf_counter

import gguf
import numpy as np

from localmoe.loader.locate import bundled, open_source


def seconds(action: Callable[[], object], repeat: int) -> str:
    """Median (lowest to highest) of so many calls."""
    times = []
    for _ in range(repeat):
        start = perf_counter()
        action()
        times.append(perf_counter() - start)
    return f"{median(times):.3f} s ({min(times):.3f} to {max(times):.3f}, n = {repeat})"


def sparse_file(path: Path, nbytes: int) -> Path:
    """A GGUF with a 150,000-token vocabulary and one float32 tensor that is a hole of `nbytes`."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_token_list([f"token {i}" for i in range(150_000)])
    writer.add_token_types([1] * 150_000)
    writer.add_token_merges([f"{i} {i + 1}" for i in range(150_000)])
    writer.add_tensor_info("hole.weight", (nbytes // 4096, 1024), np.dtype(np.float32), nbytes)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    os.truncate(path, -(-path.stat().st_size // 32) * 32 + nbytes)
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", type=Path, default=bundled())
    parser.add_argument("--repeat", type=int, default=7)
    flags = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        here = {**os.environ, "LOCALMOE_CACHE": folder}
        command = [sys.executable, "-m", "localmoe", "chat", str(flags.model), "--template", "chatml"]

        def chat() -> None:
            subprocess.run(command, env=here, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, check=True)

        print("first chat, kernels compiled:", seconds(chat, 1))
        print("chat, warm:                  ", seconds(chat, flags.repeat))
        for size, name in ((16 << 20, "16 MB"), (16 << 30, "16 GB")):
            path = sparse_file(Path(folder) / "sparse.gguf", size)
            print(f"open, 150,000 tokens, {name}:  ", seconds(lambda path=path: open_source(path), flags.repeat))


if __name__ == "__main__":
    main()
