"""Scores as lines, tables and JSON records; measures and prints nothing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import isfinite
from typing import Any

from localmoe.evaluation.perplexity import Request
from localmoe.evaluation.saved_logits import saved_nbytes
from localmoe.evaluation.statistics import Estimate, Scores, pair
from localmoe.evaluation.windows import Windows
from localmoe.memory import readable_size

PERCENT = 100.0


def headline(name: str, request: Request, windows: Windows, vocabulary: int) -> list[str]:
    """What is about to be scored, and what becomes of the logits."""
    begin = ", BOS first" if windows.bos is not None else ""
    apart = f" {windows.stride} apart" if request.stride else ""
    size = f"{windows.count} chunks of {windows.context}{apart}, the last {windows.scored} scored{begin}"
    lines = [f"{name}: {windows.tokens.size} tokens", size]
    if request.save:
        nbytes = readable_size(saved_nbytes(windows, vocabulary))
        lines.append(f"logits are saved in {request.save}, {nbytes}")
    if request.base:
        lines.append(f"compared with the logits in {request.base.path}")
    return lines


def is_told(count: int) -> bool:
    """Whether the estimate after so many chunks gets a line: 1 to 10, 20, 30 … 100, 200 …"""
    digits = len(str(count))
    return count == round(count, 1 - digits)


def written(estimate: Estimate, digits: int, unit: str = "") -> str:
    error = f" ± {estimate.error:.{digits}f}" if isfinite(estimate.error) else ""
    return f"{estimate.value:.{digits}f}{error}{unit}"


def running(count: int, scores: Scores) -> str:
    """The estimate after `count` chunks in one line."""
    line = f"{count:5}  PPL {written(scores.perplexity(), 4)}"
    if scores.has_base:
        agreement = written(scores.agreement().times(PERCENT), 2, " %")
        line += f"  KL {written(scores.mean_divergence(), 5)}  same best {agreement}"
    return line


def figures(scores: Scores) -> list[tuple[str, str]]:
    """Model and base side by side: (what, figure)."""
    ratio = scores.log_ratio()
    return [
        ("PPL of the base", written(scores.base_perplexity(), 6)),
        ("PPL / PPL of the base", written(ratio.exp(), 6)),
        ("ln of it", written(ratio, 6)),
        ("PPL - PPL of the base", written(scores.perplexity_difference(), 6)),
        ("correlation of ln PPL", f"{PERCENT * scores.correlation():.2f} %"),
        ("KL divergence, mean", written(scores.mean_divergence(), 6)),
        ("same best token", written(scores.agreement().times(PERCENT), 3, " %")),
        ("Δp of the text's token, mean", written(scores.mean_difference().times(PERCENT), 3, " %")),
        ("Δp, root mean square", written(scores.rms_difference().times(PERCENT), 3, " %")),
    ]


def quantile_rows(scores: Scores) -> list[tuple[str, str, str]]:
    names = {1.0: "maximum", 0.5: "median", 0.0: "minimum"}
    return [
        (names.get(share, f"{PERCENT * share:.1f} %"), f"{kl:.6f}", f"{PERCENT * difference:.3f} %")
        for share, kl, difference in scores.quantiles()
    ]


@dataclass(frozen=True, slots=True)
class Outcome:
    """What was scored of what was asked for; `estimates` after each chunk, `seconds` without the model's opening."""

    windows: Windows
    scores: Scores
    estimates: list[Estimate]
    seconds: float

    @property
    def tokens_per_second(self) -> float:
        return len(self.estimates) * self.windows.context / self.seconds

    def final(self) -> str:
        done = len(self.estimates)
        return (
            f"PPL = {written(self.scores.perplexity(), 4)}  ({done} of {self.windows.count} chunks, "
            f"{self.tokens_per_second:.0f} tokens/s)"
        )

    def record(self, request: Request, model: str) -> Mapping[str, Any]:
        return {
            "model": model,
            "text": request.origin if request.text is not None else None,
            "kl_base": str(request.base.path) if request.base else None,
            "saved": str(request.save) if request.save and len(self.estimates) == self.windows.count else None,
            "tokens": int(self.windows.tokens.size),
            "context": self.windows.context,
            "stride": request.stride,
            "begin_token": self.windows.bos,
            "chunks": self.windows.count,
            "chunks_done": len(self.estimates),
            "tokens_scored": int(self.scores.surprise.size),
            "seconds": self.seconds,
            "tokens_per_second": self.tokens_per_second,
            **self.scores.record(),
            "running": [pair(estimate) for estimate in self.estimates],
        }
