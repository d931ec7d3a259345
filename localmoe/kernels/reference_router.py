"""Which experts a token goes to, on arrays: the numpy twin of `Ops.route`; knows no weights."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from localmoe.kernels.program import Floats, Router
from localmoe.kernels.reference_states import sigmoid

Array = npt.NDArray[Any]


def standing_of(router: Router, logits: Floats, bias: Floats | None) -> tuple[Floats, Floats]:
    """Logits (T, E) -> scores, and what experts are chosen by before groups come in."""
    if router.score == "sparsemixer":
        return logits, logits
    if router.score == "softmax":
        scores = np.exp(logits - logits.max(axis=1, keepdims=True))
        scores /= scores.sum(axis=1, keepdims=True)
    else:
        scores = sigmoid(logits)
    standing = logits if router.choice == "logits" else scores
    return scores, standing if bias is None else standing + bias


def choose(router: Router, logits: Floats, bias: Floats | None) -> tuple[npt.NDArray[np.int32], Floats]:
    """`Ops.route` on arrays: logits (T, E) -> ids (T, k), shares (T, k)."""
    if router.score == "sparsemixer":
        return _sparsely_mixed(router, logits)
    scores, standing = standing_of(router, logits, bias)
    if router.groups > 1:
        by_group = standing.reshape(len(logits), router.groups, -1)
        best = np.sort(by_group, axis=2)[:, :, ::-1]
        strength = best[:, :, 0] if router.group_score == "max" else best[:, :, :2].sum(axis=2)
        kept = np.argsort(-strength, axis=1, kind="stable")[:, : router.groups_used]
        mask = np.full(strength.shape, -np.inf, np.float32)
        np.put_along_axis(mask, kept, 0, axis=1)
        standing = (by_group + mask[:, :, None]).reshape(logits.shape)
    ids = np.argsort(-standing, axis=1, kind="stable")[:, : router.used]
    shares = np.take_along_axis(scores, ids, axis=1)
    if router.normalise:
        shares = shares / (shares.sum(axis=1, keepdims=True) + np.float32(1e-20))
    return ids.astype(np.int32), (shares * np.float32(router.scale)).astype(np.float32)


def _sparsely_mixed(router: Router, logits: Floats) -> tuple[npt.NDArray[np.int32], Floats]:
    left, ids, shares = logits.copy(), [], []
    for _ in range(router.used):
        e = left.argmax(axis=1)[:, None]
        best = np.take_along_axis(left, e, axis=1)
        near = best - logits <= np.float32(2 * router.jitter) * np.maximum(np.abs(logits), best)
        shares.append(1 / np.exp(np.where(near, left - best, -np.inf)).sum(axis=1, keepdims=True))
        ids.append(e)
        np.put_along_axis(left, e, -np.inf, axis=1)
    found = np.concatenate(shares, axis=1)
    found = found / (found.sum(axis=1, keepdims=True) + np.float32(1e-20)) if router.normalise else found
    return np.concatenate(ids, axis=1).astype(np.int32), (found * np.float32(router.scale)).astype(np.float32)
