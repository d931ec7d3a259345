"""Mutated headers: whatever the bytes, a loader opens them or raises LocalMoeError, in one line and little memory."""

from __future__ import annotations

import json
import os
import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf_writing import Tensor, gguf_bytes, safetensors_bytes
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from localmoe.errors import LocalMoeError
from localmoe.loader.checkpoint import Checkpoint
from localmoe.loader.gguf import open_gguf
from localmoe.loader.huggingface import open_folder
from localmoe.loader.huggingface_config import config_keys
from localmoe.loader.metadata import Metadata
from localmoe.loader.source import Source

FUZZ = settings(max_examples=250, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
NUMBERS = (0, 1, 255, 1 << 16, 1 << 31, (1 << 32) - 1, 1 << 40, 1 << 62, 1 << 63, (1 << 64) - 1)
CONFIG = {
    "model_type": "qwen3_moe", "num_hidden_layers": 1, "hidden_size": 8, "intermediate_size": 4, "vocab_size": 5,
    "max_position_embeddings": 64, "num_attention_heads": 2, "head_dim": 4, "rms_norm_eps": 1e-5, "num_experts": 2,
    "num_experts_per_tok": 1, "moe_intermediate_size": 3, "norm_topk_prob": True, "tie_word_embeddings": False,
    "rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e6, "original_max_position_embeddings": 16},
    "layer_types": ["full_attention"], "eos_token_id": [1, 2],
}  # fmt: skip

# One mutation: (kind, where from 0 to 1, a byte or a number).
Mutation = tuple[str, float, int]
mutations = st.lists(
    st.tuples(
        st.sampled_from(["flip", "cut", "insert", "delete", "number32", "number64", "repeat"]),
        st.floats(0, 1, exclude_max=True),
        st.integers(0, 255),
    ),
    min_size=1,
    max_size=4,
)


def mutated(content: bytes, changes: list[Mutation], header: int) -> bytes:
    """The content after some changes, all of them among its first `header` bytes."""
    for kind, where, byte in changes:
        at = int(where * min(header, len(content)))
        number = NUMBERS[byte % len(NUMBERS)]
        if kind == "flip":
            content = (
                content[:at] + bytes([(content[at] if at < len(content) else 0) ^ (byte or 1)]) + content[at + 1 :]
            )
        elif kind == "cut":
            content = content[:at]
        elif kind == "insert":
            content = content[:at] + bytes([byte]) * (byte % 9 + 1) + content[at:]
        elif kind == "delete":
            content = content[:at] + content[at + byte % 9 + 1 :]
        elif kind == "repeat":
            content = content[:at] + content[max(0, at - byte) : at] + content[at:]
        else:
            packed = struct.pack("<Q", number)[: 4 if kind == "number32" else 8]
            content = content[:at] + packed + content[at + len(packed) :]
    return content


def used(source: Source) -> None:
    """What a model does with a source: typed metadata and every tensor; what comes out lies within the file."""
    meta = Metadata(source.metadata, str(source.path))
    for read in (meta.int, meta.float, meta.bool, meta.str):
        for key in ("block_count", "rope.freq_base", "missing"):
            try:
                read(key)
            except LocalMoeError as error:
                assert "\n" not in str(error)  # noqa: PT017
    for name, weight in source.tensors.items():
        assert sum(slab.size for slab in weight.slabs) <= source.nbytes
        Checkpoint(source)(name.rpartition(".")[0] or name, weight.shape, suffix=name.rpartition(".")[2])
    Checkpoint(source).finish()


def survives(open_it: Callable[[], Source], nbytes: int) -> None:
    """Opens and uses, or refuses in one line; the peak of memory stays in proportion to the file."""
    tracemalloc.start()
    try:
        used(open_it())
    except LocalMoeError as error:
        assert "\n" not in str(error)  # noqa: PT017
        assert len(str(error)) < 2000  # noqa: PT017
    finally:
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert peak < 2_000_000 + 50 * nbytes


def replaced(path: Path, content: bytes) -> Path:
    """A new file under the same name: an old mapping of it must not change under anyone."""
    path.unlink(missing_ok=True)
    path.write_bytes(content)
    return path


def sample_gguf() -> bytes:
    metadata: dict[str, Any] = {
        "general.architecture": "llama", "llama.block_count": 2, "llama.rope.freq_base": 1e4, "flag": True,
        "tokenizer.ggml.tokens": ["a", "bb", "<0x0A>"], "tokenizer.ggml.scores": [0.5, 1.5], "types": [1, 2, 3],
        "general.alignment": 32, "split.count": 1,
    }  # fmt: skip
    tensors = [
        Tensor("blk.0.ffn_up_exps.weight", (3, 2, 32), "Q8_0"),
        Tensor("output.weight", (4, 8)),
        Tensor("x", (5,)),
    ]
    return gguf_bytes(metadata, tensors)


@FUZZ
@given(changes=mutations)
def test_mutated_gguf_headers_are_opened_or_refused(tmp_path: Path, changes: list[Mutation]) -> None:
    whole = sample_gguf()
    content = mutated(whole, changes, 700)
    path = replaced(tmp_path / "m.gguf", content)
    survives(lambda: open_gguf(path), len(content))


@settings(FUZZ, max_examples=60)
@given(changes=mutations)
def test_mutated_real_gguf_headers_are_opened_or_refused(
    conformance: Path, tmp_path: Path, changes: list[Mutation]
) -> None:
    whole = (conformance / "models" / "stories260K" / "stories260K-q4_0.gguf").read_bytes()
    content = mutated(whole, changes, 20_000)
    path = replaced(tmp_path / "m.gguf", content)
    survives(lambda: open_gguf(path), len(content))


def sample_folder(path: Path) -> bytes:
    tensors = {f"model.layers.0.mlp.experts.{i}.up_proj.weight": ("F32", (3, 8), bytes(96)) for i in range(2)}
    tensors |= {"lm_head.weight": ("BF16", (5, 8), bytes(80)), "model.norm.weight": ("F16", (8,), bytes(16))}
    (path / "config.json").write_text(json.dumps(CONFIG))
    return safetensors_bytes(tensors)


@FUZZ
@given(changes=mutations)
def test_mutated_safetensors_headers_are_opened_or_refused(tmp_path: Path, changes: list[Mutation]) -> None:
    content = mutated(sample_folder(tmp_path), changes, 500)
    replaced(tmp_path / "model.safetensors", content)
    survives(lambda: open_folder(tmp_path), len(content) + 20_000)


@FUZZ
@given(changes=mutations)
def test_mutated_configs_are_read_or_refused(tmp_path: Path, changes: list[Mutation]) -> None:
    replaced(tmp_path / "model.safetensors", sample_folder(tmp_path))
    content = mutated(json.dumps(CONFIG).encode(), changes, 1000)
    replaced(tmp_path / "config.json", content)
    survives(lambda: open_folder(tmp_path), len(content) + 20_000)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(1 << 70), 1 << 70) | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


