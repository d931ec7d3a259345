"""A model beside transformers' with the same weights: logits, layers, experts chosen, greedy text; prints nothing."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from localmoe.errors import SettingError, TokenizerError, UnsupportedError
from localmoe.evaluation.own_pass import OwnPass, own_pass
from localmoe.evaluation.transformers_model import Pass, StreamedModel
from localmoe.evaluation.windows import Ids
from localmoe.formats import Format
from localmoe.kernels.program import Floats, Progress
from localmoe.model import Model

FLOAT_BITS = {"F32": 24, "F16": 11, "BF16": 8, "F8_E4M3": 4}  # of a significand
EXACT = 1e-4  # float32 in another order gives about 1e-6
STEPS = 8
INPUT_BITS = 6  # what 8-bit inputs of quantised weights keep beside outliers
LARGEST = 0.7  # values that have nothing to do with each other have an error of 1.4
# Where no text is given: any text does, as long as it is one.
PASSAGE = """\
A lighthouse stood at the end of the long pier, and every evening old Marten climbed its ninety-two steps to light the
lamp. "Ships do not care who I am," he used to say, "only that I am on time." In the winter of 1911 the sea took the
pier away in one night. For 17 days nobody could reach the tower; the lamp was lit on each of them. When at last a
boat came alongside, the keeper asked for three things: bread, a newspaper, and the score of the match between the two
villages. He read that his own side had lost by 4 to 1, folded the paper carefully, and went up the stairs again,
since it was getting dark.
"""


@dataclass(frozen=True, slots=True)
class Layer:
    """`error`: root mean square of the difference behind the layer, as a part of the right values'. `alike`: the share
    of choices that are transformers' too, None without a router; `apart`: tokens with another set of experts; `gap`:
    the largest distance between what an expert was chosen by and what the one it displaced has."""

    number: int
    error: float
    alike: float | None = None
    apart: int = 0
    gap: float = 0.0


@dataclass(frozen=True, slots=True)
class Greedy:
    """Both continuations of the text; `shared` tokens are the same from the start, and where they part, transformers'
    logits of the two tokens lie `gap` apart."""

    ours: list[int]
    theirs: list[int]
    shared: int
    gap: float


@dataclass(frozen=True, slots=True)
class Verification:
    """Everything that was compared. Errors are parts of transformers' values; KL(transformers || ours) is in nats."""

    tokens: int
    layers: list[Layer]
    largest_error: float
    error: float
    divergence: float
    agreement: float
    greedy: Greedy
    tolerance: float
    formats: list[str] = field(default_factory=list)

    @property
    def beyond(self) -> Layer | None:
        """The first layer whose error is beyond the tolerance."""
        return next((layer for layer in self.layers if not layer.error <= self.tolerance), None)

    @property
    def passed(self) -> bool:
        return self.beyond is None and self.error <= self.tolerance

    def record(self) -> dict[str, Any]:
        names = Layer.__slots__
        return {
            "tokens": self.tokens,
            "formats": self.formats,
            "tolerance": self.tolerance,
            "passed": self.passed,
            "first_layer_beyond": self.beyond.number if self.beyond else None,
            "logits": {
                "largest_relative_error": self.largest_error,
                "relative_error": self.error,
                "kl_divergence": self.divergence,
                "same_best_token": self.agreement,
            },
            "layers": [{name: getattr(layer, name) for name in names} for layer in self.layers],
            "greedy": {name: getattr(self.greedy, name) for name in Greedy.__slots__},
        }


def passage_ids(model: Model, text: str | None, count: int) -> tuple[Ids, bool]:
    """The first `count` tokens of a text, and True; without a text and a tokenizer random ones, and False."""
    try:
        ids = model.tokenizer.encode(PASSAGE if text is None else text, special=False)[:count]
    except TokenizerError:
        if text is not None:
            raise
        random = np.random.default_rng(0)
        return random.integers(0, model.network.config.vocabulary, count).astype(np.int32), False
    if len(ids) < 2:
        raise SettingError(f"the text has {len(ids)} tokens; at least 2 are needed")
    return np.asarray(ids, np.int32), True


def verify(
    model: Model,
    oracle: StreamedModel,
    tokens: Ids,
    generate: int,
    tolerance: float | None = None,
    progress: Progress | None = None,
) -> Verification:
    """Both over the same tokens. Raises UnsupportedError where layers or vocabularies cannot be those of one model."""
    ours = own_pass(model, tokens, progress)
    if len(ours.layers) != oracle.layer_count:
        raise UnsupportedError(
            f"{model.path} has {len(ours.layers)} layers, {oracle.folder} has {oracle.layer_count}: not the same model"
        )
    right, greedy = greedy_beside(model, oracle, tokens.tolist(), generate)
    if ours.logits.shape != right.logits.shape or ours.layers[0].shape != right.layers[0].shape:
        shapes = [f"{len(p.logits[0])} logits and a width of {len(p.layers[0][0])}" for p in (ours, right)]
        raise UnsupportedError(f"{model.path} has {shapes[0]}, {oracle.folder} has {shapes[1]}: not the same model")
    p, q = log_softmax(right.logits), log_softmax(ours.logits)
    same = right.logits.argmax(axis=1) == ours.logits.argmax(axis=1)
    difference = np.abs(ours.logits.astype(np.float64) - right.logits).max()
    return Verification(
        tokens=len(tokens),
        layers=compared_layers(ours, right),
        largest_error=float(difference / np.abs(right.logits).max()),
        error=relative_error(ours.logits, right.logits),
        divergence=float((np.exp(p) * (p - q)).sum(axis=1).mean()),
        agreement=float(same.mean()),
        greedy=greedy,
        tolerance=default_tolerance(model, oracle) if tolerance is None else tolerance,
        formats=sorted({found.name for found in matrix_formats(model)}),
    )


