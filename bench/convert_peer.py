"""Folders converted to F32 files and opened by llama.cpp: its log-probabilities beside those of localmoe.

    python bench/convert_peer.py /path/to/llama-perplexity FOLDER...

Each folder needs a tokenizer. llama-perplexity stores its log-probabilities in steps of their span / 65535; differences
of a few steps are its rounding.
"""

from __future__ import annotations

import struct
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

import localmoe
from localmoe.conversion.convert import convert
from localmoe.notebook import LoadedModel

TEXT = "Once upon a time there was a little girl who liked to play in the park with her dog and a big red ball. " * 12
TOKENS, CHUNKS = 64, 2
FLOATS = "-fa off -ctk f32 -ctv f32".split()


def stored(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Token ids (chunks, T) and log-probabilities (chunks, rows, V) of second halves (llama.cpp, perplexity.cpp)."""
    raw = path.read_bytes()
    context, vocabulary, chunks = struct.unpack_from("<iii", raw, 8)
    ids = np.frombuffer(raw, np.int32, context * chunks, 20).reshape(chunks, context)
    words, rows = 2 * ((vocabulary + 1) // 2) + 4, context - 1 - context // 2
    data = np.frombuffer(raw, np.uint16, words * rows * chunks, 20 + ids.nbytes).reshape(chunks, rows, words)
    scale, low = np.moveaxis(np.ascontiguousarray(data[..., :4]).view(np.float32), -1, 0)
    return ids, low[..., None] + scale[..., None] * data[..., 4 : 4 + vocabulary].astype(np.float64)


def difference(model: LoadedModel, ids: np.ndarray, theirs: np.ndarray) -> float:
    worst = 0.0
    for row, right in zip(ids, theirs, strict=True):
        logits = model.logits(row.tolist()).astype(np.float64)[-1 - len(right) : -1]
        logits -= logits.max(axis=1, keepdims=True)
        ours = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
        worst = max(worst, np.abs(np.maximum(ours, right.min(axis=1, keepdims=True)) - right).max())
    return float(worst)


def compare(perplexity: str, folder: Path, scratch: Path) -> str:
    file, text, base = scratch / "model.gguf", scratch / "text", scratch / "base"
    base.unlink(missing_ok=True)
    text.write_text(TEXT)
    convert(folder, file, "f32", force=True)
    sizes = ["-c", str(TOKENS), "-b", str(TOKENS), "--chunks", str(CHUNKS), "--kl-divergence-base", str(base)]
    run = subprocess.run([perplexity, "-m", file, "-f", text, *sizes, *FLOATS], capture_output=True, text=True)
    if not base.exists():
        return f"llama.cpp did not open it: {run.stderr.strip().splitlines()[-1:]}"
    ids, theirs = stored(base)
    found = []
    for path in (file, folder):
        model = localmoe.load(path, device="reference", kv_format="f32", context=TOKENS)
        found.append(difference(model, ids, theirs))
        model.close()
    return f"file {found[0]:.1e}, folder {found[1]:.1e}, stored in steps of {np.ptp(theirs) / 65535:.1e}"


def main() -> None:
    perplexity, *folders = sys.argv[1:]
    with TemporaryDirectory() as scratch:
        for folder in folders:
            print(f"{folder}: {compare(perplexity, Path(folder), Path(scratch))}", flush=True)


if __name__ == "__main__":
    main()
