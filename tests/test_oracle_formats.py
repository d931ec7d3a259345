"""Folders of 8-bit floats, packed by torch, against transformers with the matrices that torch unpacks."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pytest
from native_names import native
from oracle_cases import CASES, VOCABULARY, latent, yarn
from test_oracle import SEEDS, TOKENS, compare, random_model, transformers

from localmoe.loader.locate import open_source
from localmoe.loader.mistral import LATENT
from localmoe.network import Network

pytestmark = pytest.mark.oracle
__all__ = ["transformers"]  # the fixture


def float8(weight: Any, tile: tuple[int, int]) -> tuple[Any, Any, Any]:
    """A matrix as 8-bit floats and the scale of each tile, by its largest value, with what they stand for."""
    import torch

    rows, columns = weight.shape
    height, width = min(tile[0], rows), min(tile[1], columns)
    grid = (-(-rows // height), -(-columns // width))
    scales = torch.empty(grid)
    for i in range(grid[0]):
        for j in range(grid[1]):
            piece = weight[i * height : (i + 1) * height, j * width : (j + 1) * width]
            scales[i, j] = piece.abs().max().clamp(min=1e-6) / 448
    wide = scales.repeat_interleave(height, 0)[:rows].repeat_interleave(width, 1)[:, :columns]
    stored = (weight / wide).to(torch.float8_e4m3fn)
    return stored, scales, stored.float() * wide


@pytest.mark.parametrize("tile", [(128, 128), (16, 16), (1, 1 << 20), (1 << 20, 1 << 20)], ids=str)
@pytest.mark.parametrize("seed", SEEDS)
def test_deepseek_v3_in_8_bit_floats_is_what_torch_unpacks(
    seed: int, tile: tuple[int, int], transformers: Any, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    r = Random(seed)
    settings = CASES["deepseek-v3"].settings(r, "yarn") | {"tie_word_embeddings": False}
    model = random_model(transformers, transformers.DeepseekV3Config(**settings), 3 * seed)
    model.save_pretrained(tmp_path)
    named = load_file(tmp_path / "model.safetensors")
    unpacked: dict[str, Any] = {}
    for name in [name for name in named if "_proj" in name]:
        stored, scales, unpacked[name] = float8(named[name], tile)
        suffix = "_scale_inv" if tile[1] < 1 << 20 else "_scale"
        named |= {name: stored, name + suffix: scales}
    save_file(named, tmp_path / "model.safetensors")
    full = tmp_path / "full"
    model.config.save_pretrained(full)
    save_file(named | unpacked, full / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((tmp_path / "config.json").read_text())
    quantization = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic"}
    if tile[1] < 1 << 20:
        quantization["weight_block_size"] = list(tile)  # type: ignore[assignment]
    (tmp_path / "config.json").write_text(json.dumps(config | {"quantization_config": quantization}))
    right = transformers.DeepseekV3ForCausalLM.from_pretrained(
        full, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    compare(Network(open_source(tmp_path)), right, [r.randrange(VOCABULARY) for _ in range(TOKENS)], record_property)


@pytest.mark.parametrize("apply_scale", [False, True])
@pytest.mark.parametrize("seed", SEEDS)
def test_mistral_large_3_in_its_own_form_is_mistral_4(
    seed: int, apply_scale: bool, transformers: Any, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    """params.json and consolidated names, 8-bit floats with a scale a matrix; yarn with and without its magnitudes."""
    import torch
    from safetensors.torch import save_file

    r = Random(seed)
    settings = latent(r, "plain", True) | {"n_routed_experts": 10, "num_experts_per_tok": 4, "n_shared_experts": 1}
    partial = settings["qk_rope_head_dim"] / (settings["qk_nope_head_dim"] + settings["qk_rope_head_dim"])
    rope = yarn(r, beta_fast=32.0, beta_slow=1.0)
    rope |= {"mscale": 1.0, "mscale_all_dim": 1.0} if apply_scale else {"attention_factor": 1.0}
    warm = {"rope_theta": 10000.0, "llama_4_scaling_beta": 0.1, "partial_rotary_factor": partial}
    fixed = {"rms_norm_eps": 1e-6, "routed_scaling_factor": 1.0, "tie_word_embeddings": False}
    config = transformers.Mistral4Config(**settings | fixed | {"rope_parameters": rope | warm})
    if not apply_scale:
        config.rope_parameters |= {"mscale": 0.0, "mscale_all_dim": 0.0}
    model = random_model(transformers, config, 3 * seed)
    stored: dict[str, Any] = {}

    def quantise(name: str, weight: Any) -> Any:
        packed, scale, exact = float8(weight, (1 << 20, 1 << 20))
        head = native(f"{name}.weight").removesuffix("weight")
        stored.update({f"{head}weight": packed, f"{head}qscale_weight": scale.reshape(())})
        stored[f"{head}qscale_act"] = torch.ones(())
        return exact

    with torch.no_grad():
        for name, weight in model.named_parameters():
            head = name.removesuffix(".weight")
            if name.endswith(("gate_up_proj", "down_proj")) and weight.dim() == 3:
                for e in range(len(weight)):
                    parts = ("gate_proj", "up_proj") if "gate_up" in name else ("down_proj",)
                    place = f"{name.rpartition('.')[0]}.{e}"
                    halves = [
                        quantise(f"{place}.{p}", w) for p, w in zip(parts, weight[e].chunk(len(parts)), strict=True)
                    ]
                    weight[e].copy_(torch.cat(halves))
            elif "_proj" in name:
                weight.copy_(quantise(head, weight))
            else:
                stored[native(name)] = weight.clone()
    c, original = model.config, rope["original_max_position_embeddings"]
    params = {
        "dim": c.hidden_size, "n_layers": c.num_hidden_layers, "n_heads": c.num_attention_heads, "norm_eps": 1e-6,
        "n_kv_heads": c.num_key_value_heads, "hidden_dim": c.intermediate_size, "vocab_size": c.vocab_size,
        "rope_theta": 10000.0, "max_position_embeddings": c.max_position_embeddings, "head_dim": 3,
        **{name: getattr(c, name) for name in LATENT}, "tied_embeddings": False,
        "yarn": {
            "factor": rope["factor"], "original_max_position_embeddings": original, "beta": 32, "alpha": 1,
            "apply_scale": apply_scale,
        },
        "llama_4_scaling": {"beta": 0.1, "original_max_position_embeddings": original},
        "quantization": {"qformat_weight": "fp8_e4m3", "qscheme_act": "TENSOR"},
        "moe": {
            "num_experts": 10, "num_experts_per_tok": 4, "num_shared_experts": 1, "routed_scale": 1.0,
            "expert_hidden_dim": c.moe_intermediate_size, "first_k_dense_replace": c.first_k_dense_replace,
        },
    }  # fmt: skip
    (tmp_path / "params.json").write_text(json.dumps(params))
    save_file(stored, tmp_path / "consolidated.safetensors")
    compare(Network(open_source(tmp_path)), model, [r.randrange(VOCABULARY) for _ in range(TOKENS)], record_property)
