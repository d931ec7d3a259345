"""Token ids in, steps out: keeps what stands in the KV cache, reuses it, and knows no text beyond `Step.text`."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace
from time import perf_counter
from typing import Literal, Protocol

import numpy as np
import numpy.typing as npt

from localmoe.errors import ContextError, SettingError
from localmoe.experts.telemetry import Counts
from localmoe.sampling import Sampler, SamplingSettings

Finish = Literal["stop", "length", "context"]
Progress = Callable[[int, int], None]


class TokenStream(Protocol):
    def push(self, id: int) -> str: ...
    def finish(self) -> str: ...


class TextDecoder(Protocol):
    """What the engine asks of a tokenizer."""

    @property
    def stop(self) -> frozenset[int]: ...
    def is_special(self, id: int) -> bool: ...
    def stream(self, *, continues: bool = False) -> TokenStream: ...


class CausalModel(Protocol):
    """What the engine asks of a model.

    `forward` runs 1 to `chunk` tokens at cache positions position…; `cached` is what stands in the cache, kept true by
    `forward` itself, whoever calls it and whatever interrupts it. With `prompt`, even one token is part of a prompt.
    `resumes` gives the last position up to another one from which it runs no cached token again: a recurrent model can
    go back to some positions only. `counts`: what became of the experts that were chosen since it was opened.
    """

    @property
    def context(self) -> int: ...
    @property
    def chunk(self) -> int: ...
    @property
    def cached(self) -> list[int]: ...
    @property
    def tokenizer(self) -> TextDecoder: ...
    def forward(self, tokens: Sequence[int], position: int, *, prompt: bool = False) -> npt.NDArray[np.float32]: ...
    def resumes(self, position: int) -> int: ...
    def counts(self) -> Counts: ...


class KeptState(Protocol):
    """What the engine asks of a cache on disk; see `prompt_cache.cache.PromptCache`. Neither call raises for what is
    wrong with a file or a disk.

    `restore` puts into the model what is kept of these tokens, and returns where kept tokens go on behind some that are
    not kept, their number if they do not. `keep` writes what stands in the model's cache: while a prompt is read the
    greater part, and when the answer is `done` the rest.
    """

    def restore(self, tokens: Sequence[int]) -> int: ...
    def keep(self, *, done: bool) -> None: ...


@dataclass(frozen=True, slots=True)
class Step:
    """One generated token. `text` is what became printable with it; `finish` is set on the last step only.

    "stop": `token` is a stop token; "length": `max_tokens` is reached; "context": the cache is full.
    """

    token: int
    text: str
    finish: Finish | None = None


@dataclass(slots=True)
class Stats:
    """What the last `generate` did; times in seconds, without what the caller did between steps. Of the prompt's tokens
    some stood in the model's cache (`reused_tokens`), some were put there from disk (`restored_tokens`, in
    `restore_seconds`), and the others ran."""

    prompt_tokens: int = 0
    reused_tokens: int = 0
    restored_tokens: int = 0
    restore_seconds: float = 0.0
    prefill_seconds: float = 0.0
    generated_tokens: int = 0
    decode_seconds: float = 0.0
    prefill_counts: Counts = field(default_factory=Counts)
    decode_counts: Counts = field(default_factory=Counts)

    def followed_by(self, other: Stats) -> Stats:
        """Of an answer that went on in another `generate`: the prompt is the first one's, the work is all."""
        return replace(
            self,
            prefill_seconds=self.prefill_seconds + other.prefill_seconds,
            generated_tokens=self.generated_tokens + other.generated_tokens,
            decode_seconds=self.decode_seconds + other.decode_seconds,
            prefill_counts=self.prefill_counts + other.prefill_counts,
            decode_counts=self.decode_counts + other.decode_counts,
        )


