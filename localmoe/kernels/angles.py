"""cos and sin of a rope table's angles, as every device and the cache's shifting take them; knows no op."""

from __future__ import annotations

import numpy as np

from localmoe.kernels.program import Floats, RopeTable


def rope_angles(table: RopeTable, position: int, tokens: int, context: int = 0) -> tuple[Floats, Floats]:
    """cos and sin, (T, n) each, in float32 as transformers computes them. `context` ends with these tokens if not
    said."""
    frequencies = table.frequencies(context or position + tokens)
    angles = np.arange(position, position + tokens, dtype=np.float32)[:, None] * frequencies
    return np.cos(angles) * np.float32(table.amplitude), np.sin(angles) * np.float32(table.amplitude)