@FUZZ
@given(
    family=st.sampled_from(["llama", "mistral", "mixtral", "qwen2", "qwen2_moe", "qwen3_moe", "olmoe", "deepseek_v2"]),
    changes=st.dictionaries(
        st.sampled_from([*CONFIG, "n_group", "topk_group", "sliding_window", "mscale"]), json_values
    ),
    rope=st.dictionaries(
        st.sampled_from(["rope_type", "factor", "mscale_all_dim", "beta_fast", "truncate"]), json_values
    ),
)
def test_any_value_in_any_config_key_is_read_or_refused(
    family: str, changes: dict[str, Any], rope: dict[str, Any]
) -> None:
    values = {**CONFIG, "model_type": family, "rope_parameters": {**CONFIG["rope_parameters"], **rope}, **changes}
    try:
        config_keys(values, "config.json")
    except LocalMoeError as error:
        assert "\n" not in str(error)  # noqa: PT017


@settings(FUZZ, max_examples=50)
@given(
    metadata=st.dictionaries(
        st.text(min_size=1, max_size=20).filter(lambda key: not key.startswith(("general.", "split."))),
        st.integers(0, (1 << 32) - 1)
        | st.booleans()
        | st.floats(width=32, allow_nan=False)
        | st.text()
        | st.lists(st.text(), min_size=1, max_size=5)
        | st.lists(st.integers(-(1 << 31), (1 << 31) - 1), min_size=1, max_size=5),
        max_size=6,
    )
)
def test_what_is_written_is_what_is_read(tmp_path: Path, metadata: dict[str, Any]) -> None:
    found = open_gguf(replaced(tmp_path / "m.gguf", gguf_bytes(metadata))).metadata
    assert {key: v.tolist() if isinstance(v, np.ndarray) else v for key, v in found.items()} == metadata


