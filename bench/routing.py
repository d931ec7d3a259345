"""Writes a trace of the experts that a text chooses, for `localmoe experts replay`: the text is run op by op.

    python bench/routing.py MODEL TEXT OUT.jsonl [--tokens 4096] [--window 512] [--steps 256,128,64,128]

`--steps`: the text is cut into a prompt of so many tokens, so many decoded one by one, a prompt …, over and over; without
it every token is a step. What a token chooses does not depend on how the text is cut.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import localmoe
from localmoe.experts.trace import Header, TraceWriter
from localmoe.kernels.program import Op


def choices(model: Any, tokens: Sequence[int], window: int) -> npt.NDArray[np.int32]:
    """What each layer's router chooses for every token, (T, L, k); the text begins anew after each window."""
    windows = []
    for start in range(0, len(tokens), window):
        heard: list[npt.NDArray[np.int32]] = []

        def see(op: Op, _: object, outputs: list[npt.NDArray[Any]], heard: list[npt.NDArray[np.int32]] = heard) -> None:
            if op.name == "route":
                heard.append(outputs[0].copy())

        model.watch(tokens[start : start + window], see)
        layers = sum(op.name == "route" for op in model.network.program(1).ops)
        pieces = [np.stack(heard[first : first + layers], axis=1) for first in range(0, len(heard), layers)]
        windows.append(np.concatenate(pieces))
        print(f"{start + len(windows[-1])} of {len(tokens)} tokens", file=sys.stderr)
    return np.concatenate(windows)


def steps(tokens: int, lengths: Sequence[int]) -> Iterator[tuple[int, int]]:
    """(start, stop) of each step: prompts and decoded tokens by turns."""
    start = 0
    for number, length in enumerate(cycle(lengths or (0, tokens))):
        stop = min(start + length, tokens)
        yield from [(start, stop)] if number % 2 == 0 and length else ((t, t + 1) for t in range(start, stop))
        start = stop
        if start == tokens:
            return


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--steps", default="")
    asked = parser.parse_args()
    model = localmoe.load(asked.model, context=asked.window)
    text = asked.text.read_text(encoding="utf-8", errors="replace")[: 16 * asked.tokens]
    chosen = choices(model, model.tokenizer.encode(text)[: asked.tokens], asked.window)
    ops = [op for op in model.network.program(1).ops if op.name == "experts"]
    sizes = tuple(sum(weight.nbytes // weight.shape[0] for weight in op.matrices) for op in ops)
    header = Header(model.name, len(ops), ops[0].weights[0].shape[0], chosen.shape[2], sizes)
    writer = TraceWriter(asked.out, header)
    for number, (start, stop) in enumerate(steps(len(chosen), [int(n) for n in asked.steps.split(",") if n]), 1):
        for layer in range(len(ops)):
            writer.chose(number, layer, chosen[start:stop, layer])
    writer.close()
    print(writer.problem or f"{asked.out}: {len(chosen)} tokens", file=sys.stderr)
    model.close()


if __name__ == "__main__":
    main()
