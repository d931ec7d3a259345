"""What scored positions say of a model: means with their standard errors, quantiles; must not know how they came about.

The figures and their errors are those of llama-perplexity (tools/perplexity/perplexity.cpp): positions count as
independent, the errors of ratios take the correlation of both sides into account.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Doubles = npt.NDArray[np.float64]
QUANTILES = (1.0, 0.999, 0.99, 0.95, 0.9, 0.5, 0.1, 0.05, 0.01, 0.001, 0.0)


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean and its standard error; the error of a single value is not known (nan)."""

    value: float
    error: float

    @classmethod
    def mean(cls, values: Doubles) -> Estimate:
        n = values.size
        return cls(float(values.mean()), float(values.std() / math.sqrt(n - 1)) if n > 1 else math.nan)

    def exp(self) -> Estimate:
        value = math.exp(self.value) if self.value < 700 else math.inf
        return Estimate(value, value * self.error)

    def times(self, factor: float) -> Estimate:
        return Estimate(self.value * factor, self.error * factor)


@dataclass(frozen=True, slots=True)
class Scores:
    """Scored positions, (n,) each: the surprise of the text's next token in nats, and beside a base its surprise,
    KL(base || model), the token's probability less the base's, and 1 where the best token is the same."""

    surprise: Doubles
    base_surprise: Doubles
    divergence: Doubles
    difference: Doubles
    same_best: Doubles

    @classmethod
    def joined(cls, parts: list[Scores]) -> Scores:
        names = cls.__slots__
        return cls(*(np.concatenate([getattr(part, name) for part in parts]) for name in names))

    @property
    def has_base(self) -> bool:
        return self.divergence.size > 0

    def perplexity(self) -> Estimate:
        return Estimate.mean(self.surprise).exp()

    def base_perplexity(self) -> Estimate:
        return Estimate.mean(self.base_surprise).exp()

    def log_ratio(self) -> Estimate:
        """ln(perplexity / base's); its error is that of the paired differences."""
        return Estimate.mean(self.surprise - self.base_surprise)

    def perplexity_difference(self) -> Estimate:
        ours, base = self.perplexity(), self.base_perplexity()
        paired = ours.value * self.surprise - base.value * self.base_surprise
        return Estimate(ours.value - base.value, Estimate.mean(paired).error)

    def correlation(self) -> float:
        """Of both surprises; nan where one never changes."""
        a, b = self.surprise - self.surprise.mean(), self.base_surprise - self.base_surprise.mean()
        norm = math.sqrt(float((a * a).sum() * (b * b).sum()))
        return float((a * b).sum()) / norm if norm else math.nan

    def mean_divergence(self) -> Estimate:
        return Estimate.mean(self.divergence)

    def agreement(self) -> Estimate:
        """The share of positions with the same best token."""
        return Estimate.mean(self.same_best)

    def mean_difference(self) -> Estimate:
        return Estimate.mean(self.difference)

    def rms_difference(self) -> Estimate:
        square = Estimate.mean(self.difference**2)
        root = math.sqrt(square.value)
        return Estimate(root, square.error / (2 * root) if root else 0.0)

    def quantiles(self) -> list[tuple[float, float, float]]:
        """(share, KL, difference) for each of QUANTILES."""
        kl, difference = (np.quantile(values, QUANTILES) for values in (self.divergence, self.difference))
        return [(q, float(a), float(b)) for q, a, b in zip(QUANTILES, kl, difference, strict=True)]

    def record(self) -> dict[str, Any]:
        """Everything above by name, ready for JSON: what is no number is None."""
        found: dict[str, Any] = {"perplexity": pair(self.perplexity())}
        if self.has_base:
            found |= {
                "base_perplexity": pair(self.base_perplexity()),
                "log_perplexity_ratio": pair(self.log_ratio()),
                "perplexity_ratio": pair(self.log_ratio().exp()),
                "perplexity_difference": pair(self.perplexity_difference()),
                "correlation": number(self.correlation()),
                "kl_divergence": pair(self.mean_divergence()),
                "same_best_token": pair(self.agreement()),
                "probability_difference": pair(self.mean_difference()),
                "probability_difference_rms": pair(self.rms_difference()),
                "quantiles": [
                    {"share": q, "kl_divergence": kl, "probability_difference": d} for q, kl, d in self.quantiles()
                ],
            }
        return found


def number(value: float) -> float | None:
    return value if math.isfinite(value) else None


def pair(estimate: Estimate) -> dict[str, float | None]:
    return {"value": number(estimate.value), "error": number(estimate.error)}
