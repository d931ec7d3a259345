"""A verification as lines and rows; compares and prints nothing."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from localmoe.evaluation.verification import Verification

HEADER = ("layer", "error", "same experts", "tokens apart", "gap")


def layer_rows(found: Verification) -> list[tuple[str, ...]]:
    """A row for each layer; those without a router leave the columns of experts empty."""
    rows = []
    for layer in found.layers:
        name = f"{layer.number}{' !' if not layer.error <= found.tolerance else ''}"
        choice: tuple[str, ...] = ("", "", "")
        if layer.alike is not None:
            gap = f"{layer.gap:.1e}" if layer.apart else ""
            choice = (f"{100 * layer.alike:.2f} %", f"{layer.apart} of {found.tokens}", gap)
        rows.append((name, f"{layer.error:.1e}", *choice))
    return rows


def has_routers(found: Verification) -> bool:
    return any(layer.alike is not None for layer in found.layers)


def logit_rows(found: Verification) -> list[tuple[str, str]]:
    return [
        ("logits, largest error", f"{found.largest_error:.1e} of the largest logit"),
        ("logits, error", f"{found.error:.1e}"),
        ("KL divergence, mean", f"{found.divergence:.2e} nats"),
        ("same best token", f"{100 * found.agreement:.2f} %"),
    ]


def greedy_rows(found: Verification, decode: Callable[[Sequence[int]], str] | None) -> list[tuple[str, str]]:
    """Both continuations, as text where there is a tokenizer."""
    show = decode or (lambda ids: " ".join(map(str, ids)))
    greedy, count = found.greedy, len(found.greedy.ours)
    if not count:
        return []
    if greedy.shared == count:
        return [(f"greedy, {count} tokens alike", repr(show(greedy.ours)))]
    return [
        ("greedy, localmoe", repr(show(greedy.ours))),
        ("greedy, transformers", repr(show(greedy.theirs))),
        ("they part", f"after {greedy.shared} of {count} tokens, at logits {greedy.gap:.1e} apart"),
    ]


def verdict(found: Verification) -> str:
    """One line: within the tolerance, or what is the first thing beyond it."""
    formats = ", ".join(found.formats)
    if found.passed:
        return f"agrees: every error is within the tolerance of {found.tolerance:.1e} ({formats})"
    layer = found.beyond
    where = "in the logits" if layer is None else f"from layer {layer.number} on"
    error = found.error if layer is None else layer.error
    return f"differs {where}: error {error:.1e}, tolerance {found.tolerance:.1e} ({formats})"
