"""Samplers, each a function logits -> logits over the vocabulary, and the chain of them; knows no text and no model.

The order is llama.cpp's default (common/common.h): penalties, top-k, top-p, min-p, temperature. A token that is ruled
out has the logit -inf. V is the vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import numpy as np
import numpy.typing as npt

from localmoe.errors import LocalMoeError
from localmoe.settings import SamplingSettings, not_followed, recommended

__all__ = ["Sampler", "SamplingSettings", "chain", "not_followed", "recommended"]

Logits = npt.NDArray[np.float64]
Link = Callable[[Logits, Sequence[int]], Logits]


def penalties(logits: Logits, recent: Sequence[int], repeat: float, presence: float, frequency: float) -> Logits:
    """Makes recent tokens less likely: `repeat` scales (CTRL, Keskar et al. 2019), the others subtract (OpenAI)."""
    if not recent:
        return logits
    tokens, counts = np.unique(np.asarray(recent, np.int64), return_counts=True)
    old = logits[tokens]
    logits = logits.copy()
    logits[tokens] = np.where(old > 0, old / repeat, old * repeat) - counts * frequency - presence
    return logits


def top_k(logits: Logits, k: int) -> Logits:
    """Keeps exactly the k largest; of equal logits the lower ids stay."""
    if k >= logits.size:
        return logits
    threshold = np.partition(logits, -k)[-k]
    kept = logits > threshold
    kept[np.flatnonzero(logits == threshold)[: k - np.count_nonzero(kept)]] = True
    return np.where(kept, logits, -np.inf)


def top_p(logits: Logits, p: float) -> Logits:
    """Nucleus sampling (Holtzman et al. 2020): keeps the fewest tokens whose probabilities reach p, at least one."""
    candidates = np.flatnonzero(logits > -np.inf)
    weights = np.exp(logits[candidates] - logits[candidates].max())
    target = p * weights.sum()
    # The nucleus is small: sort ever larger heads of the distribution, not all of it.
    head = min(256, candidates.size)
    while True:
        ties = np.partition(weights, -head)[-head]
        largest = np.flatnonzero(weights >= ties)
        order = largest[np.argsort(-weights[largest], kind="stable")]
        reached = np.cumsum(weights[order])
        if reached[-1] >= target or head == candidates.size:
            break
        head = min(head * 16, candidates.size)
    kept = candidates[order[: int(np.searchsorted(reached, target)) + 1]]
    result = np.full_like(logits, -np.inf)
    result[kept] = logits[kept]
    return result


def min_p(logits: Logits, p: float) -> Logits:
    """Drops tokens whose probability is below p times that of the likeliest."""
    return np.where(logits >= logits.max() + np.log(p), logits, -np.inf)


def temperature(logits: Logits, value: float) -> Logits:
    """Sharpens (below 1) or flattens (above 1); the maximum becomes 0 first, lest a tiny value overflow to +inf."""
    shifted = logits - logits.max()
    with np.errstate(over="ignore"):
        scaled: Logits = shifted / value
    return scaled


def chain(settings: SamplingSettings) -> list[Link]:
    """The samplers that these settings ask for, in order; empty for plain greedy decoding."""
    links: list[Link] = []
    s = settings
    if s.penalty_last_n and (s.repeat_penalty != 1 or s.presence_penalty or s.frequency_penalty):
        links.append(lambda x, recent: penalties(x, recent, s.repeat_penalty, s.presence_penalty, s.frequency_penalty))
    if s.temperature == 0:
        return links
    if s.top_k:
        links.append(lambda x, _: top_k(x, s.top_k))
    if s.top_p < 1:
        links.append(lambda x, _: top_p(x, s.top_p))
    if s.min_p:
        links.append(lambda x, _: min_p(x, s.min_p))
    links.append(lambda x, _: temperature(x, s.temperature))
    return links


class Sampler:
    """Chooses tokens for one answer; owns its random generator and the window of recent tokens.

    `prompt` counts as recent text for the penalties, as in llama.cpp.
    """

    def __init__(self, settings: SamplingSettings, prompt: Iterable[int] = ()) -> None:
        self._links = chain(settings)
        self._greedy = settings.temperature == 0
        self._window = settings.penalty_last_n
        self._tokens = list(prompt)
        self._random = np.random.default_rng(None if settings.seed < 0 else settings.seed)

    def choose(self, logits: npt.NDArray[np.floating]) -> int:
        """One token id from logits (V,); LocalMoeError when a logit is NaN or infinite."""
        if not np.isfinite(logits).all():
            broken = int(np.count_nonzero(~np.isfinite(logits)))
            raise LocalMoeError(f"{broken} of {logits.size} logits are not finite: the weights are damaged or overflow")
        values = logits.astype(np.float64)
        recent = self._tokens if self._window < 0 else self._tokens[-self._window :] if self._window else []
        for link in self._links:
            values = link(values, recent)
        token = int(np.argmax(values)) if self._greedy else self._draw(values)
        self._tokens.append(token)
        return token

    def _draw(self, logits: Logits) -> int:
        candidates = np.flatnonzero(logits > -np.inf)
        weights = np.cumsum(np.exp(logits[candidates] - logits[candidates].max()))
        drawn = np.searchsorted(weights, self._random.random() * weights[-1], side="right")
        return int(candidates[min(int(drawn), candidates.size - 1)])
