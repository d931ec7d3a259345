"""What localmoe computes for a text, layer by layer, heard from the device op by op; must not know transformers."""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from localmoe.evaluation.windows import Ids
from localmoe.kernels.program import Floats, Op, Progress
from localmoe.kernels.reference_router import standing_of
from localmoe.kernels.reference_weights import values
from localmoe.model import Model

BLOCK = re.compile(r"blk\.(\d+)\.")


@dataclass(slots=True)
class OwnPass:
    """Of T tokens: logits (T, V), the residual stream behind each layer (T, D), and of layers with a router what it
    chose by (T, E) and whom (T, k)."""

    logits: Floats
    layers: list[Floats]
    standing: dict[int, Floats]
    experts: dict[int, Ids]


def own_pass(model: Model, tokens: Ids, progress: Progress | None = None) -> OwnPass:
    """Run op by op: a layer ends where the next one's first weight is used."""
    streams: dict[int, list[Floats]] = defaultdict(list)
    standing: dict[int, list[Floats]] = defaultdict(list)
    experts: dict[int, list[Ids]] = defaultdict(list)
    last, layer = model.network.config.block_count - 1, -1

    def see(op: Op, inputs: list[npt.NDArray[Any]], outputs: list[npt.NDArray[Any]]) -> None:
        nonlocal layer
        if op.name == "embed":
            layer = -1
        if op.name == "route":
            bias = values(op.weights[0]) if op.attributes["biased"] else None
            standing[layer].append(standing_of(op.attributes["router"], inputs[0].copy(), bias)[1])
            experts[layer].append(outputs[0].copy())
        if not op.weights or layer > last:
            return
        found = BLOCK.match(op.weights[0].name)
        number = int(found[1]) if found else last + 1 if layer == last else layer
        if number != layer:
            if layer >= 0:
                streams[layer].append(inputs[0].copy())
            layer = number
            if progress:
                progress("localmoe, layer by layer", number, last + 1)

    logits = model.watch(tokens.tolist(), see)
    return OwnPass(
        logits,
        [np.concatenate(streams[number]) for number in sorted(streams)],
        {number: np.concatenate(found) for number, found in standing.items()},
        {number: np.concatenate(found) for number, found in experts.items()},
    )
