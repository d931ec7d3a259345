"""Start: from the command to a chat that takes input, as a whole process at a terminal, whatever the model's size.

    .venv/bin/python bench/start.py [--repeat 7] [--cold] [MODEL.gguf]...

For each model (the bundled one, and a sparse file like 20 GB of a dense model at Q8_0 with 150,000 tokens): with
kernels from the wheel (make aot), then without: the first start, which compiles them, and later ones. --cold drops the
system's page cache before a start (Linux, root), and so slows down whatever else runs. Medians and the range, on an
idle machine. A model needs a chat template of its own, or --template would wait for its tokenizer.
"""

from __future__ import annotations

import argparse
import os
import pty
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from statistics import median
from time import perf_counter

import gguf
import numpy as np

from localmoe.kernels.cpu.build import emitted_fingerprint
from localmoe.kernels.cpu.isa import host_isa, target_of
from localmoe.kernels.cpu.shipped import FOLDER, SUFFIX, Archive
from localmoe.loader.locate import bundled, open_source

COMMAND = "from localmoe.cli import main; main()"
WITHOUT_ARCHIVES = f"import pathlib; from localmoe.kernels.cpu import build; build.FOLDER = pathlib.Path(); {COMMAND}"


def seconds(action: Callable[[], float], repeat: int) -> str:
    """Median (lowest to highest) of what so many calls return."""
    times = [action() for _ in range(repeat)]
    return f"{median(times):.3f} s ({min(times):.3f} to {max(times):.3f}, n = {repeat})"


def timed(action: Callable[[], object]) -> float:
    start = perf_counter()
    action()
    return perf_counter() - start


def until(words: bytes, code: str, arguments: list[str], cache: str) -> float:
    """Seconds until a process of Python, at a terminal of its own, has written `words`; it is told to end then."""
    where = {**os.environ, "LOCALMOE_CACHE": cache, "XDG_STATE_HOME": cache, "TERM": "xterm"}
    where["PROMPT_TOOLKIT_NO_CPR"] = "1"
    ours, theirs = pty.openpty()
    start = perf_counter()
    process = subprocess.Popen([sys.executable, "-c", code, *arguments], stdin=theirs, stdout=theirs, env=where)
    os.close(theirs)
    written = b""
    while words not in written:
        written += os.read(ours, 4096)
    found = perf_counter() - start
    os.write(ours, b"\x04")  # Ctrl+D
    while process.poll() is None:
        try:
            os.read(ours, 4096)
        except OSError:  # the other end is closed
            process.wait()
    os.close(ours)
    return found


def forget_pages() -> None:
    os.sync()
    Path("/proc/sys/vm/drop_caches").write_text("3\n")


def sparse_model(path: Path) -> Path:
    """A GGUF that opens like a real model of 20 GB; every weight is a hole."""
    width, hidden, heads, shared, layers, tokens = 5120, 13824, 40, 8, 63, 150_000
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(4096)
    writer.add_embedding_length(width)
    writer.add_block_count(layers)
    writer.add_feed_forward_length(hidden)
    writer.add_head_count(heads)
    writer.add_head_count_kv(shared)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    words = [f"{i:x}" for i in range(tokens)]
    writer.add_token_list(words)
    writer.add_token_types([1] * tokens)
    writer.add_token_merges([f"{word[:-1]} {word[-1]}" for word in words if len(word) > 1])
    writer.add_chat_template("{% for message in messages %}{{ message.content }}{% endfor %}")
    kv = width // heads * shared
    matrices = {"attn_q": (width, width), "attn_k": (kv, width), "attn_v": (kv, width), "attn_output": (width, width)}
    matrices |= {"ffn_gate": (hidden, width), "ffn_up": (hidden, width), "ffn_down": (width, hidden)}
    shapes = {f"blk.{i}.{name}.weight": shape for i in range(layers) for name, shape in matrices.items()}
    shapes |= {f"blk.{i}.{name}_norm.weight": (width,) for i in range(layers) for name in ("attn", "ffn")}
    shapes |= {"token_embd.weight": (tokens, width), "output.weight": (tokens, width), "output_norm.weight": (width,)}
    total = 0
    for name, shape in shapes.items():
        count = int(np.prod(shape))
        kind = gguf.GGMLQuantizationType.F32 if len(shape) == 1 else gguf.GGMLQuantizationType.Q8_0
        nbytes = 4 * count if len(shape) == 1 else count // 32 * 34
        writer.add_tensor_info(name, shape, np.dtype(np.float32), nbytes, kind)
        total += -(-nbytes // 32) * 32
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    os.truncate(path, -(-path.stat().st_size // 32) * 32 + total)
    return path


def report(model: Path, repeat: int, cold: bool, shipped: bool) -> None:
    prompt, chat = b">>>", ["chat", str(model)]
    with tempfile.TemporaryDirectory() as cache:
        rows = []
        if shipped:
            rows = [("kernels from the wheel, first", COMMAND, 1), ("kernels from the wheel", COMMAND, repeat)]
        rows += [
            ("kernels compiled, first", WITHOUT_ARCHIVES, 1),
            ("kernels compiled, later", WITHOUT_ARCHIVES, repeat),
        ]
        for label, code, times in rows:
            print(f"  {label:30}", seconds(lambda code=code: until(prompt, code, chat, cache), times))
        if cold:
            forget_pages()
            print(f"  {'empty page cache':30}", seconds(lambda: until(prompt, COMMAND, chat, cache), 1))
        print(f"  {'opening the file alone':30}", seconds(lambda: timed(lambda: open_source(model)), repeat))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", type=Path)
    parser.add_argument("--repeat", type=int, default=7)
    parser.add_argument("--cold", action="store_true", help="also from an empty page cache")
    flags = parser.parse_args()
    target = target_of(host_isa())
    shipped = bool(target and Archive(FOLDER / (target.name + SUFFIX), emitted_fingerprint(target.isa)).names())
    if not shipped:
        print("no kernels were emitted ahead of time from these sources for this host: make aot")
    with tempfile.TemporaryDirectory() as folder:
        for words in ("--version", "--help"):
            found = seconds(lambda words=words: until(b"localmoe", COMMAND, [words], folder), flags.repeat)
            print(f"localmoe {words:23}", found)
        for model in flags.models or (bundled(), sparse_model(Path(folder) / "sparse.gguf")):
            print(f"chat {model.name}, {model.stat().st_size / 1e9:.2f} GB")
            report(model, flags.repeat, flags.cold, shipped)


if __name__ == "__main__":
    main()
