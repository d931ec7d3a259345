"""Folders of Mistral's own form, of 8-bit floats and of delta nets, and NVFP4 files, as the GGUF files made of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from families import logits, relative_error
from gguf_writing import Tensor, Typed, safetensors_bytes, write_gguf
from native_names import native, write_native
from test_folder_formats import DEEPSEEK, FLOAT8, LLAMA, float8, plain, shapes, two_folders, write
from test_mistral import IDS, floats, tekken
from tiny import V
from tiny_models import qwen3moe
from tiny_recurrent import MODELS, folder_settings, folder_tensors, fused

import localmoe
from localmoe.conversion.convert import convert
from localmoe.errors import FileFormatError, UnsupportedError
from localmoe.kernels.reference_weights import values
from localmoe.loader.gguf import open_gguf
from localmoe.loader.locate import open_source
from localmoe.network import Network
from localmoe.quantisation.rearranging import with_columns
from localmoe.tokenizer import Tokenizer

SEVEN: dict[str, Any] = {
    "dim": 160, "n_layers": 2, "head_dim": 32, "hidden_dim": 224, "n_heads": 4, "n_kv_heads": 2, "norm_eps": 1e-5,
    "vocab_size": 70, "rope_theta": 1e4,
}  # fmt: skip
FEW = list(range(V))


def reference(path: Path, ids: list[int] = IDS) -> np.ndarray:
    return logits(Network(open_source(path)), ids)


# Mistral's own form


def mistral_7b(folder: Path, vocabulary: int = 70) -> Path:
    """Rope pairs side by side, and a vision tensor."""
    config = LLAMA | {"model_type": "mistral", "sliding_window": None, "vocab_size": vocabulary}
    there = floats(config)
    own = {native(name): plain(a) for name, a in there.items()} | {"vision_encoder.x": plain(np.ones(3, np.float32))}
    return write_native(folder, own, SEVEN | {"vocab_size": vocabulary})


def test_rope_pairs_that_are_side_by_side_already_stay_so(tmp_path: Path) -> None:
    written = convert(mistral_7b(tmp_path / "own"), tmp_path / "model.gguf", "f32")
    before, after = open_source(tmp_path / "own").tensors, open_gguf(tmp_path / "model.gguf").tensors
    for name, weight in after.items():
        assert (values(weight) == values(before[name])).all(), name
    assert relative_error(reference(tmp_path / "model.gguf"), reference(tmp_path / "own")) <= 1e-6
    assert written.left_out == 1


def test_large_3_in_8_bit_floats_becomes_floats(tmp_path: Path) -> None:
    """Its latent is cut, its scales multiplied in."""
    r = np.random.default_rng(8)
    config = {k: v for k, v in DEEPSEEK.items() if k not in ("num_nextn_predict_layers", "n_group", "topk_group")}
    own = {}
    for name, shape in shapes(config).items():
        if "proj" in name:
            parts, _ = FLOAT8["Mistral's spelling"][1](r, shape)  # type: ignore[arg-type]
            own |= {native(name).replace("weight", last): plain(a, kind) for last, (kind, a) in parts.items()}
        elif "correction" not in name:
            noise = r.standard_normal(shape).astype(np.float32)
            own[native(name)] = plain(1 + 0.3 * noise if "norm" in name else noise / 10)
    params = SEVEN | {
        "n_layers": 3, "n_heads": 3, "n_kv_heads": 3, "hidden_dim": 200, "head_dim": 64, "q_lora_rank": 72,
        "kv_lora_rank": 130, "qk_nope_head_dim": 48, "qk_rope_head_dim": 16, "v_head_dim": 40,
        "quantization": {"qformat_weight": "fp8_e4m3", "qscheme_act": "TENSOR"},
        "moe": {
            "num_experts": 4, "num_experts_per_tok": 2, "first_k_dense_replace": 1, "expert_hidden_dim": 136,
            "num_shared_experts": 1, "routed_scale": 2.5,
        },
    }  # fmt: skip
    convert(write_native(tmp_path / "own", own, params), tmp_path / "model.gguf", "f32")
    assert relative_error(reference(tmp_path / "model.gguf"), reference(tmp_path / "own")) <= 1e-5
    assert "blk.0.attn_k_b.weight" in open_gguf(tmp_path / "model.gguf").tensors


def test_a_tekken_tokenizer_gives_the_same_ids_from_the_file(tmp_path: Path) -> None:
    tokens = [bytes([b]) for b in range(256)] + [b"th", b"the", b" the", "é".encode(), b"ing"]
    special = [
        {"rank": i, "token_str": t, "is_control": True} for i, t in enumerate(["<unk>", "<s>", "</s>", "[INST]"])
    ]
    folder = mistral_7b(tmp_path / "own", len(tokens) + 6)
    (folder / "tekken.json").write_text(json.dumps(tekken(tokens, 6, special_tokens=special)))
    convert(folder, tmp_path / "model.gguf", "f32")
    metadata = open_gguf(tmp_path / "model.gguf").metadata
    written, theirs = Tokenizer.from_gguf(metadata), Tokenizer.from_folder(folder)
    assert (metadata["tokenizer.ggml.model"], metadata["tokenizer.ggml.pre"]) == ("gpt2", "tekken")
    for text in ("the thing in été, 1234", "[INST]a</s>", "\n\n  theory\t"):
        assert written.encode(text) == theirs.encode(text)
    assert (written.bos, written.eos, written.stop) == (theirs.bos, theirs.eos, theirs.stop)


# Scales beside weights


@pytest.mark.parametrize("name", FLOAT8)
def test_8_bit_floats_are_written_with_their_scales_multiplied_in(name: str, tmp_path: Path) -> None:
    two_folders(tmp_path, *FLOAT8[name])
    convert(tmp_path / "small", tmp_path / "model.gguf", "f32")
    assert relative_error(reference(tmp_path / "model.gguf"), reference(tmp_path / "small")) <= 1e-5
    formats = {weight.format.name for weight in open_gguf(tmp_path / "model.gguf").tensors.values()}
    assert formats == {"F32"}


@pytest.mark.parametrize("type", ["q8_0", "bf16", "q4_K_M"])
def test_8_bit_floats_in_another_type_are_what_their_values_give(type: str, tmp_path: Path) -> None:
    """Bit for bit what the same model of float32 becomes, file and load."""
    two_folders(tmp_path, *FLOAT8["DeepSeek's blocks"])
    for name in ("small", "large"):
        convert(tmp_path / name, tmp_path / f"{name}.gguf", type)
    small, large = (open_gguf(tmp_path / f"{name}.gguf").tensors for name in ("small", "large"))
    assert {name: weight.format for name, weight in small.items()} == {n: weight.format for n, weight in large.items()}
    for name, weight in small.items():
        assert all((a == b).all() for a, b in zip(weight.slabs, large[name].slabs, strict=True)), name
    loaded = localmoe.load(tmp_path / "small", kv_format="f32", threads=2, quantize=type)
    for name, weight in loaded.source.tensors.items():
        assert all((a == b).all() for a, b in zip(weight.slabs, small[name].slabs, strict=True)), name
    loaded.close()


def nvfp4(path: Path) -> Path:
    """A mixture whose experts that go up are NVFP4 with a number for each beside them."""
    source = open_gguf(qwen3moe(path.with_suffix(".plain")))
    r, tensors = np.random.default_rng(3), []
    for name, weight in source.tensors.items():
        if not name.endswith("ffn_up_exps.weight"):
            tensors.append(Tensor(name, weight.shape, "F32", b"".join(slab.tobytes() for slab in weight.slabs)))
            continue
        blocks = r.integers(0, 256, (weight.elements // 64, 36), np.uint8)
        blocks[:, :4] = r.integers(20, 60, (len(blocks), 4))
        tensors.append(Tensor(name, weight.shape, "NVFP4", blocks.tobytes()))
        beside = r.uniform(0.1, 0.9, len(weight.slabs)).astype(np.float32)
        tensors.append(Tensor(name.replace("weight", "scale"), beside.shape, "F32", beside.tobytes()))
    metadata = {key: value for key, value in source.metadata.items() if not isinstance(value, np.ndarray)}
    return write_gguf(path, {k: Typed(4, v) if type(v) is int else v for k, v in metadata.items()}, tensors)


def test_nvfp4_files_keep_what_lies_beside_their_blocks(tmp_path: Path) -> None:
    source = nvfp4(tmp_path / "a.gguf")
    with pytest.raises(UnsupportedError, match=r"ffn_up_exps.weight' is NVFP4 already; as F32 .*--allow-requantize"):
        convert(source, tmp_path / "b.gguf", "f32")
    convert(source, tmp_path / "b.gguf", "f32", allow_requantize=True)
    assert open_gguf(source).tensors["blk.0.ffn_up_exps.weight"].scales
    assert relative_error(reference(tmp_path / "b.gguf"), reference(source)) <= 1e-6


def test_scaled_blocks_that_no_type_concerns_are_written_out(tmp_path: Path) -> None:
    r = np.random.default_rng(4)
    blocks = r.integers(0, 256, (6, 36), np.uint8)
    blocks[:, :4] = r.integers(20, 60, (6, 4))
    name, beside = "blk.0.attn_rel_b.weight", np.array([0.3], np.float32)
    tensors = [Tensor(name, (3, 128), "NVFP4", blocks.tobytes())]
    tensors.append(Tensor(name.replace("weight", "scale"), (1,), "F32", beside.tobytes()))
    source = write_gguf(tmp_path / "a.gguf", {"general.architecture": "none"}, tensors)
    convert(source, tmp_path / "b.gguf", "q8_0")
    before, after = (open_gguf(tmp_path / f"{one}.gguf").tensors[name] for one in "ab")
    assert (before.format.name, after.format.name, len(before.scales)) == ("NVFP4", "F32", 1)
    assert (values(after) == values(before)).all()


# Delta nets


def recurrent_folder(folder: Path, name: str) -> Path:
    tiny = MODELS[name]()
    arrays = folder_tensors(fused(tiny) if name == "qwen3next" else tiny)
    folder.mkdir()
    stored = {n: ("F32", a.shape, np.ascontiguousarray(a, np.float32).tobytes()) for n, a in arrays.items()}
    (folder / "model.safetensors").write_bytes(safetensors_bytes(stored))
    (folder / "config.json").write_text(json.dumps(folder_settings(tiny)))
    return folder


@pytest.mark.parametrize("name", MODELS)
def test_delta_nets_of_a_folder_are_the_files(name: str, tmp_path: Path) -> None:
    """Value heads that follow one another in the folder take turns in the file."""
    folder = recurrent_folder(tmp_path / "folder", name)
    convert(folder, tmp_path / "model.gguf", "f32")
    assert relative_error(reference(tmp_path / "model.gguf", FEW), reference(folder, FEW)) <= 1e-5
    before, after = open_source(folder).tensors, open_gguf(tmp_path / "model.gguf").tensors
    rates = [values(tensors["blk.0.ssm_a"]).tolist() for tensors in (before, after)]
    keys = MODELS[name]().keys["ssm.group_count"]
    tiled = np.reshape(rates[0], (keys, -1)).T.reshape(-1).tolist()
    assert rates[1] == (rates[0] if name == "qwen3next" else tiled)


def test_columns_of_blocks_change_places_whole_or_not_at_all() -> None:
    from localmoe.formats import FORMATS, Weight

    data = np.arange(2 * 4 * 34, dtype=np.uint16).astype(np.uint8)
    weight = Weight.whole("w", (2, 128), FORMATS["Q8_0"], data)
    turned = with_columns(lambda: weight, np.array([1, 0]), 64)
    assert (turned.slabs[0].reshape(2, 2, 68) == data.reshape(2, 2, 68)[:, ::-1]).all()
    with pytest.raises(UnsupportedError, match="'w' is Q8_0, of 32 columns a block; groups of 16"):
        with_columns(lambda: weight, np.arange(8), 16)
    with pytest.raises(FileFormatError, match="'w' has 128 columns, expected 96"):
        with_columns(lambda: weight, np.arange(3), 32)


def test_a_float8_folder_of_delta_nets_is_written_out_before_heads_take_turns(tmp_path: Path) -> None:
    folder = recurrent_folder(tmp_path / "folder", "qwen35")
    r, stored = np.random.default_rng(5), {}
    for name, array in folder_tensors(MODELS["qwen35"]()).items():
        if "proj" in name and "in_proj_a" not in name and "in_proj_b" not in name:
            parts, _ = float8((16, 16), "weight_scale_inv", "F32", lambda n: (-1,))(r, array.shape)  # type: ignore[arg-type]
            grid = tuple(-(-n // 16) for n in array.shape)
            stored[name] = plain(*reversed(parts["weight"]))
            stored[f"{name}_scale_inv"] = plain(parts["weight_scale_inv"][1].reshape(grid))
        else:
            stored[name] = plain(array)
    quantization = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [16, 16]}
    write(folder, stored, folder_settings(MODELS["qwen35"]()) | {"quantization_config": quantization})
    convert(folder, tmp_path / "model.gguf", "f32")
    assert relative_error(reference(tmp_path / "model.gguf", FEW), reference(folder, FEW)) <= 1e-5
