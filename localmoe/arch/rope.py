"""Rotary position settings of a model file and the table they give: plain, linear, llama3 and yarn scaling; knows no
family.

Sources: YaRN (Peng et al. 2023, section 3.2-3.4), Llama 3.1's frequency smoothing, transformers' modeling_rope_utils
for rounding (float32 throughout), llama.cpp's llama-context.cpp for the meaning of the GGUF keys.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import ceil, floor, log, pi

import numpy as np

from localmoe.errors import FileFormatError
from localmoe.formats import Weight
from localmoe.kernels.program import Floats, RopeTable
from localmoe.loader.metadata import Metadata

SCALINGS = ("none", "linear", "llama3", "yarn")


def yarn_magnitude(factor: float, mscale: float) -> float:
    """YaRN's 0.1 · mscale · ln(factor) + 1 (1 when nothing is stretched)."""
    return 1.0 if factor <= 1 else 0.1 * mscale * log(factor) + 1.0


@dataclass(frozen=True)
class Rope:
    """What the `rope.*` keys say; `dimensions` elements of each head turn."""

    dimensions: int
    base: float
    scaling: str
    factor: float
    original_context: int
    attention_factor: float
    low_frequency_factor: float
    high_frequency_factor: float
    beta_fast: float
    beta_slow: float
    magnitude: float
    magnitude_all: float
    truncate: bool

    @classmethod
    def read(cls, meta: Metadata, dimensions: int, log_multiplier_unit: float = 1.0) -> Rope:
        """`dimensions` is the default of rope.dimension_count. In deepseek2 files yarn_log_multiplier is stored times
        0.1."""
        meta.expect("rope.scaling.type", *SCALINGS)
        scaling = meta.str("rope.scaling.type", "none")
        factor = meta.float("rope.scaling.factor", 1.0)
        if meta.has("rope.scale_linear"):  # GGUF files of 2023
            scaling, factor = "linear", meta.float("rope.scale_linear")
        magnitude_all = meta.float("rope.scaling.yarn_log_multiplier", 0.0) / log_multiplier_unit
        meta.expect("rope.scaling.yarn_ext_factor", 1.0, -1.0)
        base = meta.float("rope.freq_base", 10000.0)
        dimensions = meta.int("rope.dimension_count", dimensions)
        original_context = meta.int("rope.scaling.original_context_length", 0) or meta.int("context_length", 0)
        if base <= 1 or factor <= 0 or not 0 < dimensions <= 65536 or dimensions % 2 or not original_context:
            raise FileFormatError(
                f"{meta.origin}: rope of base {base:g}, factor {factor:g}, {dimensions} dimensions and an original "
                f"context of {original_context} is not possible; base > 1, factor > 0, even dimensions, a context are"
            )
        return cls(
            dimensions=dimensions,
            base=base,
            scaling=scaling,
            factor=factor,
            original_context=original_context,
            attention_factor=meta.float("rope.scaling.attn_factor", 1.0)
            * meta.float("rope.scaling.yarn_attn_factor", 1.0),
            low_frequency_factor=meta.float("rope.scaling.low_freq_factor", 1.0),
            high_frequency_factor=meta.float("rope.scaling.high_freq_factor", 4.0),
            beta_fast=meta.float("rope.scaling.yarn_beta_fast", 32.0),
            beta_slow=meta.float("rope.scaling.yarn_beta_slow", 1.0),
            magnitude=meta.float("rope.scaling.yarn_mscale", magnitude_all if log_multiplier_unit != 1.0 else 1.0),
            magnitude_all=magnitude_all,
            truncate=meta.bool("rope.scaling.yarn_truncate", True),
        )

    def windowed(self, meta: Metadata, width: int) -> Rope:
        """The rope of layers with a window, whose heads are `width` wide: a base of its own, nothing stretched."""
        base, dimensions = meta.float("rope.freq_base_swa", 10000.0), meta.int("rope.dimension_count_swa", width)
        if base <= 1 or not 0 < dimensions <= width or dimensions % 2:
            raise FileFormatError(
                f"{meta.origin}: rope of base {base:g} and {dimensions} dimensions in layers with a window is not "
                f"possible; base > 1 and even dimensions of at most {width} are"
            )
        return replace(self, scaling="none", base=base, dimensions=dimensions)

    @property
    def softmax_magnitude(self) -> float:
        """What MLA families multiply the softmax scale by, squared (DeepSeek-V2, appendix on long context)."""
        return yarn_magnitude(self.factor, self.magnitude_all) if self.scaling == "yarn" else 1.0

    def table(self, layout: str, factors: Weight | None = None) -> RopeTable:
        """The rope table; `factors` is the file's `rope_freqs` tensor (one divisor per frequency), if it has one."""
        exponents = np.arange(0, self.dimensions, 2, dtype=np.float32) / np.float32(self.dimensions)
        plain: Floats = np.reciprocal(np.power(np.full_like(exponents, self.base), exponents))
        if factors is not None:
            return RopeTable(np.divide(plain, factors.slabs[0].view(np.float32), dtype=np.float32), layout)
        if self.scaling == "linear":
            return RopeTable(plain / np.float32(self.factor), layout)
        if self.scaling == "llama3":
            return RopeTable(self._smoothed(plain), layout)
        if self.scaling == "yarn":
            return RopeTable(self._stretched(plain), layout, self._amplitude())
        return RopeTable(plain, layout)

    def _amplitude(self) -> float:
        """cos and sin are multiplied by this. With a log multiplier (deepseek, mistral) it is a ratio that is mostly
        1."""
        if self.magnitude_all == 0:
            return yarn_magnitude(self.factor, 1.0) * self.attention_factor
        ratio = yarn_magnitude(self.factor, self.magnitude) / yarn_magnitude(self.factor, self.magnitude_all)
        return ratio * self.attention_factor

    def _smoothed(self, plain: Floats) -> Floats:
        """Llama 3.1: long waves are divided by the factor, short ones kept, those between blended."""
        turns = self.original_context / (2 * pi / plain)  # of each frequency over the original context
        blend = (turns - self.low_frequency_factor) / (self.high_frequency_factor - self.low_frequency_factor)
        kept = np.clip(blend, 0, 1).astype(np.float32)
        return np.asarray((1 - kept) * plain / np.float32(self.factor) + kept * plain, np.float32)

    def _stretched(self, plain: Floats) -> Floats:
        """YaRN: frequencies that turn often over the original context are kept, rare ones divided by the factor."""

        def dimension(turns: float) -> float:
            return self.dimensions * log(self.original_context / (turns * 2 * pi)) / (2 * log(self.base))

        low, high = dimension(self.beta_fast), dimension(self.beta_slow)
        if self.truncate:
            low, high = floor(low), ceil(high)
        low, high = max(low, 0), min(high, self.dimensions - 1)
        ramp = (np.arange(plain.size, dtype=np.float32) - np.float32(low)) / np.float32(max(high - low, 0.001))
        kept = 1 - np.clip(ramp, 0, 1)
        return np.asarray(plain / np.float32(self.factor) * (1 - kept) + plain * kept, np.float32)