def compared_layers(ours: OwnPass, right: Pass) -> list[Layer]:
    """Raises UnsupportedError where both have routers in different layers."""
    if ours.experts.keys() != right.experts.keys():
        raise UnsupportedError(
            f"localmoe routes in layers {sorted(ours.experts)}, transformers in {sorted(right.experts)}"
        )
    found = []
    for number, (stream, twin) in enumerate(zip(ours.layers, right.layers, strict=True)):
        error = relative_error(stream, twin)
        if number in ours.experts:
            routing = compared_routing(
                ours.standing[number], ours.experts[number], right.experts[number][: len(stream)]
            )
            found.append(Layer(number, error, *routing))
        else:
            found.append(Layer(number, error))
    return found


def compared_routing(standing: Floats, ours: Ids, theirs: Ids) -> tuple[float, int, float]:
    """(share of choices alike, tokens apart, largest gap) of chosen ids (T, k)."""
    shared, apart, gap = 0, 0, 0.0
    for scores, own, other in zip(standing, map(set, ours.tolist()), map(set, theirs.tolist()), strict=True):
        shared += len(own & other)
        if own != other:
            apart += 1
            gaps = [abs(float(scores[a]) - float(scores[b])) for a in own - other for b in other - own]
            gap = max(gap, min(gaps, default=0.0))
    return shared / ours.size, apart, gap


def greedy_beside(model: Model, oracle: StreamedModel, text: list[int], count: int) -> tuple[Pass, Greedy]:
    """transformers over the text, and what both make of it. Our continuation is a draft that one run of transformers
    judges whole; another run is only needed where they part."""
    ours = continued(model, text, count)
    first, theirs, draft = None, list[int](), ours
    shared, gap = count, 0.0
    while first is None or len(theirs) < count:
        found = oracle.run([*text, *theirs, *draft])
        if first is None:
            first = Pass(found.logits[: len(text)], [s[: len(text)] for s in found.layers], found.experts)
        rows = found.logits[len(text) + len(theirs) - 1 :][: len(draft)]
        parts = np.flatnonzero(rows.argmax(axis=1) != np.asarray(draft, np.int64)) if draft else np.empty(0, np.int64)
        agreed = int(parts[0]) if parts.size else len(draft)
        if parts.size and len(theirs) + agreed < shared:
            shared = len(theirs) + agreed
            gap = float(rows[agreed].max() - rows[agreed][draft[agreed]])
        theirs += draft[:agreed] + ([int(rows[agreed].argmax())] if parts.size else [])
        if len(theirs) < count:
            draft = continued(model, [*text, *theirs], count - len(theirs))
    return first, Greedy(ours, theirs, shared, gap)


def continued(model: Model, ids: list[int], count: int) -> list[int]:
    """The likeliest token each time, end of text or not."""
    found: list[int] = []
    logits = model.forward(ids, 0, prompt=True) if count else np.empty(0)
    while len(found) < count:
        if found:
            logits = model.forward(found[-1:], len(ids) + len(found) - 1)
        found.append(int(logits[-1].argmax()))
    return found


def matrix_formats(model: Model) -> set[Format]:
    return {w.format for op in model.network.program(1).ops for w in op.matrices}


def default_tolerance(model: Model, oracle: StreamedModel) -> float:
    """EXACT for float weights that lose nothing of the folder's. Otherwise STEPS of the coarsest format, as the errors
    of many matrices add up: a small model of five layers has 3 to 4."""
    formats = matrix_formats(model)
    own = min(FLOAT_BITS.get(f.name) or 8 * f.nbytes // f.elements for f in formats)
    right = min((FLOAT_BITS[e.dtype] for e in oracle.entries.values() if e.dtype in FLOAT_BITS), default=0)
    if own >= right and all(found.name in FLOAT_BITS for found in formats):
        return EXACT
    bits = INPUT_BITS if model.source.kind != "gguf" else min(own, INPUT_BITS)  # a folder's own blocks lose nothing
    return min(STEPS * 2.0**-bits, LARGEST)


def relative_error(found: npt.ArrayLike, right: npt.ArrayLike) -> float:
    """Root mean square of the difference, as a part of the right values'; infinite where something is no number."""
    a, b = np.asarray(found, np.float64), np.asarray(right, np.float64)
    error = float(np.sqrt(((a - b) ** 2).sum() / (b**2).sum()))
    return error if np.isfinite(error) else float("inf")


def log_softmax(logits: Floats) -> npt.NDArray[np.float64]:
    shifted = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    found: npt.NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return found


def reference_folder(model: Path, folder: Path | None) -> Path:
    """The folder to compare with: the model itself where it is one. Raises SettingError."""
    if folder is None and not model.is_dir() and model.exists():
        raise SettingError(f"{model}: is no folder; name the Hugging Face folder that it was made from behind it")
    found = model if folder is None else folder
    if folder is not None and not found.is_dir():
        raise SettingError(f"{found}: no such folder; a Hugging Face folder with config.json and safetensors is wanted")
    return found
