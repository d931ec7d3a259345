"""Typed reading of GGUF metadata for one architecture; remembers what was read, must not know what the values mean."""

from __future__ import annotations

import builtins
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from localmoe.errors import FileFormatError, UnsupportedError
from localmoe.loader.source import listed, shown

INT_LIMIT, FLOAT_LIMIT, LAYER_LIMIT = 1 << 31, 3.5e38, 4096

# Keys that may stay unread: they say nothing about the computation, or only what every tensor's shape says again.
HARMLESS = frozenset(
    {
        "vocab_size", "context_length", "embedding_length", "feed_forward_length", "expert_feed_forward_length",
        "expert_shared_feed_forward_length", "expert_shared_count", "tensor_data_layout", "rope.scaling.finetuned",
        "pooling_type", "classifier.output_labels", "rope.factors_short", "rope.factors_long", "rope.factors",
    }
)  # fmt: skip


class Metadata:
    """The keys of one file. `key` is relative to the architecture: "block_count" reads "llama.block_count".

    Every reader raises FileFormatError naming the key when it is missing (and no default is given), of another type or
    out of range. Newer files write some counts as one number per layer: read as a number where all layers agree, and
    refused where they differ.
    """

    def __init__(self, values: Mapping[str, Any], origin: str) -> None:
        self.values, self.origin = values, origin
        architecture = values.get("general.architecture")
        if not isinstance(architecture, builtins.str) or not architecture:
            raise FileFormatError(f"{origin}: key 'general.architecture' is {shown(architecture)}, expected a name")
        self.architecture = architecture
        self._read: set[builtins.str] = set()

    def has(self, key: builtins.str) -> builtins.bool:
        return self._full(key) in self.values

    def int(self, key: builtins.str, default: builtins.int | None = None) -> builtins.int:
        """A whole number from 0 below 2^31."""
        return self._int(key, self._value(key, default))

    def float(self, key: builtins.str, default: builtins.float | None = None) -> builtins.float:
        """A finite number; a whole one will do."""
        return self._float(key, self._value(key, default))

    def bool(self, key: builtins.str, default: builtins.bool | None = None) -> builtins.bool:
        found = self._value(key, default)
        if not isinstance(found, builtins.bool):
            raise self._wrong(key, found, "true or false")
        return found

    def str(self, key: builtins.str, default: builtins.str | None = None) -> builtins.str:
        found = self._value(key, default)
        if not isinstance(found, builtins.str):
            raise self._wrong(key, found, "a string")
        return found

    def pattern(self, key: builtins.str, layers: builtins.int, period: builtins.int) -> tuple[builtins.bool, ...]:
        """For each layer whether it has a window: a list that says so, or a period n: all but every n-th (0: all)."""
        found = self.values.get(self._full(key), period)
        self._read.add(self._full(key))
        if isinstance(found, (list, np.ndarray)):
            values = _plain(found)
            if len(values) < layers or not all(isinstance(value, builtins.int) for value in values):
                raise self._wrong(key, found, f"true or false for each of {layers} layers")
            return tuple(builtins.bool(value) for value in values[:layers])
        if layers > LAYER_LIMIT:
            raise self._wrong("block_count", layers, f"at most {LAYER_LIMIT}")
        every = self._int(key, found)
        return tuple(every == 0 or i % every < every - 1 for i in range(layers))

    def ints(self, key: builtins.str, layers: builtins.int) -> tuple[builtins.int, ...]:
        """A whole number for each layer: a list of them, or one for all."""
        found = self._value(key, None)
        if layers > LAYER_LIMIT:
            raise self._wrong("block_count", layers, f"at most {LAYER_LIMIT}")
        if not isinstance(found, (list, np.ndarray)):
            return (self._int(key, found),) * layers
        values = _plain(found)
        if len(values) < layers:
            raise self._wrong(key, found, f"a number for each of {layers} layers")
        return tuple(self._int(key, value) for value in values[:layers])

    def expect(self, key: builtins.str, *allowed: Any, absent_ok: builtins.bool = True) -> None:
        """Refuses, with UnsupportedError, a file whose `key` has a value other than those that are implemented."""
        if not self.has(key) and absent_ok:
            return
        found = _plain(self._value(key, None))
        if not any(_same(found, value) for value in allowed):
            possible = " or ".join(repr(value) for value in allowed) or "its absence"
            raise UnsupportedError(f"{self.origin}: {self._full(key)} is {shown(found)}; possible is {possible}")

    def skip(self, key: builtins.str) -> None:
        """A key that has no bearing on what is computed here."""
        self._read.add(self._full(key))

    def finish(self) -> None:
        """Refuses keys of this architecture that nobody read: nothing is dropped in silence."""
        prefix = f"{self.architecture}."
        left = [
            f"{key} = {shown(_plain(value), 40)}"
            for key, value in self.values.items()
            if key.startswith(prefix) and key not in self._read and key.removeprefix(prefix) not in HARMLESS
        ]
        if left:
            raise UnsupportedError(f"{self.origin}: not implemented for {self.architecture}: {listed(left)}")

    @property
    def vocabulary(self) -> builtins.int:
        """The number of token ids: the architecture's own key, else the length of the token list."""
        if self.has("vocab_size"):
            return self.int("vocab_size")
        tokens = self.values.get("tokenizer.ggml.tokens")
        if not isinstance(tokens, list) or not tokens:
            raise FileFormatError(f"{self.origin}: neither {self._full('vocab_size')} nor tokenizer.ggml.tokens is set")
        return len(tokens)

    def _full(self, key: builtins.str) -> builtins.str:
        return f"{self.architecture}.{key}"

    def _value(self, key: builtins.str, default: Any) -> Any:
        self._read.add(self._full(key))
        found = self.values.get(self._full(key), default)
        if found is None:
            raise FileFormatError(f"{self.origin}: key {shown(self._full(key))} is missing")
        return _uniform(found)

    def _int(self, key: builtins.str, found: Any) -> builtins.int:
        if not isinstance(found, builtins.int) or isinstance(found, builtins.bool) or not 0 <= found < INT_LIMIT:
            raise self._wrong(key, found, "a whole number from 0 below 2^31")
        return found

    def _float(self, key: builtins.str, found: Any) -> builtins.float:
        if not isinstance(found, (builtins.int, builtins.float)) or isinstance(found, builtins.bool):
            raise self._wrong(key, found, "a number")
        if not math.isfinite(found) or abs(found) > FLOAT_LIMIT:
            raise self._wrong(key, found, "a finite number")
        return builtins.float(found)

    def _wrong(self, key: builtins.str, found: Any, expected: builtins.str) -> FileFormatError:
        name = shown(self._full(key))
        return FileFormatError(f"{self.origin}: key {name} is {shown(_plain(found))}, expected {expected}")


def _uniform(value: Any) -> Any:
    """One number for a per-layer array that holds the same in every layer; anything else as it is."""
    if not isinstance(value, (list, np.ndarray)) or not len(value):
        return value
    same = bool((value == value[0]).all()) if isinstance(value, np.ndarray) else value.count(value[0]) == len(value)
    return (value[0].item() if isinstance(value, np.ndarray) else value[0]) if same else value


def _plain(value: Any) -> Any:
    """A numpy array as a list of Python numbers, cut where no per-layer array can reach; other values as they are."""
    return value[:4096].tolist() if isinstance(value, np.ndarray) else value


def _same(found: Any, allowed: Any) -> bool:
    if isinstance(found, float) and isinstance(allowed, (int, float)):
        return math.isclose(found, allowed, rel_tol=1e-6)  # GGUF stores float32
    return type(found) is type(allowed) and bool(found == allowed)
