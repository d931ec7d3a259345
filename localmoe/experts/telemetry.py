"""What the expert store did, in numbers; knows no store."""

from __future__ import annotations

from dataclasses import astuple, dataclass


@dataclass(frozen=True, slots=True)
class Counts:
    """Since the model was opened, or, as a difference of two, in between. An expert that several tokens of a step
    choose counts once."""

    steps: int = 0  # decoded tokens and chunks of prompts
    tokens: int = 0
    chosen: int = 0  # experts
    hits: int = 0  # of them in memory when they were chosen
    nbytes_read: int = 0
    ahead_read: int = 0  # experts read because the next layer might choose them
    ahead_used: int = 0  # of them chosen
    waited_seconds: float = 0.0  # for reads, by a step that could do nothing else
    seconds: float = 0.0  # of all steps

    def __add__(self, other: Counts) -> Counts:
        return Counts(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))

    def __sub__(self, other: Counts) -> Counts:
        return Counts(*(a - b for a, b in zip(astuple(self), astuple(other), strict=True)))

    @property
    def hit_rate(self) -> float:
        return self.hits / self.chosen if self.chosen else 1.0

    @property
    def nbytes_per_token(self) -> float:
        return self.nbytes_read / self.tokens if self.tokens else 0.0

    @property
    def reading_share(self) -> float:
        """Of the steps' time, what went by waiting for reads."""
        return min(self.waited_seconds / self.seconds, 1.0) if self.seconds > 0 else 0.0


@dataclass(frozen=True, slots=True)
class Room:
    """How much memory experts have, and of what: bytes."""

    experts_nbytes: int  # of all experts in the files
    room_nbytes: int  # of the slots
    held_nbytes: int  # of experts that are in them
    budget_nbytes: int  # of the whole process
    dense_nbytes: int  # of weights that always stay
    beside_nbytes: int  # KV cache, working memory, vocabulary, Python, libraries
