"""What is worth keeping in memory: one function of the history for each policy; must not know slots.

A policy gives every expert a score, (L, E): of those that may go, the one with the lowest goes first.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from localmoe.errors import SettingError
from localmoe.experts.history import History, Scores

Policy = Callable[[History], Scores]

PINNED = 2.0  # times the mean share of earlier sessions


def lru(history: History) -> Scores:
    """Least recently used; within a step the layers run one after the other."""
    layers = len(history.last)
    order: Scores = np.arange(layers) / layers
    return history.last + order[:, None]


def lfru(history: History) -> Scores:
    """Recency and frequency in one: uses that fade (LRFU: Lee et al., IEEE Transactions on Computers 50, 2001)."""
    return history.frequency


def pinned(history: History) -> Scores:
    """What earlier sessions used most stays; least recently used among the rest."""
    stays = history.prior > PINNED / history.prior.shape[1]
    return np.where(stays, history.clock + 1 + history.prior, lru(history))


POLICIES: Mapping[str, Policy] = {"lru": lru, "lfru": lfru, "history": pinned}


def policy_of(name: str) -> Policy:
    """Raises SettingError for a name that is not known."""
    if name not in POLICIES:
        raise SettingError(f"policy {name!r} is not known; these are: {', '.join(POLICIES)}")
    return POLICIES[name]
