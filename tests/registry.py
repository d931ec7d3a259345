"""Every tiny model that a file tests/tiny*.py has in its `MODELS`, by architecture, and as a GGUF file that can chat;
knows no family."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
from gguf_writing import ARRAY, BOOL, Tensor, Typed, write_gguf
from tiny import Tiny
from tiny_models import CONTROL, TEMPLATE, VOCABULARY, vocabulary

CONTEXT = 4096  # that a real template and two answers in single bytes fit
BY_TOKEN = ("token_embd.weight", "per_layer_token_embd.weight", "output.weight", "output.bias")  # a row for each


def tiny_models() -> dict[str, Callable[[], Tiny]]:
    """By the name of the function that makes them."""
    found: dict[str, Callable[[], Tiny]] = {}
    for file in sorted(Path(__file__).parent.glob("tiny*.py")):
        for name, make in getattr(import_module(file.stem), "MODELS", {}).items():
            assert name not in found, f"{file.name}: a second tiny model called {name}"
            found[name] = make
    return found


MODELS = tiny_models()
BY_ARCHITECTURE: dict[str, list[str]] = {}
for _name, _make in MODELS.items():
    BY_ARCHITECTURE.setdefault(_make().architecture, []).append(_name)


def written(tiny: Tiny, path: Path, template: str | None = TEMPLATE, **metadata: Any) -> Path:
    """The model as a GGUF file with a byte tokenizer and a chat template; metadata keys are in full."""
    tiny = chatting(tiny)
    keys = {f"{tiny.architecture}.{name}": typed(value) for name, value in tiny.keys.items()}
    tensors = [
        Tensor(name, array.shape, "F32", np.ascontiguousarray(array, np.float32).tobytes())
        for name, array in tiny.tensors.items()
    ]
    head = {"general.architecture": tiny.architecture, **keys, **vocabulary(template), **metadata}
    return write_gguf(path, head, tensors)


def typed(value: Any) -> Any:
    """A list as GGUF's array, of truth values where it holds them."""
    if not isinstance(value, np.ndarray):
        return value
    return Typed(ARRAY, value.tolist(), BOOL) if value.dtype == bool else value.tolist()


def chatting(tiny: Tiny) -> Tiny:
    """With a row for each token of the byte tokenizer, and a context (and learned positions) long enough to chat."""
    tensors = {name: stretched(a, VOCABULARY) if name in BY_TOKEN else a for name, a in tiny.tensors.items()}
    if "position_embd.weight" in tensors:
        tensors["position_embd.weight"] = stretched(tensors["position_embd.weight"], CONTEXT)
    for name in ("token_embd.weight", "output.weight"):
        if name in tensors:
            tensors[name][VOCABULARY - len(CONTROL) :] = 0  # so that answers are bytes
    return replace(tiny, tensors=tensors).with_keys(vocab_size=VOCABULARY, context_length=CONTEXT)


def stretched(array: np.ndarray, rows: int) -> np.ndarray:
    """More rows from those that there are, no two alike."""
    turns = range(-(-rows // len(array)))
    return np.concatenate([np.roll(array, 3 * turn, axis=-1) * (1 - 0.01 * turn) for turn in turns])[:rows]