class Engine:
    """Generates with one model. What stands in the KV cache is the model's to know: several engines may share it."""

    def __init__(self, model: CausalModel, kept: KeptState | None = None) -> None:
        """`kept`: what gives the model the state of earlier prompts, and keeps that of this one."""
        self.model = model
        self.kept = kept
        self.stats = Stats()

    def generate(
        self,
        tokens: Sequence[int],
        settings: SamplingSettings,
        stop: Collection[int] | None = None,
        progress: Progress | None = None,
    ) -> Iterator[Step]:
        """Steps that continue `tokens`, ended by a step with `finish`; `stop` None means the tokenizer's stop tokens.

        `progress(done, total)` counts prompt tokens that were not in the cache. ContextError when the prompt exceeds
        the context, SettingError when it is empty.
        """
        prompt = list(tokens)
        self._check(prompt)
        stop = self.model.tokenizer.stop if stop is None else stop
        self.stats = Stats(prompt_tokens=len(prompt), reused_tokens=self._reusable(prompt))
        try:
            yield from self._steps(prompt, settings, stop, progress)
        finally:
            if self.kept:
                self.kept.keep(done=True)

    def _steps(
        self, prompt: list[int], settings: SamplingSettings, stop: Collection[int], progress: Progress | None
    ) -> Iterator[Step]:
        start, before, stats = perf_counter(), self.model.counts(), self.stats
        logits = self._run(prompt, progress, prompt=True)
        stats.prefill_seconds, read = perf_counter() - start - stats.restore_seconds, self.model.counts()
        stats.prefill_counts = read - before

        sampler = Sampler(settings, prompt)
        stream = self._stream(prompt)
        while True:
            start = perf_counter()
            token = sampler.choose(logits[-1])
            stats.generated_tokens += 1
            finish = self._finish(token, stop, settings)
            text = "" if finish == "stop" else stream.push(token)
            if finish:
                text += stream.finish()
            stats.decode_seconds += perf_counter() - start
            yield Step(token, text, finish)
            if finish:
                return
            start = perf_counter()
            prompt.append(token)
            logits = self._run(prompt)
            stats.decode_seconds += perf_counter() - start
            stats.decode_counts = self.model.counts() - read

    def read(self, tokens: Sequence[int], progress: Progress | None = None) -> None:
        """Run what the cache lacks of a prompt, as `generate` would. Raises what it raises."""
        self._check(prompt := list(tokens))
        self._run(prompt, progress, prompt=True)

    def _check(self, prompt: list[int]) -> None:
        if not prompt:
            raise SettingError("the prompt has no tokens: there is nothing to continue")
        if len(prompt) > self.model.context:
            raise ContextError(
                f"the conversation has {len(prompt)} tokens and the context holds {self.model.context}: "
                "shorten it, start it afresh, or open the model with a larger --context"
            )

    def _stream(self, prompt: list[int]) -> TokenStream:
        """Decodes what follows the prompt: its first space is text, unless only control tokens stand before it."""
        tokenizer = self.model.tokenizer
        return tokenizer.stream(continues=not all(map(tokenizer.is_special, prompt)))

    def _reusable(self, tokens: list[int]) -> int:
        """How many leading tokens need not run; the last one always does, since its logits are not kept."""
        return self.model.resumes(min(common_prefix(self.model.cached, tokens), len(tokens) - 1))

    def _run(
        self, tokens: list[int], progress: Progress | None = None, *, prompt: bool = False
    ) -> npt.NDArray[np.float32]:
        """Runs what the cache lacks of `tokens`, chunk by chunk; returns the logits of the last one, (1, V).

        In decoding that is one token, unless someone else used the model since.
        """
        kept = self.kept if prompt else None
        ahead = self._restore(kept, tokens) if kept else len(tokens)
        first = position = self._reusable(tokens)
        while position < len(tokens):
            if progress:
                progress(position - first, len(tokens) - first)
            stop = min(position + self.model.chunk, len(tokens), ahead)
            logits = self.model.forward(tokens[position:stop], position, prompt=prompt)
            position = stop
            if kept and position < len(tokens):
                kept.keep(done=False)
                if position == ahead:
                    ahead = self._restore(kept, tokens)
                    position = self._reusable(tokens)
        if progress:
            progress(len(tokens) - first, len(tokens) - first)
        return logits

    def _restore(self, kept: KeptState, tokens: list[int]) -> int:
        """Has what is kept of `tokens` put into the model, beyond what stands there; the next position to try it at."""
        start, before = perf_counter(), self._reusable(tokens)
        ahead = kept.restore(tokens)
        self.stats.restored_tokens += self._reusable(tokens) - before
        self.stats.restore_seconds += perf_counter() - start
        return ahead

    def _finish(self, token: int, stop: Collection[int], settings: SamplingSettings) -> Finish | None:
        if token in stop:
            return "stop"
        if self.stats.generated_tokens == settings.max_tokens:
            return "length"
        return "context" if self.stats.prompt_tokens + self.stats.generated_tokens > self.model.context else None


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """How many leading tokens two sequences share."""
    shorter = min(len(a), len(b))
    if a[:shorter] == b[:shorter]:  # the case of every generated token, and quick
        return shorter
    return next(i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y)
