"""What a model needs beside its weights, and what that leaves for experts; reads no weight."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from localmoe.kernels.program import Program
from localmoe.memory import readable_size

# Measured with bench/memory.py (CPython 3.11, x86-64): a chat at a terminal whose kernels need no compiling.
PYTHON_NBYTES = 49_000_000  # the interpreter, numpy, llvmlite with the kernels, rich, prompt_toolkit, jinja2
LIBRARIES_NBYTES = 110_000_000  # pages of files: Python, numpy, llvmlite, the header; what is read around weights
PASSING_NBYTES = 32 << 20  # the most rows that `prompt_cache` has in hand when it reads them, or writes them
# Of the header's lists and the tokenizer made from them: 246 to 309 in 15 vocabularies of bytes, 444 to 674 in 3 others
NBYTES_PER_TOKEN_OR_MERGE, NBYTES_PER_SCORED_TOKEN = 275, 640


@dataclass(frozen=True, slots=True)
class Needed:
    """Bytes that a chat on the cpu takes beside the weights once its context is full; pages of files are not among
    them."""

    cache: int  # rows padded as the device pads them
    working: int  # buffers of a decoding and of a prefill step, rope tables, norms as float32
    vocabulary: int
    python: int = PYTHON_NBYTES
    states: int = 0
    passing: int = 0  # rows of the cache that are on their way to disk, or back

    @property
    def nbytes(self) -> int:
        return self.cache + self.states + self.working + self.vocabulary + self.python

    @property
    def resident(self) -> int:
        """With the pages of libraries' files, and what passes: what a budget for the whole process has to hold."""
        return self.nbytes + LIBRARIES_NBYTES + self.passing

    @property
    def parts(self) -> str:
        """What it is made of, in words."""
        cache, working, vocabulary, python = map(
            readable_size, (self.cache, self.working, self.vocabulary, self.python)
        )
        cache += f", recurrent states {readable_size(self.states)}" if self.states else ""
        return f"KV cache {cache}, working memory {working}, vocabulary {vocabulary}, Python and libraries {python}"


def needed(
    programs: Sequence[Program], metadata: Mapping[str, Any], vocabulary: int, context: int, kv_format: str
) -> Needed:
    """What a chat with a context of so many tokens needs, `programs` being its steps; compiles nothing."""
    from localmoe.kernels.cpu.device import CpuDevice

    cache, working = CpuDevice.needed_nbytes(programs, context, kv_format)
    states = programs[0].state_slots * programs[0].state_nbytes
    passing = min(PASSING_NBYTES, cache - states)
    return Needed(cache - states, working, _vocabulary_nbytes(metadata, vocabulary), states=states, passing=passing)


def _vocabulary_nbytes(metadata: Mapping[str, Any], tokens: int) -> int:
    if metadata.get("tokenizer.ggml.model") == "llama":  # its merges are made from scores
        return NBYTES_PER_SCORED_TOKEN * tokens
    merges = metadata.get("tokenizer.ggml.merges")
    return NBYTES_PER_TOKEN_OR_MERGE * (tokens + (len(merges) if isinstance(merges, list) else tokens))
