"""What the tests of families share: running a network on a device, and models made in memory; knows no golden data."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from localmoe.formats import FORMATS, Weight
from localmoe.kernels.open import Device, open_device
from localmoe.kernels.program import Op
from localmoe.loader.source import Source
from localmoe.network import Network

Array = npt.NDArray[np.float32]


def relative_error(found: npt.ArrayLike, right: npt.ArrayLike) -> float:
    """The largest difference, as a part of the largest right value."""
    found, right = np.asarray(found, np.float64), np.asarray(right, np.float64)
    assert found.shape == right.shape, (found.shape, right.shape)
    return float(np.abs(found - right).max() / np.abs(right).max())


@contextmanager
def opened(name: str, context: int, threads: int = 2, kv_format: str = "f32") -> Iterator[Device]:
    device = open_device(name, context=context, kv_format=kv_format, threads=threads)
    try:
        yield device
    finally:
        device.close()


def logits(network: Network, ids: Sequence[int], device: str = "reference", chunk: int = 0, threads: int = 2) -> Array:
    """Teacher-forced logits (T, V) in steps of `chunk` tokens, 0 for one step; the cache is float32."""
    tokens = np.asarray(ids, np.int32)
    step = chunk or tokens.size
    with opened(device, tokens.size, threads) as opened_device:
        plan = opened_device.compile(network.program(step, all_rows=True))
        return np.concatenate([plan.run(tokens[i : i + step], i) for i in range(0, tokens.size, step)])


def greedy(network: Network, ids: Sequence[int], total: int, device: str = "reference") -> list[int]:
    """`ids` continued to `total` tokens with the likeliest one each time, the prompt in one step."""
    found = list(ids)
    with opened(device, total) as opened_device:
        prompt, decode = (opened_device.compile(network.program(size)) for size in (len(found), 1))
        scores = prompt.run(np.asarray(found, np.int32), 0)
        while len(found) < total:
            found.append(int(scores[-1].argmax()))
            scores = decode.run(np.asarray(found[-1:], np.int32), len(found) - 1)
    return found


def chosen_experts(network: Network, ids: Sequence[int]) -> list[tuple[Array, Array, Array]]:
    """Per MoE layer, on the reference device: router logits (T, E), chosen ids (T, k) and their shares (T, k)."""
    seen: list[tuple[Array, Array, Array]] = []
    tokens = np.asarray(ids, np.int32)

    def see(op: Op, inputs: list[Array], outputs: list[Array]) -> None:
        if op.name == "route":
            seen.append((inputs[0].copy(), outputs[0].copy(), outputs[1].copy()))

    with opened("reference", len(ids)) as device:
        device.compile(network.program(len(ids), all_rows=True)).watch(tokens, 0, see)
    return seen


def chosen_positions(network: Network, ids: Sequence[int]) -> list[tuple[Array, Array]]:
    """Per indexer, on the reference device: scores of all positions (T, T) and chosen ones (T, k), the rest -1."""
    seen: list[tuple[Array, Array]] = []
    with opened("reference", len(ids)) as device:
        plan: Any = device.compile(network.program(len(ids), all_rows=True))

        def see(op: Op, inputs: list[Array], outputs: list[Array]) -> None:
            if op.name == "select":
                keys = plan.device.caches[op.attributes["cache"].index][0][0]
                products = np.maximum(np.einsum("tid,sd->tis", inputs[0], keys), 0)
                seen.append((np.einsum("ti,tis->ts", inputs[1], products), outputs[0].copy()))

        plan.watch(np.asarray(ids, np.int32), 0, see)
    return seen


def in_memory(
    metadata: Mapping[str, Any], tensors: Mapping[str, Array], *, formats: Callable[[str], str] = lambda name: "F32"
) -> Source:
    """A Source over arrays, as a GGUF file would give it; `formats` names the block format of each tensor."""
    from gguf import GGMLQuantizationType, quants

    def weight(name: str, array: Array) -> Weight:
        format = FORMATS[formats(name)]
        data = array if format.name == "F32" else quants.quantize(array, GGMLQuantizationType(format.id))
        return Weight.whole(name, array.shape, format, np.ascontiguousarray(data).view(np.uint8).reshape(-1))

    weights = {name: weight(name, array) for name, array in tensors.items()}
    return Source(Path("tiny.gguf"), "gguf", dict(metadata), weights, sum(w.nbytes for w in weights.values()))