@pytest.mark.skipif(os.name == "nt", reason="truncate makes no sparse file there")
@pytest.mark.parametrize("count", [1 << 14, 1 << 28, 1 << 34])
def test_a_sparse_file_with_huge_counts_is_refused_without_reading_it(tmp_path: Path, count: int) -> None:
    """Four gigabytes of zeros would hold that many empty strings; a header may not be that long."""
    path = tmp_path / "m.gguf"
    head = gguf_bytes(key_count=1)[:24] + struct.pack("<Q", 1) + b"a" + struct.pack("<IIQ", 9, 8, count)
    with path.open("wb") as file:
        file.write(head)
        file.truncate(1 << 32)
    if count > 1 << 25:
        with pytest.raises(LocalMoeError, match="announced, expected at most"):
            open_gguf(path)
    else:
        survives(lambda: open_gguf(path), 8 * count)


def quantised_folder(path: Path, form: str) -> bytes:
    """One matrix of 32 × 64 in 8-bit floats or 4-bit integers, and the settings that say so."""
    float8 = {"weight": ("F8_E4M3", (32, 64), bytes(2048)), "weight_scale_inv": ("F32", (2, 4), bytes(32))}
    gptq = {
        "qweight": ("I32", (8, 32), bytes(1024)), "qzeros": ("I32", (2, 4), bytes(32)),
        "scales": ("F16", (2, 32), bytes(128)), "g_idx": ("I32", (64,), bytes(128) + b"\1\0\0\0" * 32),
    }  # fmt: skip
    shape = np.array([32, 64]).tobytes()
    packed = {
        "weight_packed": ("I32", (32, 8), bytes(1024)), "weight_scale": ("BF16", (32, 2), bytes(128)),
        "weight_shape": ("I64", (2,), shape),
    }  # fmt: skip
    weights = {"num_bits": 4, "type": "int", "group_size": 32, "strategy": "group"}
    groups = {"config_groups": {"group_0": {"weights": weights}}, "format": "pack-quantized"}
    quantization = {
        "fp8": {"quant_method": "fp8", "weight_block_size": [16, 16]},
        "gptq": {"quant_method": "gptq", "bits": 4, "group_size": 32},
        "packed": {"quant_method": "compressed-tensors", **groups},
    }[form]
    (path / "config.json").write_text(json.dumps(CONFIG | {"quantization_config": quantization}))
    parts = {"fp8": float8, "gptq": gptq, "packed": packed}[form]
    return safetensors_bytes({f"model.layers.0.mlp.up_proj.{last}": entry for last, entry in parts.items()})


@settings(FUZZ, max_examples=150)
@given(changes=mutations, form=st.sampled_from(["fp8", "gptq", "packed"]))
def test_mutated_quantised_folders_are_opened_or_refused(tmp_path: Path, changes: list[Mutation], form: str) -> None:
    content = mutated(quantised_folder(tmp_path, form), changes, 700)
    replaced(tmp_path / "model.safetensors", content)
    survives(lambda: open_folder(tmp_path), len(content) + 20_000)


@FUZZ
@given(
    method=st.sampled_from(["fp8", "fbgemm_fp8", "compressed-tensors", "gptq", "awq"]),
    changes=st.dictionaries(
        st.sampled_from(
            [
                "bits",
                "group_size",
                "fmt",
                "weight_block_size",
                "config_groups",
                "format",
                "checkpoint_format",
                "version",
            ]
        ),
        json_values,
    ),
)
def test_any_quantisation_settings_are_read_or_refused(method: str, changes: dict[str, Any]) -> None:
    quantization = {"quant_method": method, "bits": 4, "format": "pack-quantized", **changes}
    try:
        config_keys({**CONFIG, "quantization_config": quantization}, "config.json")
    except LocalMoeError as error:
        assert "\n" not in str(error)  # noqa: PT017
