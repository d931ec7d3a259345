"""Claims about kept states over real arithmetic: an answer after they came back is, bit by bit, that of going on
without; and whose they are."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import tiny_models
from tiny import Tiny, deepseek_v3, llama, mistral
from tiny_dense import gemma3, gpt2
from tiny_gemma4 import gemma4
from tiny_mixtures import gpt_oss, llama4
from tiny_recurrent import qwen3next, qwen35
from tiny_sparse import deepseek32

import localmoe
from localmoe.engine import Engine
from localmoe.formats import KV_FORMATS
from localmoe.kernels.cache_state import CacheState
from localmoe.kernels.open import open_device
from localmoe.kernels.states import States
from localmoe.network import Network
from localmoe.prompt_cache import cache
from localmoe.prompt_cache import identity as identity_module
from localmoe.prompt_cache.cache import PromptCache, open_prompt_cache
from localmoe.prompt_cache.identity import identity
from localmoe.sampling import SamplingSettings

FAMILIES = {
    "dense": llama, "window": mistral, "two caches": gemma3, "positions": gpt2, "shared layers": gemma4,
    "latent": deepseek_v3, "sinks": gpt_oss, "chunks": llama4, "recurrent": qwen3next, "tiled": qwen35,
    "sparse": deepseek32,
}  # fmt: skip
CONTEXT, CHUNK = 64, 9
IDS = [i * 29 % 61 for i in range(CONTEXT)]
GREEDY = SamplingSettings(temperature=0, max_tokens=6)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "SEGMENT_TOKENS", 7)
    monkeypatch.setattr(cache, "LEAST", 4)


class Running:
    """What a Model adds to a network, without a file."""

    def __init__(self, network: Network, device: str, kv_format: str) -> None:
        self.device = open_device(device, context=CONTEXT, kv_format=kv_format, threads=2)
        self.program = network.program(1)
        self.decode, self.prefill = (self.device.compile(network.program(n)) for n in (1, CHUNK))
        self.cached: list[int] = []
        self.seen = States(self.program.state_slots)

    @property
    def unshifted(self) -> int:
        return len(self.cached)

    @property
    def cache_state(self) -> CacheState:
        return CacheState(*self.device.cache_bytes(self.program), self.cached, self.seen)

    def resumes(self, position: int) -> int:
        return self.seen.nearest(position)

    def run(self, tokens: Sequence[int], *, prompt: bool = True) -> np.ndarray:
        """The logits behind `tokens`, of which those run that are not in the cache."""
        same = next((i for i, (a, b) in enumerate(zip(self.cached, tokens, strict=False)) if a != b), len(self.cached))
        position = self.resumes(min(same, len(tokens) - 1))
        plan, step = (self.prefill, CHUNK) if prompt else (self.decode, 1)
        while position < len(tokens):
            del self.cached[position:]
            self.seen.forget(position)
            piece = tokens[position : position + step]
            slots = self.seen.begin(position, len(piece), marked=prompt)
            logits = plan.run(np.asarray(piece, np.int32), position, slots)
            self.seen.finish(slots, position, len(piece))
            self.cached.extend(piece)
            position += len(piece)
        return logits[-1]

    def kept(self, folder: Path) -> PromptCache:
        return PromptCache(self, lambda: bytes(32), folder, 1 << 30)


def talk(running: Running, prompt: list[int]) -> tuple[list[int], list[np.ndarray]]:
    """A prompt and its answer of 8 tokens, decoded, with all logits."""
    said, logits = list(prompt), [running.run(prompt)]
    for _ in range(8):
        said.append(int(logits[-1].argmax()))
        logits.append(running.run(said, prompt=False))
    return said, logits


@pytest.fixture(scope="module")
def network() -> Callable[[Callable[[], Tiny]], Network]:
    made: dict[Callable[[], Tiny], Network] = {}
    return lambda tiny: made.setdefault(tiny, tiny().network())


CASES = [(name, "cpu", kv) for name in FAMILIES for kv in ("f16", "q8_0")]
CASES += [("dense", "cpu", kv) for kv in sorted(set(KV_FORMATS) - {"f16", "q8_0"})]
CASES += [(name, "reference", "f32") for name in ("dense", "latent", "recurrent", "sparse")]


@pytest.mark.parametrize(("family", "device", "kv_format"), CASES)
def test_an_answer_after_a_restart_has_the_bits_of_one_without(
    small: None, tmp_path: Path, network: Callable[..., Network], family: str, device: str, kv_format: str
) -> None:
    first = Running(network(FAMILIES[family]), device, kv_format)
    kept = first.kept(tmp_path)
    said, _ = talk(first, IDS[:31])
    kept.keep(done=True)
    kept.close()
    goes_on = [*said, *IDS[40:49]]
    expected = talk(first, goes_on)
    first.device.close()

    second = Running(network(FAMILIES[family]), device, kv_format)
    again = second.kept(tmp_path)
    assert again.restore(goes_on) == len(goes_on)
    assert len(second.cached) == second.resumes(len(second.cached)) > 31
    found = talk(second, goes_on)
    again.close()
    second.device.close()
    assert again.take_messages() == []
    assert found[0] == expected[0]
    assert all(np.array_equal(a, b) for a, b in zip(found[1], expected[1], strict=True))


@pytest.mark.parametrize("family", ["dense", "latent", "recurrent"])
def test_every_byte_of_the_cache_matters(
    small: None, tmp_path: Path, network: Callable[..., Network], family: str
) -> None:
    """Of what comes back, nothing stood there before: a device that is filled with other bytes gives the same."""
    first = Running(network(FAMILIES[family]), "cpu", "f16")
    kept = first.kept(tmp_path)
    said, _ = talk(first, IDS[:31])
    kept.keep(done=True)
    kept.close()
    expected = [array[:, : len(said)].copy() for array in first.device.cache_bytes(first.program)[0]]
    second = Running(network(FAMILIES[family]), "cpu", "f16")
    for array in [array for arrays in second.device.cache_bytes(second.program) for array in arrays]:
        array[...] = 0x7F
    second.kept(tmp_path).restore([*said, 1])
    restored = len(second.cached)
    found = second.device.cache_bytes(second.program)[0]
    assert restored >= len(said) - 5
    assert all(np.array_equal(a[:, :restored], b[:, :restored]) for a, b in zip(found, expected, strict=True))
    first.device.close()
    second.device.close()


@pytest.fixture(scope="module", params=["qwen3moe", "deepseek2", "qwen3next"])
def file(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return getattr(tiny_models, request.param)(tmp_path_factory.mktemp("kept") / "model.gguf")


def test_a_model_goes_on_where_another_process_left_it(file: Path, tmp_path: Path) -> None:
    prompt = [i * 37 % 256 for i in range(200)]
    model = localmoe.load(file)
    engine = Engine(model, open_prompt_cache(model, tmp_path))
    said = [*prompt, *(step.token for step in engine.generate(prompt, GREEDY))]
    engine.kept.close()
    expected = list(Engine(model).generate([*said, 3, 4, 5], GREEDY))
    model.close()
    model = localmoe.load(file)
    engine = Engine(model, open_prompt_cache(model, tmp_path))
    assert list(engine.generate([*said, 3, 4, 5], GREEDY)) == expected
    assert engine.stats.restored_tokens == len(said) - 1
    engine.kept.close()
    model.close()


def named(path: Path, **how: object) -> bytes:
    model = localmoe.load(path, **how)
    try:
        return identity(model)
    finally:
        model.close()


def test_a_model_is_known_by_its_weights_formats_and_layout_and_not_by_its_name(file: Path, tmp_path: Path) -> None:
    own = named(file)
    assert named(file, threads=1, context=250) == own
    copy = tmp_path / "other-name.gguf"
    shutil.copy2(file, copy)
    assert named(copy) == own
    assert len({own, *(named(file, kv_format=kv) for kv in ("f32", "q8_0")), named(file, device="reference")}) == 4
    os.utime(copy, ns=(1, 1))
    assert named(copy) != own
    changed, state = bytearray(file.read_bytes()), file.stat()
    changed[-len(changed) // 5 :] = changed[-len(changed) // 5 :][::-1]
    copy.write_bytes(changed)
    os.utime(copy, ns=(state.st_atime_ns, state.st_mtime_ns))
    assert named(copy) != own, "samples of the weights"


def test_rows_of_another_source_of_localmoe_are_not_taken(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = named(file)
    sources = identity_module._own_sources()
    assert {"arch/qwen3moe.py", "kernels/ops.py", "kernels/cpu/attention_decode.py"} <= {name for name, _, _ in sources}
    changed = [(name, size, time + (name == "arch/qwen3moe.py")) for name, size, time in sources]
    monkeypatch.setattr(identity_module, "_own_sources", lambda: changed)
    assert named(file) != own


def test_a_file_that_has_changed_since_it_was_opened_keeps_nothing(tmp_path: Path) -> None:
    path = tiny_models.qwen3moe(tmp_path / "model.gguf")
    model = localmoe.load(path)
    kept = open_prompt_cache(model, tmp_path / "kept")
    model.forward([i % 256 for i in range(100)], 0)
    os.utime(path, ns=(5, 5))
    kept.keep(done=True)
    assert "has changed since it was opened" in kept.take_messages()[0]
    kept.close()
    model.close()
