"""The ops with a recurrent state in numpy, token by token; see `reference`, of which this is a part."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from localmoe.kernels.program import Floats, StateSlots

Array = npt.NDArray[Any]


@dataclass(frozen=True, eq=False, slots=True)
class Carried:
    """One op's state in a step of `tokens` tokens: `states` are (slots, matrices, rows, columns)."""

    states: Array
    slots: StateSlots
    position: int
    tokens: int

    def before(self) -> Array:
        """A copy of the state before the step."""
        kept: Array = self.states[self.slots.source]
        return np.zeros_like(kept) if self.position == 0 else kept.copy()

    def leave(self, state: Array, seen: int) -> None:
        """Keep the state after `seen` tokens of the step where it is wanted."""
        if seen == self.slots.kept_tokens:
            self.states[self.slots.kept] = state
        if seen == self.tokens:
            self.states[self.slots.target] = state


def convolved(x: Array, weight: Floats, carried: Carried) -> Floats:
    """`Ops.causal_conv` of x (T, C) with weight (C, n)."""
    before = carried.before()[0]
    past = np.concatenate([before, x])  # (n - 1 + T, C)
    for seen in range(1, len(x) + 1):
        carried.leave(past[seen : seen + len(before)], seen)
    y: Floats = sum((past[j : j + len(x)] * weight[:, j] for j in range(weight.shape[1])), np.zeros_like(x))
    return y * sigmoid(y)


def delta_rows(inputs: Sequence[Array], rate: Floats, bias: Floats, carried: Carried, tiled: bool) -> Floats:
    """`Ops.delta_rule` of its five inputs."""
    query, key, value = inputs[:3]
    group, scale = value.shape[1] // key.shape[1], np.float32(query.shape[2] ** -0.5)

    def spread(x: Array) -> Array:
        unit = x / np.sqrt((x * x).sum(-1, keepdims=True) + np.float32(1e-6))
        return np.tile(unit, (1, group, 1)) if tiled else np.repeat(unit, group, axis=1)

    query, key = spread(query) * scale, spread(key)  # (T, H, dk)
    beta, decay = (x.reshape(value.shape[:2]) for x in inputs[3:])
    alpha = np.exp(rate * np.logaddexp(decay + bias, np.float32(0)))  # (T, H)
    state, out = carried.before(), np.empty_like(value)
    for t in range(len(value)):
        state *= alpha[t, :, None, None]
        error = (value[t] - np.einsum("hkv,hk->hv", state, key[t])) * sigmoid(beta[t, :, None])
        state += key[t, :, :, None] * error[:, None, :]
        out[t] = np.einsum("hkv,hk->hv", state, query[t])
        carried.leave(state, t + 1)
    return out


def sigmoid(x: Array) -> Array:
    with np.errstate(over="ignore"):
        return np.asarray(1 / (1 + np.exp(-x)))
