"""Tensors asked for by name and shape, refused with what was expected and found; must not know any architecture."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import replace
from difflib import get_close_matches

from localmoe.errors import FileFormatError, UnsupportedError
from localmoe.formats import MadeSlabs, Weight
from localmoe.loader.source import PlannedTensors, Source, listed, shown

# Tensors that a family need not ask for: vision and audio towers, projectors, rope tables of the first converters.
SKIPPABLE = re.compile(r"(v|mm|a)\..*|blk\.\d+\.attn_rot_embd\.weight")
PREDICTOR = re.compile(r"(blk\.\d+\.)nextn\..*")


class Checkpoint:
    """`get("blk.0.attn_q", (rows, columns))` returns the tensor "blk.0.attn_q.weight" or raises FileFormatError."""

    def __init__(self, source: Source) -> None:
        self.source, self.prefix = source, ""
        self.given: dict[str, Weight] = {}  # every tensor that was asked for, by its full name

    def __call__(self, name: str, shape: tuple[int, ...], *, suffix: str = "weight") -> Weight:
        """Shapes are numpy's, (rows, columns); axes of length one count for nothing, as GGUF drops some of them. A few
        names have no suffix, ""."""
        full, tensors = f"{self.prefix}{name}.{suffix}".removesuffix("."), self.source.tensors
        try:
            found = tensors.wanted(full, shape) if isinstance(tensors, PlannedTensors) else tensors[full]
        except KeyError:
            raise self._missing(full, shape) from None
        self.given[full] = self._shaped(found, shape)
        return self.given[full]

    def optional(self, name: str, shape: tuple[int, ...], *, suffix: str = "weight") -> Weight | None:
        """The tensor, or None where the file has none; a wrong shape is still refused."""
        return self(name, shape, suffix=suffix) if self.has(name, suffix=suffix) else None

    def bias(self, name: str, shape: tuple[int, ...]) -> Weight:
        return self(name, shape, suffix="bias")

    def has(self, name: str, *, suffix: str = "weight") -> bool:
        return f"{self.prefix}{name}.{suffix}".removesuffix(".") in self.source.tensors

    def scope(self, prefix: str) -> Checkpoint:
        """The same checkpoint, names counted from `prefix`: `get.scope("blk.0")("attn_q", shape)`."""
        inner = Checkpoint(self.source)
        inner.prefix, inner.given = f"{self.prefix}{prefix}.", self.given
        return inner

    def experts(self, name: str, shape: tuple[int, int, int]) -> Weight:
        """A stack of experts (E, rows, columns) with one slab each.

        Found as one tensor ("ffn_gate_exps"), as half of a fused one ("ffn_gate_up_exps": gate first), or as a tensor
        per expert ("ffn_gate.7", files of before April 2024).
        """
        if self.has(name):
            return self(name, shape)
        count, rows, columns = shape
        half = {"ffn_gate_exps": 0, "ffn_up_exps": 1}.get(name)
        if half is not None and self.has("ffn_gate_up_exps"):
            return self("ffn_gate_up_exps", (count, 2 * rows, columns)).part(half * rows, (half + 1) * rows)
        single = name.removesuffix("_exps")
        if not self.has(f"{single}.0"):
            raise self._missing(f"{self.prefix}{name}.weight", shape)
        return stacked(f"{self.prefix}{name}.weight", [self(f"{single}.{i}", (rows, columns)) for i in range(count)])

    def finish(self) -> list[str]:
        """Refuses tensors that nobody asked for; returns the names of those that may be skipped, for a report.

        Skipped are multi-token-prediction layers (any block that holds "nextn" tensors) and vision or audio towers.
        """
        left = [name for name in self.source.tensors if name not in self.given]
        predictors = tuple({match[1] for name in left if (match := PREDICTOR.fullmatch(name))})
        skipped = [name for name in left if SKIPPABLE.fullmatch(name) or name.startswith(predictors)]
        unknown = sorted(set(left).difference(skipped))
        if unknown:
            names = listed(_quoted(unknown))
            raise UnsupportedError(f"{self.source.path}: tensors that this architecture has no place for: {names}")
        return skipped

    def _shaped(self, weight: Weight, shape: tuple[int, ...]) -> Weight:
        if weight.shape == shape:
            return weight
        pieces = shape[0] if len(shape) > 2 else 1
        if _longer_axes(weight.shape) != _longer_axes(shape) or len(weight.slabs) != pieces:
            found = f"tensor {shown(weight.name)} has shape {weight.shape}"
            raise FileFormatError(f"{self.source.path}: {found}, expected {shape}")
        return replace(weight, shape=shape)

    def _missing(self, full: str, shape: tuple[int, ...]) -> FileFormatError:
        close = _quoted(get_close_matches(full, self.source.tensors, n=3, cutoff=0.8))
        hint = f"; there is {listed(close)}" if close else ""
        return FileFormatError(f"{self.source.path}: tensor {shown(full)} of shape {shape} is missing{hint}")


def summary(skipped: list[str]) -> str:
    """What `Checkpoint.finish` names, in a few words; empty where nothing was left out."""
    towers = sum(SKIPPABLE.fullmatch(name) is not None and not name.startswith("blk.") for name in skipped)
    predictors = sum(not SKIPPABLE.fullmatch(name) for name in skipped)
    found = {"of vision or audio parts": towers, "of multi-token prediction": predictors}
    return ", ".join(f"{count} tensor{'s' * (count > 1)} {of}" for of, count in found.items() if count)


def stacked(name: str, matrices: list[Weight]) -> Weight:
    """Matrices of one shape and format as one weight with a slab each; nothing is copied, or made."""
    first = matrices[0]
    for other in matrices:
        if (other.shape, other.format) != (first.shape, first.format):
            found = " and ".join(f"{shown(w.name)} ({w.format.name}, {w.shape})" for w in (first, other))
            raise UnsupportedError(f"{name}: experts of one layer must have one shape and format, found {found}")
    scales = tuple(s for m in matrices for s in m.scales)
    shape, made = (len(matrices), *first.shape), [m.slabs for m in matrices if isinstance(m.slabs, MadeSlabs)]
    if len(made) == len(matrices):
        slabs = MadeSlabs(len(made), first.slab_nbytes, lambda matrix: made[matrix].steps(0))
        return Weight(name, shape, first.format, slabs)
    return Weight(name, shape, first.format, tuple(m.slabs[0] for m in matrices), scales)


def _longer_axes(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(n for n in shape if n != 1)


def _quoted(names: Iterable[str]) -> list[str]:
    return [shown(name) for name in names]
