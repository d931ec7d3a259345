"""A model whose KV rows and states are digests of the tokens before them, so that a wrong byte always shows; what tests
of the prompt cache share."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from random import Random

import numpy as np
from fakes import ByteTokenizer

from localmoe.experts.telemetry import Counts
from localmoe.kernels.cache_state import CacheState
from localmoe.kernels.states import States
from localmoe.prompt_cache.cache import PromptCache

SHAPES = ((2, 24), (1, 40), (3, 8))  # (heads, bytes of a row) of its arrays
STATE = 300  # bytes
WORDS = 200  # tokens it knows


class ChainedModel:
    """Rows of a token are made from a digest of all tokens up to it; the likeliest next token is one of its bytes."""

    tokenizer = ByteTokenizer()

    def __init__(self, *, context: int = 600, chunk: int = 32, slots: int = 0) -> None:
        self.context, self.chunk = context, chunk
        self.cached: list[int] = []
        self.ran: list[tuple[int, int]] = []  # (position, tokens)
        self.shifted_from: int | None = None
        self.interrupt_at = -1  # the position at which a step is interrupted
        self.rows = [np.zeros((heads, context, row), np.uint8) for heads, row in SHAPES]
        self.states = [np.zeros((slots, STATE), np.uint8)] if slots else []
        self.seen = States(slots)

    @property
    def unshifted(self) -> int:
        return len(self.cached) if self.shifted_from is None else min(self.shifted_from, len(self.cached))

    @property
    def cache_state(self) -> CacheState:
        return CacheState(self.rows, self.states, self.cached, self.seen)

    def resumes(self, position: int) -> int:
        return self.seen.nearest(position)

    def counts(self) -> Counts:
        return Counts()

    def forward(self, tokens: Sequence[int], position: int, *, prompt: bool = False) -> np.ndarray:
        assert 1 <= len(tokens) <= self.chunk and position <= len(self.cached)
        assert position == self.resumes(position), "no states to go on from"
        del self.cached[position:]
        self.seen.forget(position)
        slots = self.seen.begin(position, len(tokens), marked=prompt)
        if position <= self.interrupt_at < position + len(tokens):
            raise KeyboardInterrupt
        if self.states and position:
            assert np.array_equal(self.states[0][slots.source], filled(self.cached, STATE)), "wrong states"
        for i, array in enumerate(self.rows):
            array[:, position : position + len(tokens)] = rows_of([*self.cached, *tokens], position, i)
        if self.states:
            self.states[0][slots.target] = filled([*self.cached, *tokens], STATE)
            if slots.kept_tokens:
                self.states[0][slots.kept] = filled([*self.cached, *tokens[: slots.kept_tokens]], STATE)
        self.seen.finish(slots, position, len(tokens))
        self.cached.extend(tokens)
        self.ran.append((position, len(tokens)))
        logits = np.zeros((1, WORDS), np.float32)
        logits[0, self.rows[0][0, len(self.cached) - 1, 0] % WORDS] = 20
        return logits

    def check(self) -> None:
        """All rows and states are those of the tokens."""
        for i, array in enumerate(self.rows):
            assert np.array_equal(array[:, : len(self.cached)], rows_of(self.cached, 0, i)), "a wrong row"
        for position in self.seen.positions():
            state = self.states[0][self.seen.slot(position)]
            assert np.array_equal(state, filled(self.cached[:position], STATE)), "wrong states"


def filled(tokens: Sequence[int], nbytes: int) -> np.ndarray:
    return np.frombuffer(hashlib.shake_128(np.array(tokens, np.int32).tobytes()).digest(nbytes), np.uint8)


def rows_of(tokens: Sequence[int], start: int, array: int) -> np.ndarray:
    """(heads, T, row) of the tokens from `start` on."""
    heads, row = SHAPES[array]
    ids = np.array(tokens, "<i4")
    digest, made = hashlib.sha256(bytes([array]) + ids[:start].tobytes()), b""
    for token in ids[start:]:
        digest.update(token.tobytes())
        made += (digest.digest() * 3)[: heads * row]
    return np.frombuffer(made, np.uint8).reshape(len(ids) - start, heads, row).transpose(1, 0, 2)


def kept(model: ChainedModel, folder: Path, limit: int | None = 1 << 30, name: bytes = b"chained") -> PromptCache:
    return PromptCache(model, lambda: hashlib.sha256(name).digest(), folder, limit)


def text(length: int, seed: int = 0) -> list[int]:
    random = Random(seed)
    return [random.randrange(WORDS) for _ in range(length)]
