"""Traces of routing decisions made by hand, for tests of readers and of replays."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from localmoe.experts.trace import Choice, Header, Trace

Steps = Sequence[Sequence[Sequence[Sequence[int]]]]  # step, layer, token, ids


def header_of(layers: int = 1, experts: int = 4, used: int = 1, nbytes: Sequence[int] = ()) -> Header:
    return Header("hand-made", layers, experts, used, tuple(nbytes) or (100,) * layers)


def trace_of(header: Header, steps: Steps) -> Trace:
    """Steps count from 1."""
    choices = (
        Choice(number, layer, np.array(ids, np.int32).reshape(len(ids), header.used))
        for number, step in enumerate(steps, 1)
        for layer, ids in enumerate(step)
    )
    return Trace(header, tuple(choices))


def decoded(ids: Sequence[Sequence[int]] | Sequence[int]) -> Steps:
    """Steps of one token and one layer."""
    return [[[[one] if isinstance(one, int) else one]] for one in ids]
