"""One JSON object of settings, read value by value: what nobody took is refused; must not know any family."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from localmoe.errors import FileFormatError, UnsupportedError
from localmoe.formats import Weight
from localmoe.loader.source import listed, shown

Keys = dict[str, Any]
Makers = dict[str, Callable[[], Weight]]
INT_LIMIT = 1 << 31


class Settings:
    """The values of one JSON object; remembers which were taken. A null counts as absent, as transformers has it."""

    def __init__(self, values: Mapping[str, Any], origin: str) -> None:
        self.values, self.origin = values, origin
        self._taken: set[str] = set()

    def take(self, *names: str) -> Any:
        """The first of several spellings that is there, else None."""
        self._taken.update(names)
        return next((self.values[name] for name in names if self.values.get(name) is not None), None)

    def whole(self, *names: str, default: int | None = None) -> int:
        """A whole number from 0 below 2^31. Raises FileFormatError when it is missing or of another kind."""
        found: Any = self.take(*names)
        found = default if found is None else found
        if type(found) is not int or not 0 <= found < INT_LIMIT:
            raise self.wrong(names[0], found, "a whole number from 0 below 2^31")
        return found

    def number(self, *names: str, default: float | None = None) -> float:
        found: Any = self.take(*names)
        found = default if found is None else found
        if type(found) not in (int, float) or not math.isfinite(found) or abs(found) > 1e38:
            raise self.wrong(names[0], found, "a number")
        return float(found)

    def flag(self, name: str, default: bool) -> bool:
        found = self.take(name)
        found = default if found is None else found
        if not isinstance(found, bool):
            raise self.wrong(name, found, "true or false")
        return found

    def expect(self, name: str, *allowed: Any) -> None:
        """Refuses, with UnsupportedError, a value that is there and not among those implemented."""
        found = self.take(name)
        if found is not None and found not in allowed:
            possible = " or ".join(repr(value) for value in allowed)
            raise UnsupportedError(f"{self.origin}: {name} is {shown(found)}; possible is {possible}")

    def finish(self, harmless: frozenset[str] = frozenset()) -> None:
        """Refuses what nobody took, unless it is off (null, false, 0 or empty) or has no bearing."""
        left = [
            f"{shown(name)} = {shown(value, 40)}"
            for name, value in self.values.items()
            if name not in self._taken and name not in harmless and value
        ]
        if left:
            raise UnsupportedError(f"{self.origin}: not implemented: {listed(left)}")

    def wrong(self, name: str, found: Any, expected: str) -> FileFormatError:
        value = "missing" if found is None else shown(found)
        return FileFormatError(f"{self.origin}: {shown(name)} is {value}, expected {expected}")


@dataclass(frozen=True)
class Family:
    """How one `model_type` becomes a GGUF architecture; GGUF keys stand without the architecture's prefix.

    `numbers` only change their name, `steps` do the rest; `activations` are the values of hidden_act that the family
    runs, `epsilon` is GGUF's key and config.json's. `rewrite` changes the folder's tensors, makers by GGUF name, to
    what a GGUF file of the architecture holds, `quantizations` are the values of quant_method that it knows.
    """

    architecture: str
    numbers: Mapping[str, str]
    steps: tuple[Callable[[Settings, Keys, str], None], ...]
    activations: tuple[str, ...] = ("silu",)
    epsilon: tuple[str, str] = ("attention.layer_norm_rms_epsilon", "rms_norm_eps")
    rewrite: Callable[[Makers, Keys], None] | None = None
    quantizations: tuple[str, ...] = ()
