"""stories260K, a small trained model: its published greedy text, and how far each block format moves from it.

Measured over the 201 golden tokens, cpu with an F32 cache (the reference device gives the same to two digits):

| weights | largest logit error | same best token | mean KL divergence | greedy text equal |
|---------|--------------------:|----------------:|-------------------:|-------------------|
| F32, hf |              1.3e-6 |           201/201 |            1.1e-12 | all 200 tokens    |
| F16     |              5.2e-4 |           201/201 |             3.1e-7 | all 200 tokens    |
| BF16    |              4.8e-3 |           200/201 |             3.9e-5 | 429 characters    |
| Q8_0    |              1.4e-2 |           199/201 |             2.3e-4 | 429 characters    |
| Q5_1    |              9.4e-2 |           196/201 |             1.3e-2 | 133 characters    |
| Q4_0    |              3.9e-1 |           171/201 |             6.8e-2 | 87 characters     |

An F16 cache alone moves the F32 logits by 1.1e-3 and changes no token of the text; a Q8_0 cache by 4.7e-2 (KL 8.0e-4,
198 of 201 best tokens the same, the text for 304 characters).
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from families import relative_error

import localmoe
from localmoe.loader.locate import open_source
from localmoe.notebook import LoadedModel
from localmoe.sampling import SamplingSettings
from localmoe.tokenizer import Tokenizer

FILES = {name: f"stories260K-{name}.gguf" for name in ("f32", "f16", "bf16", "q8_0", "q5_1", "q4_0")} | {"hf": "hf"}


@dataclass(frozen=True)
class Story:
    folder: Path
    text: str
    ids: list[int]
    logits: np.ndarray

    def open(self, name: str, device: str = "cpu", kv_format: str = "f32") -> LoadedModel:
        model = localmoe.load(self.folder / FILES[name], device=device, kv_format=kv_format, threads=2)
        if name == "hf":  # the folder holds no tokenizer
            model.tokenizer = Tokenizer.from_gguf(open_source(self.folder / FILES["f32"]).metadata)
        return model

    def logits_of(self, name: str, device: str = "cpu", kv_format: str = "f32") -> np.ndarray:
        model = self.open(name, device, kv_format)
        found = model.logits(self.ids)
        model.close()
        return found


@pytest.fixture(scope="module")
def story(conformance: Path) -> Story:
    folder = conformance / "models" / "stories260K"
    golden = json.loads((folder / "golden_greedy.json").read_text())
    arrays = np.load(folder / "golden_greedy.npz")
    return Story(folder, golden["greedy_text_200"], golden["ids"], arrays["logits"])


def log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))


def divergence(right: np.ndarray, found: np.ndarray) -> float:
    """The mean Kullback-Leibler divergence of the next token's distribution, in nats."""
    p, q = log_softmax(right), log_softmax(found)
    return float((np.exp(p) * (p - q)).sum(axis=1).mean())


@pytest.mark.parametrize("kv_format", ["f32", "f16"])
@pytest.mark.parametrize("name", ["f32", "f16", "hf"])
def test_greedy_text_is_the_published_one(story: Story, name: str, kv_format: str) -> None:
    model = story.open(name, kv_format=kv_format)
    steps = list(model.generate(model.tokenizer.encode(""), SamplingSettings(temperature=0, max_tokens=200)))
    model.close()
    assert [step.token for step in steps] == story.ids[1:]
    assert "".join(step.text for step in steps) == story.text
    assert [step.finish for step in steps[-2:]] == [None, "length"]


@pytest.mark.parametrize("device", ["cpu", "reference"])
@pytest.mark.parametrize(
    ("name", "error", "misses", "nats"),
    [
        ("f32", 1e-5, 0, 1e-10),
        ("hf", 1e-5, 0, 1e-10),
        ("f16", 1e-3, 0, 1e-6),
        ("bf16", 1e-2, 2, 1e-4),
        ("q8_0", 3e-2, 4, 5e-4),
        ("q5_1", 0.15, 8, 2e-2),
        ("q4_0", 0.5, 35, 0.1),
    ],
)
def test_every_format_stays_as_close_as_its_bits_allow(
    story: Story, device: str, name: str, error: float, misses: int, nats: float
) -> None:
    found = story.logits_of(name, device)
    assert relative_error(found, story.logits) <= error
    assert np.count_nonzero(found.argmax(axis=1) != story.logits.argmax(axis=1)) <= misses
    assert divergence(story.logits, found) <= nats


@pytest.mark.parametrize("device", ["cpu", "reference"])
def test_a_q8_0_cache_hardly_moves_the_answers(story: Story, device: str) -> None:
    found = story.logits_of("f32", device, "q8_0")
    assert relative_error(found, story.logits) <= 0.1
    assert np.count_nonzero(found.argmax(axis=1) != story.logits.argmax(axis=1)) <= 6
    assert divergence(story.logits, found) <= 2e-3


def test_prefill_of_floats_adds_nothing_to_the_error_of_the_weights(story: Story) -> None:
    """Against the same weights in numpy: 8e-7 is what is seen, as rows meet float weights as floats."""
    assert relative_error(story.logits_of("bf16", "cpu"), story.logits_of("bf16", "reference")) <= 1e-5


@pytest.mark.parametrize("step", ["prefill", "decode"])
@pytest.mark.parametrize("name", ["q8_0", "q5_1", "q4_0"])
def test_8_bit_activations_cost_no_more_than_8_bit_weights(story: Story, name: str, step: str) -> None:
    """Against the same blocks in numpy: 1.3e-2 to 1.4e-2 are seen, and 198 or 199 of 201 best tokens."""
    model = story.open(name)
    if step == "decode":
        found = np.concatenate([model.forward([id], position) for position, id in enumerate(story.ids)])
    else:
        found = model.forward(story.ids, 0, all_logits=True)
    model.close()
    right = story.logits_of(name, "reference")
    assert relative_error(found, right) <= 3e-2
    assert np.count_nonzero(found.argmax(axis=1) != right.argmax(axis=1)) <= 6


def test_a_second_bos_would_be_seen(story: Story) -> None:
    model = story.open("f32")
    doubled = model.logits([story.ids[0], *story.ids[:-1]])
    model.close()
    assert relative_error(doubled[1:], story.logits[:-1]) > 1e-2
    assert model.tokenizer.encode("Once upon a time") == story.ids[:5]
