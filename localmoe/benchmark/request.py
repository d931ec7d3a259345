"""What a benchmark is asked for: tests, settings and repeats, from lists as they are written on the command line."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from localmoe.errors import SettingError
from localmoe.experts.loading import MODES, SLOTTED, Loading, read_loading
from localmoe.formats import KV_FORMATS
from localmoe.kernels.cpu.pinning import written

if TYPE_CHECKING:
    from localmoe.model import Model


@dataclass(frozen=True, slots=True)
class Test:
    """Read `tokens` tokens at once (pp) or generate them one by one (tg), behind `depth` cached tokens."""

    kind: Literal["pp", "tg"]
    tokens: int
    depth: int = 0

    @property
    def name(self) -> str:
        """As llama-bench writes it: "pp512", "tg64 @ d2048"."""
        return f"{self.kind}{self.tokens}" + (f" @ d{self.depth}" if self.depth else "")


@dataclass(frozen=True, slots=True)
class Setting:
    """How a model is opened; `threads` None takes the physical cores that are quick. `pin`: the CPUs that they are kept
    on."""

    threads: int | None = None
    kv: str = "f16"
    lazy: str = "auto"
    device: str = "cpu"
    quantize: str | None = None
    limits: Loading = field(default_factory=Loading)  # everything about loading but its mode
    pin: str | None = None

    @property
    def how(self) -> dict[str, Any]:
        """What `Model` is called with."""
        loading = replace(self.limits, mode=self.lazy)
        shared = {"threads": self.threads, "loading": loading, "device": self.device, "quantize": self.quantize}
        return shared | {"kv_format": self.kv, "pin": self.pin}

    def of(self, model: Model) -> Setting:
        """With the threads that the model has come to have, and their CPUs."""
        return replace(self, threads=model.threads, pin=written(model.device.cpus) or None)


@dataclass(frozen=True, slots=True)
class Request:
    """Every test under every setting, `repeat` times each."""

    path: Path
    tests: tuple[Test, ...]
    settings: tuple[Setting, ...]
    repeat: int

    @property
    def context(self) -> int:
        """Cached tokens that the deepest test needs."""
        return max(test.depth + test.tokens for test in self.tests)

    @property
    def depths(self) -> tuple[int, ...]:
        return tuple(dict.fromkeys(test.depth for test in self.tests))


def read_request(
    path: str | Path,
    *,
    prompt: str = "512",
    generate: str = "64",
    depth: str = "0",
    threads: str = "",
    kv: str = "f16",
    lazy: str = "auto",
    device: str = "cpu",
    repeat: int = 5,
    quantize: str | None = None,
    pin: str | None = None,
    **limits: Any,
) -> Request:
    """Values with commas between; a `prompt` or `generate` of 0 leaves that test out, no `threads` means the physical
    cores. `limits` are those of `read_loading`, for the modes that have a use for them. Raises SettingError for what is
    no such list, and where nothing is asked for."""
    sizes = {"pp": numbers("-p", prompt), "tg": numbers("-n", generate)}
    tests = [
        Test(kind, tokens, behind)
        for behind in numbers("-d", depth)
        for kind in ("pp", "tg")
        for tokens in sizes[kind]
        if tokens
    ]
    if not tests:
        raise SettingError("bench has nothing to measure: give -p or -n a number above 0")
    counts: Sequence[int | None] = numbers("--threads", threads, least=1) if threads else [None]
    formats, modes = words("--kv", kv, tuple(KV_FORMATS)), words("--lazy", lazy, MODES)
    loading = read_loading(next((mode for mode in modes if mode in SLOTTED), modes[0]), **limits)
    loading = replace(loading, learned=False)  # random tokens teach nothing
    settings = tuple(Setting(*chosen, device, quantize, loading, pin) for chosen in product(counts, formats, modes))
    return Request(Path(path), tuple(tests), settings, repeat)


def numbers(flag: str, text: str, least: int = 0) -> list[int]:
    """ "512,1024" -> [512, 1024], each once."""
    pieces = [piece.strip() for piece in text.split(",")]
    wrong = [piece for piece in pieces if not (piece.isascii() and piece.isdigit() and least <= int(piece) < 1 << 31)]
    if wrong:
        raise SettingError(f"{flag} takes whole numbers from {least} on with commas between, not {wrong[0]!r}")
    return list(dict.fromkeys(map(int, pieces)))


def words(flag: str, text: str, known: Sequence[str]) -> list[str]:
    """ "f16,f32" -> ["f16", "f32"], each once and each of `known`."""
    pieces = [piece.strip() for piece in text.split(",")]
    wrong = [piece for piece in pieces if piece not in known]
    if wrong:
        raise SettingError(f"{flag} takes {', '.join(known)}, with commas between, not {wrong[0]!r}")
    return list(dict.fromkeys(pieces))
