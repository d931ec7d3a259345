"""A model over the windows of a text: scores chunk by chunk, beside saved logits if there are any; prints nothing."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from localmoe.errors import FileFormatError, SettingError
from localmoe.evaluation.saved_logits import LogitsWriter, Rows, SavedLogits, rounded, saving
from localmoe.evaluation.statistics import Doubles, Scores
from localmoe.evaluation.windows import Ids, Windows, begin_token, cut, read_text, tokenised
from localmoe.kernels.program import Floats
from localmoe.model import Model
from localmoe.tokenizer import Tokenizer

CONTEXT = 512
BLOCK = 1 << 20  # logits scored at once: what stays in the processor's caches
NOTHING: Doubles = np.empty(0)


class ScoringModel(Protocol):
    """What is asked of a model; `forward` as in `localmoe.model.Model`."""

    @property
    def score_chunk(self) -> int: ...
    def forward(
        self, tokens: list[int], position: int, all_logits: bool = False, *, prompt: bool = False
    ) -> Floats: ...


@dataclass(frozen=True, slots=True)
class Chunk:
    """One window that was run: its number from 0 on and the scores of its positions."""

    number: int
    scores: Scores


@dataclass(frozen=True, slots=True)
class Request:
    """What is to be scored: a text in windows of `context` tokens, or those that `base` was saved for. Logits are saved
    in `save`."""

    text: str | None
    origin: str
    context: int
    stride: int
    chunks: int | None
    base: SavedLogits | None
    save: Path | None

    def windows(self, tokenizer: Tokenizer) -> Windows:
        """Raises SettingError for a text that is too short, or is another one than the base's."""
        bos = begin_token(tokenizer)
        tokens = None if self.text is None else tokenised(tokenizer, self.text)
        if self.base is None:
            assert tokens is not None
            return cut(tokens, self.context, self.stride, self.chunks, bos, self.origin)
        right = self.base.tokens
        if tokens is not None and not np.array_equal(tokens[: right.size], right):
            same = tokens[: right.size] == right[: tokens.size]
            first = int(np.append(np.flatnonzero(~same), same.size)[0])
            raise SettingError(f"{self.base.path}: saved for another text: its tokens differ from number {first} on")
        count = self.base.chunks if self.chunks is None else min(self.chunks, self.base.chunks)
        return Windows(right, self.context, self.context, self.base.scored, count, bos)


def read_request(
    text: Path | None,
    *,
    context: int | None = None,
    stride: int = 0,
    chunks: int | None = None,
    kl_base: Path | None = None,
) -> Request:
    """A base that exists is compared with, one that does not is saved; `context` None is the base's, else 512.
    Raises SettingError for flags that do not fit together, FileFormatError for a file that cannot be read."""
    base = SavedLogits(kl_base) if kl_base and kl_base.exists() else None
    save = kl_base if base is None else None
    if text is None and base is None:
        raise SettingError("a FILE with text is wanted; only --kl-base with logits saved before has the text in it")
    if kl_base and stride:
        raise SettingError("--kl-base is for windows side by side; leave --stride out")
    if save and not save.parent.is_dir():
        raise SettingError(f"--kl-base {save}: there is no folder {str(save.parent)!r}")
    if base and context not in (None, base.context):
        raise SettingError(f"{base.path}: saved with a context of {base.context}; leave --context out")
    content = read_text(text) if text else None
    return Request(content, str(text), base.context if base else context or CONTEXT, stride, chunks, base, save)


def run(model: Model, request: Request, windows: Windows) -> Iterator[Chunk]:
    """The scores of each window; saved logits get their name when the last one is done. Raises SettingError for a base
    of another vocabulary."""
    vocabulary = model.network.config.vocabulary
    if request.base and request.base.vocabulary != vocabulary:
        theirs = f"{request.base.path}: saved by a model with {request.base.vocabulary} tokens"
        raise SettingError(f"{theirs}; {model.path} has {vocabulary}")
    if request.save is None:
        yield from score(model, windows, request.base)
        return
    with saving(request.save, windows, vocabulary) as writer:
        yield from score(model, windows, None, writer)


def score(
    model: ScoringModel, windows: Windows, base: SavedLogits | None = None, writer: LogitsWriter | None = None
) -> Iterator[Chunk]:
    """The scores of each window. Raises FileFormatError for logits that are no numbers, or a broken base."""
    for number, window in enumerate(windows):
        rows = base.chunk(number) if base else None
        parts = []
        for start, logits in scored_logits(model, window, windows.first):
            if not np.isfinite(logits).all():
                raise FileFormatError(f"chunk {number + 1}: the model's logits are not finite; its weights are damaged")
            targets = window[start + 1 : start + 1 + len(logits)]
            offset = start - windows.first
            for block in blocks(logits):
                kept = rows.part(slice(offset + block.start, offset + block.stop)) if rows else None
                parts.append(scores_of(logits[block], targets[block], kept))
                if writer:
                    writer.write(rounded(logits[block]))
        yield Chunk(number, Scores.joined(parts))


def scored_logits(model: ScoringModel, window: Ids, first: int) -> Iterator[tuple[int, Floats]]:
    """(position, logits (rows, V)) of the positions from `first` to the last but one, in pieces of bounded memory."""
    ids = window[:-1].tolist()
    if first:
        model.forward(ids[:first], 0, prompt=True)
    for start in range(first, len(ids), model.score_chunk):
        yield start, model.forward(ids[start : start + model.score_chunk], start, all_logits=True)


def blocks(logits: Floats) -> Iterator[slice]:
    step = max(1, BLOCK // logits.shape[1])
    for start in range(0, len(logits), step):
        yield slice(start, min(start + step, len(logits)))


def scores_of(logits: Floats, targets: Ids, base: Rows | None) -> Scores:
    """Scores of logits (n, V) for the tokens (n,) that follow in the text; sums are in float64."""
    rows = np.arange(len(logits))
    best = logits.max(axis=1, keepdims=True)
    total = np.log(np.exp(logits - best).sum(axis=1, dtype=np.float64)) + best[:, 0]
    surprise = total - logits[rows, targets]
    if base is None:
        return Scores(surprise, NOTHING, NOTHING, NOTHING, NOTHING)
    right = base.values()
    base_surprise = -right[rows, targets].astype(np.float64)
    weights = np.where(right > -16, np.exp(right), np.float32(0))
    divergence = (weights * (right - logits + total.astype(np.float32)[:, None])).sum(axis=1, dtype=np.float64)
    same = base.steps.argmax(axis=1) == logits.argmax(axis=1)
    difference = np.exp(-surprise) - np.exp(-base_surprise)
    return Scores(surprise, base_surprise, divergence, difference, same.astype(np.float64))
