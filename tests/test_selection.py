"""Sparse attention: the positions that an indexer chooses and attention over them, on the cpu against the numpy twin,
and the twin against a loop over tokens and positions."""

from __future__ import annotations

import numpy as np
import pytest
from programs import (
    CONTEXT,
    VOCABULARY,
    Array,
    Forward,
    Random,
    cpu_runs,
    distance,
    given,
    ids,
    reference_runs,
    traced,
)

from localmoe.formats import KV_FORMATS
from localmoe.kernels.cpu.attention_decode import CHUNK
from localmoe.kernels.cpu.device import CpuDevice
from localmoe.kernels.cpu.isa import runnable
from localmoe.kernels.cpu.lower import Lowering
from localmoe.kernels.ops import Ops
from localmoe.kernels.program import Temperature, Tensor

EXACT = 1e-5
STEPS = ((48, 33, 0), (1, 1, 33), (48, 5, 34), (48, 48, 39), (1, 1, 87), (48, 2, 88))  # capacity, tokens, position
INDEX_HEADS, WIDTH = 3, 12


def whole_numbers(random: Random, width: int) -> Array:
    """So small that every sum is exact, and many scores are equal."""
    return random.integers(-2, 3, (VOCABULARY, width)).astype(np.float32)


def chosen(ops: Ops, random: Random, count: int) -> Tensor:
    q, weights, keys = (given(ops, whole_numbers(random, n)) for n in (INDEX_HEADS * WIDTH, INDEX_HEADS, WIDTH))
    return ops.select(q.heads(INDEX_HEADS), weights, ops.cache.append(keys.heads(1), value_prefix=0), count)


def selecting(count: int) -> Forward:
    return lambda ops, random: chosen(ops, random, count)


def latent(count: int, heads: int = 11, prefix: int = 16, **how: object) -> Forward:
    """One key head, whose first elements are the value; `heads` are more than a kernel takes at once."""

    def forward(ops: Ops, random: Random) -> Tensor:
        selected = chosen(ops, random, count)
        layer = ops.cache.append(given(ops, random.standard_normal((VOCABULARY, 24))).heads(1), value_prefix=prefix)
        q = given(ops, random.standard_normal((VOCABULARY, heads * 27))).heads(heads).columns(2, 26)
        return ops.attention(q, layer, scale=0.4, selected=selected, **how).flat()  # type: ignore[arg-type]

    return forward


def grouped(count: int, **how: object) -> Forward:
    def forward(ops: Ops, random: Random) -> Tensor:
        selected = chosen(ops, random, count)
        keys, values, q = (given(ops, random.standard_normal((VOCABULARY, n))) for n in (2 * 24, 2 * 9, 6 * 24))
        layer = ops.cache.append(keys.heads(2), values.heads(2))
        return ops.attention(q.heads(6), layer, scale=0.4, selected=selected, **how).flat()  # type: ignore[arg-type]

    return forward


FORWARDS: dict[str, Forward] = {
    "7 positions": selecting(7),
    "1 position": selecting(1),
    "80 positions": selecting(80),
    "attention over 7": latent(7),
    "attention over 1": latent(1),
    "attention over 80, warmed": latent(80, temperature=Temperature(0.5, 7)),
    "attention over 40 of an odd width": latent(40, heads=3, prefix=9),
    "attention over 9 with heads that share keys": grouped(9),
    "attention over 9, capped": grouped(9, softcap=1.5),
}


def opened(isa: str, threads: int, kv_format: str) -> CpuDevice:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LOCALMOE_ISA", isa)
        return CpuDevice(CONTEXT, kv_format, threads)


@pytest.mark.parametrize("kv_format", KV_FORMATS)
@pytest.mark.parametrize("isa", runnable())
def test_the_cpu_chooses_and_sees_what_the_numpy_twin_does(isa: str, kv_format: str) -> None:
    devices = [opened(isa, threads, kv_format) for threads in (2, 1, 3)]
    for name, forward in FORWARDS.items():
        expected = reference_runs(forward, [step[1:] for step in STEPS], kv_format)
        found, *others = (cpu_runs(device, forward, STEPS) for device in devices)
        for step, answer, wanted in zip(STEPS, found, expected, strict=True):
            assert distance(answer, wanted) <= (EXACT if answer.dtype == np.float32 else 0), (name, step)
        assert all(all(map(np.array_equal, other, found)) for other in others), f"{name}: threads change the bits"
    for device in devices:
        device.close()


def test_the_twin_chooses_the_best_scores_of_a_plain_loop() -> None:
    """Itself and earlier ones, equal ones from the first on, in ascending order."""
    found = np.concatenate(reference_runs(selecting(7), [(33, 0), (1, 33)]))
    random = np.random.default_rng(7)
    q, weights, keys = (whole_numbers(random, n)[ids(34)] for n in (INDEX_HEADS * WIDTH, INDEX_HEADS, WIDTH))
    for t in range(34):
        scores = [
            sum(w * max(float(row @ keys[s]), 0) for w, row in zip(weights[t], q[t].reshape(-1, WIDTH), strict=True))
            for s in range(t + 1)
        ]
        best = sorted(sorted(range(t + 1), key=lambda s: (-scores[s], s))[:7])
        assert found[t].tolist() == best + [-1] * (7 - len(best))


def test_a_context_that_fits_the_choice_meets_the_dense_kernels() -> None:
    dense = opened(runnable()[0], 2, "f32")
    lowering = Lowering(dense, traced(latent(CONTEXT), 1))
    lowering.run()
    assert not any("select" in name for name in lowering.kernel_names())
    assert np.array_equal(*(np.concatenate(cpu_runs(dense, f, STEPS)) for f in (latent(CONTEXT), unselected)))
    dense.close()


def unselected(ops: Ops, random: Random) -> Tensor:
    """`latent` without its choice, on the same numbers."""
    chosen(ops, random, 1)
    layer = ops.cache.append(given(ops, random.standard_normal((VOCABULARY, 24))).heads(1), value_prefix=16)
    q = given(ops, random.standard_normal((VOCABULARY, 11 * 27))).heads(11).columns(2, 26)
    return ops.attention(q, layer, scale=0.4).flat()


def test_more_positions_than_a_kernel_gathers_at_once() -> None:
    """The chosen cross a border of CHUNK in a context of more than twice that."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("programs.CONTEXT", 3 * CHUNK)
        steps = [(256, 256, at) for at in range(0, 1280, 256)] + [(1, 1, 1280)]
        forward = latent(CHUNK + 90)
        device = CpuDevice(3 * CHUNK, "f32", 2)
        found, wanted = cpu_runs(device, forward, steps), reference_runs(forward, [step[1:] for step in steps])
        device.close()
    assert distance(np.concatenate(found), np.concatenate(wanted)) <= EXACT
