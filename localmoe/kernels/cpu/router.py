"""Routing on the cpu: which experts a token goes to, and with which shares; the contract is `ops.Ops.route`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from localmoe.kernels.cpu.arguments import row_count, slots
from localmoe.kernels.cpu.build import kernel
from localmoe.kernels.ops import SCORES
from localmoe.kernels.program import Op, Router

if TYPE_CHECKING:
    from localmoe.kernels.cpu.lower import Lowering


@kernel("route", 3)
def route(v: Any) -> Any:
    """Arguments: control, rows, logits, experts, ids, shares, used, 1 for sigmoid and 2 for sparsemixer, bias (0:
    none), groups, groups used, 1 for top2, 1 to normalise, scale, scratch (2 · padded experts + groups floats), its
    bytes a thread, 1 to choose by the logits, twice the jitter, factors of the experts (0: none)."""
    slot, rows = slots(v), row_count(v)
    scores_of, mask_groups, best, mixed_share = _scores(v), _mask_groups(v), _best(v), _mixed_share(v)

    def run(a, thread, threads):
        tokens, count, used, bias = rows(a), slot(a, 3), slot(a, 6), slot(a, 8)
        scores = slot(a, 14) + thread * slot(a, 15)
        standing = scores + 4 * ((count + 15) // 16 * 16)
        for t in range(tokens * thread // threads, tokens * (thread + 1) // threads):
            scores_of(slot(a, 2) + 4 * t * count, scores, count, slot(a, 7))
            chosen_by = slot(a, 2) + 4 * t * count if slot(a, 16) == 1 else scores
            for e in range(0, 4 * count, 4):
                s = v.load(v.float32, chosen_by + e)
                v.store(standing + e, s + v.load(v.float32, bias + e) if bias != 0 else s)
            if slot(a, 9) > 1:
                mask_groups(standing, count, slot(a, 9), slot(a, 10), slot(a, 11))
            total = np.float32(0)
            ids, shares = slot(a, 4) + 4 * t * used, slot(a, 5) + 4 * t * used
            for c in range(0, 4 * used, 4):
                e = best(standing, count)
                if slot(a, 7) == 2:
                    v.store(scores + 4 * e, mixed_share(standing, scores, count, e, v.load(v.float32, a + 136)))
                s = v.load(v.float32, scores + 4 * e)
                v.store(standing + 4 * e, np.float32(-np.inf))
                v.store(ids + c, v.convert(v.int32, e))
                v.store(shares + c, s)
                total += s
            scale = v.load(v.float32, a + 104)
            if slot(a, 12) == 1:
                scale = scale / (total + np.float32(1e-20))
            for c in range(0, 4 * used, 4):
                factor = np.float32(1)
                if slot(a, 18) != 0:
                    factor = v.load(v.float32, slot(a, 18) + 4 * v.load(v.int32, ids + c))
                v.store(shares + c, v.load(v.float32, shares + c) * scale * factor)

    return run


def _scores(v: Any) -> Any:
    def scores_of(logits, scores, count, sigmoid):
        one = v.splat(v.f32, np.float32(1))
        highest = np.float32(-np.inf)
        for e in range(count):
            x = v.load(v.float32, logits + 4 * e)
            v.store(scores + 4 * e, x)
            highest = max(highest, x)
        for e in range(0, 4 * count, 4 * v.lanes):
            x = v.load(v.f32, scores + e)
            v.store(scores + e, one / (one + v.exp(-x)) if sigmoid == 1 else v.exp(x - v.splat(v.f32, highest)))
        if sigmoid != 1:
            total = np.float32(0)
            for e in range(count):
                total += v.load(v.float32, scores + 4 * e)
            for e in range(count):
                v.store(scores + 4 * e, v.load(v.float32, scores + 4 * e) / total)

    return v.function(scores_of)


def _mixed_share(v: Any) -> Any:
    def mixed_share(standing, powers, count, chosen, width):
        """A softmax over those near the best; overwrites `powers`."""
        highest = v.load(v.float32, standing + 4 * chosen)
        for e in range(0, 4 * count, 4 * v.lanes):
            v.store(powers + e, v.exp(v.load(v.f32, standing + e) - v.splat(v.f32, highest)))
        total = np.float32(0)
        for e in range(0, 4 * count, 4):
            x = v.load(v.float32, standing + e)
            if highest - x <= width * max(max(x, -x), highest) and x > np.float32(-np.inf):
                total += v.load(v.float32, powers + e)
        return np.float32(1) / total

    return v.function(mixed_share)


def _best(v: Any) -> Any:
    def best(values, count):
        chosen, highest = 0, v.load(v.float32, values)
        for e in range(1, count):
            x = v.load(v.float32, values + 4 * e)
            if x > highest:
                chosen, highest = e, x
        return chosen

    return v.function(best)


def _mask_groups(v: Any) -> Any:
    best = _best(v)

    def mask_groups(standing, count, groups, kept, two):
        width, strength = count // groups, standing + 4 * ((count + 15) // 16 * 16)
        for g in range(groups):
            first, second = np.float32(-np.inf), np.float32(-np.inf)
            for e in range(g * width, (g + 1) * width):
                x = v.load(v.float32, standing + 4 * e)
                if x > first:
                    first, second = x, first
                elif x > second:
                    second = x
            v.store(strength + 4 * g, first + second if two == 1 else first)
        for _ in range(kept):
            v.store(strength + 4 * best(strength, groups), np.float32(-np.inf))
        for g in range(groups):
            if v.load(v.float32, strength + 4 * g) > np.float32(-np.inf):  # not among the kept: these were lowered
                for e in range(g * width, (g + 1) * width):
                    v.store(standing + 4 * e, np.float32(-np.inf))

    return v.function(mask_groups)


def lower_route(lowering: Lowering, op: Op) -> None:
    (logits,), (ids, shares) = op.inputs, op.outputs
    r: Router = op.attributes["router"]
    count = logits.shape[1]
    weights = [lowering.floats(weight) for weight in op.weights]
    bias = weights.pop(0) if op.attributes["biased"] else 0
    nbytes = 4 * (2 * (-(-count // 16) * 16) + -(-max(r.groups, 16) // 16) * 16)
    place = (lowering.side_by_side(logits), count, lowering.at(ids), lowering.at(shares))
    choice = (r.used, SCORES.index(r.score), bias)
    groups = (r.groups, r.groups_used, int(r.group_score == "top2"), int(r.normalise), float(r.scale))
    scratch = lowering.temporary(nbytes * lowering.threads)
    last = (int(r.choice == "logits"), float(np.float32(2 * r.jitter)), weights[0] if weights else 0)
    lowering.emit("route", logits, *place, *choice, *groups, scratch, nbytes, *last)
