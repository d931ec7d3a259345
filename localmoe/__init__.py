"""localmoe: open-weight language models, Mixture-of-Experts among them, on the machine you have.

m = localmoe.load("model.gguf")
print("".join(m.chat().send("Hello!")))
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from localmoe.experts.loading import Loading
    from localmoe.notebook import LoadedModel

__all__ = ["load"]


def load(
    path: str | Path,
    device: str = "cpu",
    threads: int | None = None,
    lazy: str | Loading = "auto",
    context: int | None = None,
    kv_format: str = "f16",
    quantize: str | None = None,
    progress: Callable[[str, int, int], None] | None = None,
    *,
    for_chat: bool = False,
    memory: str | int | None = None,
    expert_cache: str | int | None = None,
    expert_policy: str | None = None,
    lookahead: bool = False,
    trace: str | Path | None = None,
    pin: str | None = None,
) -> LoadedModel:
    """Open a GGUF file or a Hugging Face folder.

    `device`: "cpu" or "reference". `threads`: None takes the physical cores that are quick. `context`: tokens that the
    KV cache holds; None takes the trained one, at most 8192. `kv_format`: how keys and values are kept: "f32", "f16",
    "q8_0" or "q4_0" (8 or 4 bits and a scale for 32 values: about half or a quarter of f16's memory). `quantize`: a
    file type such as "q4_K_M", to which the weights of a folder are quantised on loading. `progress(what, done, total)`
    hears of anything that takes time. `for_chat`: one without a chat template is refused at once. `pin` keeps each
    thread on a CPU of its own while it computes (Linux): "auto" (the quick physical cores) or a list such as "0-3,8".

    `lazy`: how weights are loaded, "off" (all now), "mmap" (when first used), "slots" (experts when they are chosen,
    within a budget of memory), "auto" (as size, free memory and disk suggest), or a Loading with all that follows.
    `memory`: the budget of the whole process, "8GiB" or in bytes; `expert_cache`: the part of it for experts;
    `expert_policy`: which of them stay, "lfru", "lru" or "history"; `lookahead`: read some ahead that may be chosen:
    these four are for "slots", and for "auto", which may take it. `trace`: a file that gets every choice of experts.
    Raises children of `localmoe.errors.LocalMoeError`.
    """
    from localmoe.experts.loading import read_loading
    from localmoe.notebook import LoadedModel

    loading = read_loading(
        lazy,
        memory=memory,
        expert_cache=expert_cache,
        expert_policy=expert_policy,
        lookahead=lookahead,
        trace=trace,
    )
    return LoadedModel(
        path,
        device=device,
        threads=threads,
        pin=pin,
        loading=loading,
        context=context,
        kv_format=kv_format,
        quantize=quantize,
        for_chat=for_chat,
        progress=progress,
    )
