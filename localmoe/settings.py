"""Sampling settings, defined once: the command line's flags, `/set`, help texts and the sampler read this dataclass.

Must not know numpy or models, so that `localmoe --help` stays quick.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import Field, dataclass, field, fields, replace
from numbers import Real
from typing import Any, ClassVar, cast

from localmoe.errors import SettingError

INTEGER_LIMIT = 2**31 - 1


def _setting(default: float, low: float, high: float, help: str) -> Any:
    return field(default=default, metadata={"low": low, "high": high, "help": help})


@dataclass(frozen=True, slots=True)
class SamplingSettings:
    """How the next token is chosen. Every value is a number with an inclusive range; the zero of most is "off"."""

    temperature: float = _setting(0.8, 0, 100, "randomness; 0 always takes the likeliest token")
    top_k: int = _setting(40, 0, INTEGER_LIMIT, "keep the k likeliest tokens; 0 is off")
    top_p: float = _setting(0.95, 0, 1, "keep the likeliest tokens that reach this share together; 1 is off")
    min_p: float = _setting(0.05, 0, 1, "drop tokens less likely than this share of the likeliest; 0 is off")
    repeat_penalty: float = _setting(1.0, 0.01, 100, "divide the logits of recent tokens by this; 1 is off")
    presence_penalty: float = _setting(0.0, -100, 100, "subtract this from the logits of recent tokens; 0 is off")
    frequency_penalty: float = _setting(0.0, -100, 100, "subtract this for each recent use of a token; 0 is off")
    penalty_last_n: int = _setting(
        64, -1, INTEGER_LIMIT, "how many tokens count as recent; 0 is off, -1 is all of them"
    )
    seed: int = _setting(-1, -1, INTEGER_LIMIT, "seed of the random choice; -1 takes a new one for each answer")
    max_tokens: int = _setting(0, 0, INTEGER_LIMIT, "longest answer in tokens; 0 is as long as the context allows")

    FILE_KEYS: ClassVar[Mapping[str, str]] = {
        "general.sampling.temp": "temperature",
        "general.sampling.top_k": "top_k",
        "general.sampling.top_p": "top_p",
        "general.sampling.min_p": "min_p",
        "general.sampling.penalty_repeat": "repeat_penalty",
        "general.sampling.penalty_last_n": "penalty_last_n",
    }

    def changed(self, **values: object) -> SamplingSettings:
        """A copy with new values, given as numbers or as text; SettingError names the key, the value and the range."""
        numbers: dict[str, Any] = {name: checked(name, value) for name, value in values.items()}
        return replace(self, **numbers)


SETTINGS: Mapping[str, Field[float]] = {f.name: f for f in fields(SamplingSettings)}


def is_whole(name: str) -> bool:
    """Whether the setting counts something (an int) or measures something (a float)."""
    return SETTINGS[name].type in (int, "int")


def allowed(name: str) -> str:
    """The range of a setting in words: "a number from 0 to 1"."""
    low, high = (SETTINGS[name].metadata[bound] for bound in ("low", "high"))
    kind = "a whole number" if is_whole(name) else "a number"
    return f"{kind} from {low:g} up" if high == INTEGER_LIMIT else f"{kind} from {low:g} to {high:g}"


def checked(name: str, value: object) -> float | int:
    """The value as the setting's own type; SettingError for an unknown name or a value outside the range."""
    if name not in SETTINGS:
        raise SettingError(f"there is no setting {name!r}; possible: {', '.join(SETTINGS)}")
    wrong = SettingError(f"{name} is {allowed(name)}, not {str(value)[:40]!r}")
    if isinstance(value, bool) or not isinstance(value, (str, Real)):
        raise wrong
    try:
        number = float(value)
    except (ValueError, OverflowError):
        raise wrong from None
    low, high = (SETTINGS[name].metadata[bound] for bound in ("low", "high"))
    if not math.isfinite(number) or not low <= number <= high:
        raise wrong
    if not is_whole(name):
        return number
    if not number.is_integer():
        raise wrong
    return int(number)


def recommended(metadata: Mapping[str, Any]) -> dict[str, float | int]:
    """What the file itself recommends (`general.sampling.*`), as settings; SettingError for a value out of range."""
    found = {}
    for key, name in SamplingSettings.FILE_KEYS.items():
        if key in metadata:
            try:
                found[name] = checked(name, metadata[key])
            except SettingError as error:
                raise SettingError(f"the model's file recommends {key}: {error}") from None
    return found


def not_followed(metadata: Mapping[str, Any]) -> list[str]:
    """Recommendations in the file that no sampler here carries out, each as "key = value"."""
    prefix = "general.sampling."
    return [
        f"{key} = {cast(object, value)}"
        for key, value in metadata.items()
        if key.startswith(prefix) and key not in SamplingSettings.FILE_KEYS
    ]
