"""localmoe: open-weight language models, Mixture-of-Experts among them, on the machine you have.

m = localmoe.load("model.gguf")
print("".join(m.chat().send("Hello!")))
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from localmoe.notebook import LoadedModel

__all__ = ["load"]


def load(
    path: str | Path,
    device: str = "cpu",
    threads: int | None = None,
    lazy: str = "auto",
    context: int | None = None,
    kv_format: str = "f16",
    quantize: str | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> LoadedModel:
    """Open a GGUF file or a Hugging Face folder.

    `device`: "cpu" or "reference". `threads`: None takes the physical cores that are quick. `lazy`: "mmap" reads
    weights when first used, "auto" ahead of that in the background as well, where they fit the memory, "off" reads them
    all now. `context`: tokens that the KV cache holds; None takes the
    trained one, at most 8192. `kv_format`: how keys and values are kept: "f32", "f16" or "q8_0" (8 bits and a scale
    for 32 values, about half the memory of f16). `quantize`: a file type such as "q4_K_M", to which the weights of a
    folder are quantised on loading. `progress(what, done, total)` hears of anything that takes time.
    Raises children of `localmoe.errors.LocalMoeError`.
    """
    from localmoe.notebook import LoadedModel

    return LoadedModel(
        path,
        device=device,
        threads=threads,
        lazy=lazy,
        context=context,
        kv_format=kv_format,
        quantize=quantize,
        progress=progress,
    )
