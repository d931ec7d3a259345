"""The long runs: real text through real models, device against device; `make conformance`."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import localmoe
from localmoe.kernels.cpu.isa import runnable
from localmoe.loader.locate import bundled

pytestmark = pytest.mark.conformance


def divergence(expected: np.ndarray, found: np.ndarray) -> float:
    """Mean KL divergence over the tokens, in nats."""

    def log_softmax(x: np.ndarray) -> np.ndarray:
        x = x.astype(np.float64) - x.max(axis=1, keepdims=True)
        return x - np.log(np.exp(x).sum(axis=1, keepdims=True))

    p, q = log_softmax(expected), log_softmax(found)
    return float((np.exp(p) * (p - q)).sum(axis=1).mean())


@pytest.mark.parametrize("isa", runnable())
def test_the_bundled_model_reads_a_long_text_alike_on_both_devices(
    conformance: Path, isa: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where rows meet integer GEMMs, 8-bit activations cost 4e-4 nats here (llama.cpp: 5e-4 on another text,
    `bench/quality.py`). On the portable kernels they stay floats: with a float32 cache the devices differ by rounding
    alone, and a float16 cache moves a logit by some per cent where a router's near tie falls the other way."""
    monkeypatch.setenv("LOCALMOE_ISA", isa)
    text = (conformance / "corpora" / "wizard-of-oz.txt").read_text(encoding="utf-8")[2000:5000]
    cpu = localmoe.load(bundled(), context=1024)
    ids = cpu.tokenizer.encode(text)[:1000]
    found = cpu.logits(ids)
    cpu.close()
    expected = localmoe.load(bundled(), device="reference", context=1024, kv_format="f32").logits(ids)
    if isa != "portable":
        assert divergence(expected, found) < 8e-4
        assert np.mean(expected.argmax(axis=1) == found.argmax(axis=1)) >= 0.97
        return
    assert divergence(expected, found) < 1e-4
    exact = localmoe.load(bundled(), context=1024, kv_format="f32")
    assert np.abs(exact.logits(ids) - expected).max() <= 1e-4 * np.abs(expected).max()
    exact.close()


@pytest.mark.parametrize("isa", runnable())
def test_decoding_the_bundled_model_token_by_token_stays_close_to_reading_it(
    conformance: Path, isa: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Decode reads 8-bit activations: the noise is bounded, and the most likely token is nearly always the same."""
    monkeypatch.setenv("LOCALMOE_ISA", isa)
    text = (conformance / "corpora" / "wizard-of-oz.txt").read_text(encoding="utf-8")[2000:4000]
    model = localmoe.load(bundled(), context=1024)
    ids = model.tokenizer.encode(text)[:400]
    read = model.logits(ids)
    decoded = np.concatenate([model.forward([token], i) for i, token in enumerate(ids)])
    model.close()
    assert divergence(read, decoded) < 1e-2
    assert (read.argmax(axis=1) == decoded.argmax(axis=1)).mean() > 0.9
