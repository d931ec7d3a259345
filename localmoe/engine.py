"""Token ids in, steps out: keeps what stands in the KV cache, reuses it, and knows no text beyond `Step.text`."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from time import perf_counter
from typing import Literal, Protocol

import numpy as np
import numpy.typing as npt

from localmoe.errors import DeviceError, SettingError
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
    """What the last `generate` did; times in seconds, without what the caller did between steps."""

    prompt_tokens: int = 0
    reused_tokens: int = 0
    prefill_seconds: float = 0.0
    generated_tokens: int = 0
    decode_seconds: float = 0.0
    prefill_counts: Counts = field(default_factory=Counts)
    decode_counts: Counts = field(default_factory=Counts)


class Engine:
    """Generates with one model. What stands in the KV cache is the model's to know: several engines may share it."""

    def __init__(self, model: CausalModel) -> None:
        self.model = model
        self.stats = Stats()

    def generate(
        self,
        tokens: Sequence[int],
        settings: SamplingSettings,
        stop: Collection[int] | None = None,
        progress: Progress | None = None,
    ) -> Iterator[Step]:
        """Steps that continue `tokens`, ended by a step with `finish`; `stop` None means the tokenizer's stop tokens.

        `progress(done, total)` counts prompt tokens that were not in the cache. DeviceError when the prompt exceeds the
        context, SettingError when it is empty.
        """
        prompt = list(tokens)
        self._check(prompt)
        stop = self.model.tokenizer.stop if stop is None else stop
        self.stats = stats = Stats(prompt_tokens=len(prompt), reused_tokens=self._reusable(prompt))
        start, before = perf_counter(), self.model.counts()
        logits = self._run(prompt, progress, prompt=True)
        stats.prefill_seconds, read = perf_counter() - start, self.model.counts()
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

    def _check(self, prompt: list[int]) -> None:
        if not prompt:
            raise SettingError("the prompt has no tokens: there is nothing to continue")
        if len(prompt) > self.model.context:
            raise DeviceError(
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
        first, chunk = self._reusable(tokens), self.model.chunk
        for position in range(first, len(tokens), chunk):
            if progress:
                progress(position - first, len(tokens) - first)
            logits = self.model.forward(tokens[position : position + chunk], position, prompt=prompt)
        if progress:
            progress(len(tokens) - first, len(tokens) - first)
        return logits

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
