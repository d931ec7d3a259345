"""The ops with a state: their numpy twins on paper, the cpu against the twins, and states read, left and kept."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
from programs import CONTEXT, VOCABULARY, Array, Forward, Random, distance, exactly, given, ids, traced, weight

from localmoe.kernels.cpu.build import Kernels
from localmoe.kernels.cpu.device import CpuDevice
from localmoe.kernels.cpu.isa import runnable
from localmoe.kernels.ops import Ops
from localmoe.kernels.program import IN_PLACE, StateSlots, Tensor
from localmoe.kernels.reference import ReferenceDevice

EXACT = 1e-5
CAPACITY = 48
# Of the sequences of steps, (tokens, position, slots), in which 90 tokens may come.
WHOLE = [(48, 0, IN_PLACE), (42, 48, IN_PLACE)]
CUT = [(1, 0, IN_PLACE), (2, 1, IN_PLACE), (30, 3, IN_PLACE), (1, 33, IN_PLACE), (1, 34, IN_PLACE), (48, 35, IN_PLACE)]
CUT += [(1, position, IN_PLACE) for position in range(83, 90)]
Steps = Sequence[tuple[int, int, StateSlots]]


def drawn(ops: Ops, random: Random, width: int, size: float = 1.0) -> Tensor:
    return given(ops, size * random.standard_normal((VOCABULARY, width)))


def convolved(taps: int, *parts: tuple[int, int]) -> Forward:
    """Parts of (heads, width), of which the last is a part of each head."""

    def forward(ops: Ops, random: Random) -> Tensor:
        xs = [drawn(ops, random, heads * width, 2).heads(heads) for heads, width in parts[:-1]]
        heads, width = parts[-1]
        xs.append(drawn(ops, random, heads * (width + 5), 2).heads(heads).columns(3, width + 3))
        channels = sum(heads * width for heads, width in parts)
        state = ops.cache.state(1, taps - 1, channels)
        return ops.causal_conv(xs, exactly(random.standard_normal((channels, taps))), state)

    return forward


def ruled(keys: int, heads: int, width: int, value_width: int, tiled: bool = False) -> Forward:
    """With two gates side by side, G groups of them as Qwen3-Next has it."""

    def forward(ops: Ops, random: Random) -> Tensor:
        query, key = (drawn(ops, random, keys * (width + 3)).heads(keys).columns(2, width + 2) for _ in "qk")
        value = drawn(ops, random, heads * value_width).heads(heads)
        groups = 1 if tiled else keys
        gates = drawn(ops, random, 2 * heads, 3).heads(groups)
        beta, decay = gates.columns(0, heads // groups), gates.columns(heads // groups, 2 * heads // groups)
        rate, bias = exactly(-np.exp(random.uniform(-6, 2.7, heads))), weight(random, (heads,), "F16")
        state = ops.cache.state(heads, width, value_width)
        return ops.delta_rule(query, key, value, beta, decay, rate, bias, state, tiled=tiled).flat()

    return forward


CASES: dict[str, Forward] = {
    "convolution of a part of each head": convolved(4, (3, 24)),
    "convolution of three parts": convolved(4, (2, 8), (1, 257), (4, 40)),
    "convolution of two taps": convolved(2, (1, 5), (3, 16)),
    "convolution of seven taps": convolved(7, (2, 33)),
    "delta rule of one small head": ruled(1, 1, 4, 4),
    "delta rule of two heads for each key": ruled(2, 4, 8, 32),
    "delta rule of three tiled heads for each key": ruled(2, 6, 12, 40, tiled=True),
    "delta rule of odd widths": ruled(3, 3, 21, 7),
    "delta rule of heads as wide as released ones": ruled(2, 4, 128, 128),
    "delta rule of wide tiled heads": ruled(1, 3, 64, 96, tiled=True),
}


@pytest.fixture(scope="module")
def devices() -> Iterator[dict[tuple[str, int], CpuDevice]]:
    """By instruction set and threads; kernels are shared."""
    opened: dict[tuple[str, int], CpuDevice] = {}
    for isa in runnable():
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("LOCALMOE_ISA", isa)
            kernels: Kernels | None = None
            for threads in (1, 2, 3):
                device = opened[isa, threads] = CpuDevice(CONTEXT, "f32", threads)
                device.kernels = kernels = kernels or device.kernels
    yield opened
    for device in opened.values():
        device.close()


def cpu_answers(device: CpuDevice, forward: Forward, steps: Steps) -> list[Array]:
    """A decoding Program for one token, one of 48 for more; arena and states held NaN before."""
    device._states.clear()
    plans = {capacity: device.compile(traced(forward, capacity)) for capacity in (1, CAPACITY)}
    for state in device._states.values():
        state.view(np.float32).fill(np.nan)
    answers = []
    for count, position, slots in steps:
        plan = plans[1 if count == 1 else CAPACITY]
        plan._arena.view(np.float32).fill(np.nan)
        answers.append(plan.run(ids(count, position), position, slots))
    return answers


def twin_answers(forward: Forward, steps: Steps) -> list[Array]:
    device = ReferenceDevice(CONTEXT)
    answers = []
    for count, position, slots in steps:
        plan = device.compile(traced(forward, count))
        if position == 0:
            for state in device.states.values():
                state.fill(np.nan)
        answers.append(plan.run(ids(count, position), position, slots))
    return answers


@pytest.mark.parametrize("isa", runnable())
@pytest.mark.parametrize("name", CASES)
def test_cpu_computes_what_the_numpy_twin_computes(devices: Any, name: str, isa: str) -> None:
    forward = CASES[name]
    expected = np.concatenate(twin_answers(forward, WHOLE))
    found = np.concatenate(cpu_answers(devices[isa, 2], forward, WHOLE))
    assert distance(found, expected) <= EXACT
    for threads in (1, 2, 3):
        same = np.concatenate(cpu_answers(devices[isa, threads], forward, CUT))
        assert np.array_equal(same, found), f"{threads} threads and another cut change the bits"


@pytest.mark.parametrize("name", CASES)
def test_the_twins_do_not_depend_on_the_cut(name: str) -> None:
    whole, cut = (np.concatenate(twin_answers(CASES[name], steps)) for steps in (WHOLE, CUT))
    assert distance(cut, whole) <= EXACT


@pytest.mark.parametrize("device", ["reference", "cpu"])
@pytest.mark.parametrize("name", ["convolution of three parts", "delta rule of three tiled heads for each key"])
def test_a_step_reads_one_slot_writes_another_and_keeps_a_third(devices: Any, name: str, device: str) -> None:
    forward = CASES[name]

    def answers(steps: Steps) -> list[Array]:
        return twin_answers(forward, steps) if device == "reference" else cpu_answers(devices[isa, 2], forward, steps)

    isa = runnable()[0]
    plain = answers([(20, 0, IN_PLACE), (12, 20, IN_PLACE), (1, 32, IN_PLACE)])
    moved = [(20, 0, StateSlots(0, 2, 1, 18)), (12, 20, StateSlots(2, 0)), (1, 32, StateSlots(0, 2))]
    assert all(map(np.array_equal, answers(moved), plain))
    again = answers([*moved[:2], (2, 18, StateSlots(1, 2)), (12, 20, StateSlots(2, 0)), (1, 32, IN_PLACE)])
    assert distance(again[2], plain[0][18:]) <= EXACT
    assert distance(np.concatenate(again[3:]), np.concatenate(plain[1:])) <= EXACT
    kept = answers([(20, 0, StateSlots(0, 0, 1, 1)), (19, 1, StateSlots(1, 2, 0, 2)), (17, 3, StateSlots(0, 1))])
    assert distance(kept[2], plain[0][3:]) <= EXACT


def test_a_convolution_solved_on_paper() -> None:
    def forward(ops: Ops, random: Random) -> Tensor:
        x = given(ops, np.arange(VOCABULARY)[:, None] * [1, 0])  # token ids are 5 t
        return ops.causal_conv([x.heads(1)], exactly([[1, 10, 100], [1, 1, 1]]), ops.cache.state(1, 2, 2))

    (found,) = twin_answers(forward, [(4, 0, IN_PLACE)])
    sums = np.float32([0, 500, 50 + 1000, 5 + 100 + 1500])
    assert np.allclose(found, np.stack([sums / (1 + np.exp(-sums)), np.zeros(4)], axis=1))


def test_the_delta_rule_solved_on_paper(devices: Any) -> None:
    """Width 1: k and q are signs, S a number. β is a half, α a quarter of what it was: softplus(0) = ln 2, rate -2."""

    def forward(ops: Ops, random: Random) -> Tensor:
        one, values = given(ops, np.ones((VOCABULARY, 1))), given(ops, np.arange(VOCABULARY)[:, None] / 5.0)
        nought = given(ops, np.zeros((VOCABULARY, 1)))
        gates, state = nought.heads(1), ops.cache.state(1, 1, 1)
        rule = (one.heads(1), one.heads(1), values.heads(1), gates, gates, exactly([-2]), exactly([0]), state)
        return ops.delta_rule(*rule).flat()

    # S = S / 4 + (t - S / 4) / 2: 0, 1/2, 1 + 1/16, 3/2 + (17/16) / 8
    expected = np.float32([0, 0.5, 1.0625, 1.6328125])[:, None]
    assert np.allclose(twin_answers(forward, [(4, 0, IN_PLACE)])[0], expected, rtol=2e-6)
    for isa in runnable():
        assert np.allclose(cpu_answers(devices[isa, 1], forward, [(4, 0, IN_PLACE)])[0], expected, rtol=2e-6)


@pytest.mark.parametrize("isa", runnable())
def test_a_state_that_hardly_decays_is_not_worn_by_rounding(devices: Any, isa: str) -> None:
    """softplus(-16) is 1.13e-7, but 1 + exp(-16) in float32 is 1 + 1.19e-7: over many tokens that would show."""
    width = 8

    def forward(ops: Ops, random: Random) -> Tensor:
        unit = given(ops, np.ones((VOCABULARY, width))).heads(1)
        only_first = given(ops, np.r_[40, np.full(VOCABULARY - 1, -200)][:, None]).heads(1)  # β: 1, then 0
        decay, state = given(ops, np.full((VOCABULARY, 1), -16)).heads(1), ops.cache.state(1, width, width)
        rule = (unit, unit, unit, only_first, decay, exactly([-8000]), exactly([0]), state)
        return ops.delta_rule(*rule).flat()

    found = np.concatenate(cpu_answers(devices[isa, 2], forward, [(48, 0, IN_PLACE), (15, 48, IN_PLACE)]))
    decayed = np.exp(-8000 * np.log1p(np.exp(-16.0))) ** np.arange(63) / width**0.5
    assert np.allclose(found[:, 0], decayed, rtol=1e-5)
