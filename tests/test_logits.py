"""The golden logits of transformers: right on every device and instruction set, however the text is cut into steps."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from families import greedy, logits, relative_error
from verified import NAME as VERIFIED
from verified import claim

from localmoe.kernels.cpu.isa import runnable
from localmoe.loader.locate import open_source
from localmoe.network import Network

SETS = (
    "llama", "llama3-rope", "mistral-swa", "mixtral", "qwen2", "qwen2-moe", "qwen3", "qwen3-moe", "olmoe",
    "deepseek-v2", "deepseek-v2-lite", "deepseek-v3-yarn", "gemma2", "phi3",
)  # fmt: skip
# Both sides compute in float32 (eps 6e-8), in another order: 5e-7 is what is seen. A wrong constant shows from 1e-4 on.
TOLERANCE = 1e-5
PROMPT = 3  # of the golden greedy ids, the first three were given


class Golden:
    """One set: its network, texts with their logits, and a greedy continuation."""

    def __init__(self, folder: Path) -> None:
        self.network = Network(open_source(folder))
        arrays = np.load(folder / "golden.npz")
        self.texts = [(arrays[f"ids{i}"].tolist(), arrays[f"logits{i}"]) for i in range(3)]
        self.greedy: list[int] = arrays["greedy_ids"].tolist()


@pytest.fixture(scope="module", params=SETS)
def golden(request: pytest.FixtureRequest, conformance: Path) -> Golden:
    return Golden(conformance / "logits" / request.param)


@pytest.fixture(params=["reference", *runnable()])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The reference device, then the cpu device forced to each instruction set that this host runs."""
    if request.param == "reference":
        return "reference"
    monkeypatch.setenv("LOCALMOE_ISA", request.param)
    return "cpu"


def test_logits_are_those_of_transformers(
    golden: Golden, device: str, record_property: Callable[[str, object], None]
) -> None:
    for ids, right in golden.texts:
        error = relative_error(logits(golden.network, ids, device), right)
        assert error <= TOLERANCE
        record_property(VERIFIED, claim(golden.network, "golden logits", "transformers 5.23", error))


def test_prefill_in_chunks_is_the_whole_prefill(golden: Golden, device: str) -> None:
    ids, _ = golden.texts[-1]
    whole = logits(golden.network, ids, device)
    for chunk in (5, 16):
        pieces = logits(golden.network, ids, device, chunk)
        # numpy's matrix product may sum in another order for another number of rows; the cpu device never does.
        assert np.array_equal(pieces, whole) if device == "cpu" else relative_error(pieces, whole) <= TOLERANCE


def test_decoding_token_by_token_is_the_prefill(golden: Golden, device: str) -> None:
    ids, _ = golden.texts[-1]
    assert (
        relative_error(logits(golden.network, ids, device, chunk=1), logits(golden.network, ids, device)) <= TOLERANCE
    )


def test_greedy_continuation_is_that_of_transformers(golden: Golden, device: str) -> None:
    prompt = golden.greedy[:PROMPT]
    assert greedy(golden.network, prompt, len(golden.greedy), device) == golden.greedy


def test_any_number_of_threads_gives_the_same_bits(golden: Golden) -> None:
    ids, _ = golden.texts[-1]
    for chunk in (0, 1):
        alone, two, three = (logits(golden.network, ids, "cpu", chunk, threads) for threads in (1, 2, 3))
        assert np.array_equal(alone, two)
        assert np.array_equal(alone, three)
