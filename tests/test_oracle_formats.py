"""Folders of 8-bit floats, packed by torch, against transformers with the matrices that torch unpacks."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pytest
from oracle_cases import CASES, VOCABULARY
from test_oracle import SEEDS, TOKENS, compare, random_model, transformers

from localmoe.loader.locate import open_source
from localmoe.model import Network

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
