"""A tiny GGUF file of each block type that few files use runs as the floats run that its blocks stand for."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
from families import logits, relative_error
from gguf_writing import Tensor, gguf_bytes
from kernel_calls import random_rows

from localmoe.formats import FORMATS
from localmoe.kernels.reference_weights import dequantise
from localmoe.loader.gguf import open_gguf
from localmoe.network import Network

WIDTH, VOCABULARY = 256, 40
KEYS = {
    "general.architecture": "llama", "llama.block_count": 1, "llama.context_length": 64, "llama.vocab_size": VOCABULARY,
    "llama.embedding_length": WIDTH, "llama.feed_forward_length": 512, "llama.attention.head_count": 4,
    "llama.attention.head_count_kv": 2, "llama.attention.layer_norm_rms_epsilon": 1e-5, "llama.rope.freq_base": 1e4,
}  # fmt: skip
SHAPES = {
    "token_embd": (VOCABULARY, WIDTH), "output": (VOCABULARY, WIDTH), "blk.0.attn_q": (WIDTH, WIDTH),
    "blk.0.attn_k": (WIDTH // 2, WIDTH), "blk.0.attn_v": (WIDTH // 2, WIDTH), "blk.0.attn_output": (WIDTH, WIDTH),
    "blk.0.ffn_gate": (512, WIDTH), "blk.0.ffn_up": (512, WIDTH), "blk.0.ffn_down": (WIDTH, 512),
}  # fmt: skip
IDS = [int(i) for i in np.random.default_rng(3).integers(0, VOCABULARY, 11)]


def network(path: Path, tensors: list[Tensor]) -> Network:
    ones = np.ones(WIDTH, np.float32).tobytes()
    norms = [Tensor(f"{n}.weight", (WIDTH,), data=ones) for n in ("output_norm", "blk.0.attn_norm", "blk.0.ffn_norm")]
    path.write_bytes(gguf_bytes(KEYS, [*tensors, *norms]))
    return Network(open_gguf(path))


@pytest.mark.parametrize("name", ["Q8_K", "TQ1_0", "TQ2_0", "Q1_0", "Q2_0", "NVFP4", "MXFP4"])
def test_every_block_type_runs_from_a_file(name: str, tmp_path: Path) -> None:
    random = np.random.default_rng(5)
    packed, floats = [], []
    for tensor, shape in SHAPES.items():
        blocks = random_rows(name, *shape, random)
        if name == "NVFP4":
            blocks.reshape(-1, 36)[:, :4] = random.integers(20, 40, (blocks.size // 36, 4))
        packed.append(Tensor(f"{tensor}.weight", shape, name, blocks.tobytes()))
        if name in ("Q8_K", "Q1_0", "Q2_0"):  # the gguf package has no arithmetic for these
            values = dequantise(blocks.reshape(-1), FORMATS[name])
        else:
            values = gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType[name])
        floats.append(Tensor(f"{tensor}.weight", shape, data=np.asarray(values, np.float32).tobytes()))
    right = logits(network(tmp_path / "floats.gguf", floats), IDS)
    found = network(tmp_path / "packed.gguf", packed)
    assert relative_error(logits(found, IDS), right) <= 5e-6
    for chunk in (0, 1):
        bound = 3e-2 if name == "MXFP4" else 3e-5  # its kernels round activations to 8 bits
        assert relative_error(logits(found, IDS, "cpu", chunk), right) <= bound
