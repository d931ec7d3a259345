"""What `--lazy auto` decides: from sizes, memory and the disk's speed to a mode and one line that says why; a pure
function that looks nothing up."""

from __future__ import annotations

from dataclasses import dataclass

from localmoe.experts.sizes import Sizes
from localmoe.memory import readable_size

# Of the memory may be a model that the page cache keeps: near the limit a page cache drops what is wanted next.
COMFORTABLE = 0.9


@dataclass(frozen=True, slots=True)
class Choice:
    """A mode of Loading, "mmap" or "slots", and why, such as "slots: 7.80 GB of weights, 4.20 GB free; disk 1.50
    GB/s"."""

    mode: str
    why: str


def choose(
    sizes: Sizes, beside: int, memory: int, *, promised: bool = False, nbytes_per_second: float | None = None
) -> Choice:
    """`memory` bytes may hold the weights and what is needed `beside` them; `promised`: it must not be more, whatever
    comes of it. `nbytes_per_second`: of the disk at an expert's size, None where it was not measured.

    What fits comfortably is left to the page cache, which then costs nothing. Beyond that slots of our own win by far
    (issue 5: 1.3 against 0.09 tokens/s), unless there are no experts, or the rest does not fit either: then the page
    cache is the only way to run at all.
    """
    found = f"{readable_size(sizes.weights)} of weights, {readable_size(memory)} {'allowed' if promised else 'free'}"
    disk = f"; disk {readable_size(nbytes_per_second)}/s" if nbytes_per_second else ""
    if sizes.weights + beside <= COMFORTABLE * memory:
        return Choice("mmap", f"mmap: {found}")
    if not sizes.layers:
        again = "" if sizes.weights + beside <= memory else ", and no experts among them: every token reads all again"
        return Choice("mmap", f"mmap: {found}{again}{disk}")
    least = sizes.least + beside
    if least > memory and not promised:
        return Choice("mmap", f"mmap: {found}, {readable_size(least)} would do for slots: tokens read all again{disk}")
    return Choice("slots", f"slots: {found}{disk}")
