"""A text cut into the windows that are scored, exactly as llama-perplexity cuts it; must not know any model.

Source: llama.cpp's tools/perplexity/perplexity.cpp, functions perplexity and perplexity_v2 (for a stride).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from localmoe.errors import SettingError
from localmoe.loader.source import read_small_file
from localmoe.tokenizer import Tokenizer

Ids = npt.NDArray[np.int32]
TEXT_LIMIT = 1 << 30
LEAST_CONTEXT = 8


@dataclass(frozen=True, slots=True)
class Windows:
    """`count` windows of `context` tokens that begin `stride` tokens apart; the last `scored` tokens of each are
    predicted. With `bos`, it stands in place of a window's first token."""

    tokens: Ids
    context: int
    stride: int
    scored: int
    count: int
    bos: int | None

    def __iter__(self) -> Iterator[Ids]:
        for number in range(self.count):
            window = self.tokens[number * self.stride :][: self.context].copy()
            if self.bos is not None:
                window[0] = self.bos
            yield window

    @property
    def first(self) -> int:
        """The first position of a window whose prediction is scored."""
        return self.context - 1 - self.scored


def scored_of(context: int) -> int:
    """Predictions that are scored in a window without a stride: those of its second half."""
    return context - 1 - context // 2


def read_text(path: Path) -> str:
    """A text file without the newline at its end, as llama.cpp reads it. Raises FileFormatError or SettingError."""
    data = read_small_file(path, TEXT_LIMIT)
    try:
        return data.decode("utf-8").removesuffix("\n")
    except UnicodeDecodeError as error:
        raise SettingError(f"{path}: not UTF-8 at byte {error.start}; a text file is wanted") from None


def tokenised(tokenizer: Tokenizer, text: str) -> Ids:
    """Token ids; control tokens written in the text are plain text, BOS stands before it where the file says so."""
    return np.asarray(tokenizer.encode(text, special=False, bos=tokenizer.add_bos), np.int32)


def begin_token(tokenizer: Tokenizer) -> int | None:
    return tokenizer.bos if tokenizer.add_bos else None


def cut(tokens: Ids, context: int, stride: int, chunks: int | None, bos: int | None, origin: str) -> Windows:
    """The windows of a text, at most `chunks`; a `stride` of 0 sets them side by side and scores the second half.
    Raises SettingError for a text shorter than two windows, or a stride that leaves no context."""
    if context < LEAST_CONTEXT:
        raise SettingError(f"a context of {context} tokens is not possible; at least {LEAST_CONTEXT} are")
    if stride and stride >= context:
        raise SettingError(f"--stride {stride} leaves nothing before the scored tokens; it must be below {context}")
    if tokens.size < 2 * context:
        most = tokens.size // 2
        less = f", or --context {most} or less" if most >= LEAST_CONTEXT else ""
        found = f"{origin}: {tokens.size} tokens, and a context of {context} needs {2 * context}"
        raise SettingError(f"{found}; give more text{less}")
    most = -(-(tokens.size - context) // stride) if stride else tokens.size // context
    count = most if chunks is None else min(chunks, most)
    return Windows(tokens, context, stride or context, stride or scored_of(context), count, bos)
