"""What Walsh-Hadamard turning saves of a quantised KV cache: errors of scores of made-up keys, and KL on a text.

    python bench/turning.py [--model MODEL.gguf --text TEXT] [--context 256] [--chunks 4] [--outliers 0]

Made-up keys are normal but for what a row's name says; queries weigh a column by the inverse of its size, as a model
that had been trained with such columns would; the figure is the error of their products by the spread of the products.
On a text the reference device runs with and without turning, against the same device with an F32 cache. `--outliers N`
makes N random columns of every key (pairs of columns where values have rows of their own) 10 times as large in the
cache, and queries smaller in turn: the model stays the same one, and its keys look like those of large models.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
from quality import judge, run_chunks

import localmoe
from localmoe.formats import FORMATS
from localmoe.kernels import cache_blocks, reference
from localmoe.kernels.program import CacheLayer, Op

Array = npt.NDArray[np.float32]
TOKENS, WIDTH, LARGER = 4096, 128, 10
turned = cache_blocks.turned


def left(rows: Array, factor: np.float32) -> Array:
    """In place of `cache_blocks.turned`."""
    return rows


def keys(random: np.random.Generator) -> Iterator[tuple[str, Array]]:
    plain = random.standard_normal((TOKENS, WIDTH)).astype(np.float32)
    yield "normal", plain
    yield "Laplace", random.laplace(size=plain.shape).astype(np.float32)
    yield "Student's t, 4 degrees", random.standard_t(4, size=plain.shape).astype(np.float32)
    for many, factor in ((2, 8), (4, 8), (8, 5), (2, 20), (1, 50)):
        sizes = np.ones(WIDTH, np.float32)
        sizes[random.choice(WIDTH, many, replace=False)] = factor
        yield f"{many} of {WIDTH} columns times {factor}", plain * sizes
    yield "columns of log-normal sizes", plain * np.exp(random.standard_normal(WIDTH)).astype(np.float32)
    means = np.zeros(WIDTH, np.float32)
    means[random.choice(WIDTH, 4, replace=False)] = 10
    yield "4 columns with a mean of 10", plain + means
    yield "all columns with a mean of 1", plain + 1


def lost(rows: Array, name: str, random: np.random.Generator) -> float:
    queries = random.standard_normal((256, WIDTH)) / (rows.std(axis=0) + np.abs(rows.mean(axis=0)))
    kept = cache_blocks.decoded(cache_blocks.encoded(rows, FORMATS[name]), FORMATS[name], WIDTH)
    return float(np.sqrt((((kept - rows) @ queries.T) ** 2).mean()) / ((rows - rows.mean(axis=0)) @ queries.T).std())


def with_outliers(count: int) -> None:
    """The reference keeps keys whose random columns are LARGER times as large."""
    append, sizes = reference._TWINS["cache_append"], {}

    def larger(device: reference.ReferenceDevice, op: Op, inputs: list[Array], position: int) -> list[Array]:
        layer: CacheLayer = op.attributes["cache"]
        if layer.index not in sizes:
            random, step = np.random.default_rng(layer.index), 2 if layer.value_width else 1
            sizes[layer.index] = np.ones((layer.heads, layer.key_width), np.float32)
            for row in sizes[layer.index]:
                row.reshape(-1, step)[random.choice(row.size // step, count, replace=False)] = LARGER
        results = append(device, op, [inputs[0] * sizes[layer.index], *inputs[1:]], position)
        device.caches[layer.index][0][:, position : position + len(inputs[0])] /= sizes[layer.index][:, None]
        return results

    reference._TWINS["cache_append"] = larger


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--text", type=Path)
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--chunks", type=int, default=4)
    parser.add_argument("--outliers", type=int, default=0)
    flags = parser.parse_args()
    ways = {"plain": left, "turned": turned}
    if flags.model is None:
        print(f"{'':30}{'Q8_0 plain':>12}{'turned':>9}{'Q4_0 plain':>12}{'turned':>9}")
        for what, rows in keys(np.random.default_rng(1)):
            figures = []
            for name in ("Q8_0", "Q4_0"):
                for cache_blocks.turned in ways.values():
                    figures.append(lost(rows, name, np.random.default_rng(2)))
            print(f"{what:30}{figures[0]:12.4f}{figures[1]:9.4f}{figures[2]:12.3f}{figures[3]:9.3f}")
        return
    if flags.outliers:
        with_outliers(flags.outliers)
    judged, base = {}, []
    for kv, way in (("f32", "plain"), ("q8_0", "plain"), ("q8_0", "turned"), ("q4_0", "plain"), ("q4_0", "turned")):
        cache_blocks.turned = ways[way]
        model = localmoe.load(flags.model, "reference", context=flags.context, kv_format=kv)
        text = flags.text.read_text(encoding="utf-8")[: 16 * flags.context * flags.chunks]
        ids = model.tokenizer.encode(text)[: flags.context * flags.chunks]
        tokens = np.array(ids[: len(ids) // flags.context * flags.context]).reshape(-1, flags.context)
        found = list(run_chunks(model, tokens, "prefill"))
        base = base or found
        judged[kv, way] = judge(base, found, tokens)
        model.close()
        less = f"  {judged[kv, way].less(judged[kv, 'plain'])}" if way == "turned" else ""
        print(f"{kv:5}{way:7}{judged[kv, way]}{less}".replace("ours less theirs", "less plain"), flush=True)


if __name__ == "__main__":
    main()
