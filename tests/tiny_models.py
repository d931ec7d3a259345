"""GGUF files of tiny models with random weights, a byte tokenizer and a chat template; knows nothing of the loader."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from gguf_writing import ARRAY, STRING, Tensor, Typed, write_gguf
from programs import Random, weight

CONTROL = ("<|user|>", "<|assistant|>", "<|end|>")
VOCABULARY = 257 + len(CONTROL)
END = VOCABULARY - 1
TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def byte_alphabet() -> list[str]:
    """GPT-2's printable character for each byte (Radford et al. 2019, encoder.py)."""
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    others = iter(range(256, 512))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


def vocabulary(template: str | None = TEMPLATE) -> dict[str, Any]:
    tokens = [*byte_alphabet(), "ab", *CONTROL]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": Typed(ARRAY, tokens, STRING),
        "tokenizer.ggml.token_type": [1] * 257 + [3] * len(CONTROL),
        "tokenizer.ggml.merges": ["a b"],
        "tokenizer.ggml.eos_token_id": END,
        **({"tokenizer.chat_template": template} if template else {}),
    }


def tensors(shapes: dict[str, tuple[int, ...]], matrices: str, random: Random) -> list[Tensor]:
    """Random tensors; those of two and more axes that are neither routers nor convolutions in the format `matrices`."""
    made = []
    for name, shape in shapes.items():
        format = matrices if len(shape) > 1 and not re.search("gate_inp|conv1d", name) else "F32"
        slabs = weight(random, shape, format).slabs
        made.append(Tensor(name, shape, format, b"".join(s.tobytes() for s in slabs)))
    return made


def qwen3moe(path: Path, *, format: str = "F32", seed: int = 0, **metadata: Any) -> Path:
    """2 blocks, hidden width 64, 4 heads of 16 over 2 kv-heads, 6 experts of width 32 of which 2 are chosen."""
    D, Q, K, d, E, F = 64, 64, 32, 16, 6, 32
    shapes: dict[str, tuple[int, ...]] = {"token_embd.weight": (VOCABULARY, D)}
    for i in range(2):
        shapes |= {
            f"blk.{i}.{name}.weight": shape
            for name, shape in {
                "attn_norm": (D,), "attn_q": (Q, D), "attn_k": (K, D), "attn_v": (K, D), "attn_output": (D, Q),
                "attn_q_norm": (d,), "attn_k_norm": (d,), "ffn_norm": (D,), "ffn_gate_inp": (E, D),
                "ffn_gate_exps": (E, F, D), "ffn_up_exps": (E, F, D), "ffn_down_exps": (E, D, F),
            }.items()
        }  # fmt: skip
    shapes |= {"output_norm.weight": (D,), "output.weight": (VOCABULARY, D)}
    sizes = {
        "block_count": 2, "context_length": 300, "embedding_length": D,
        "attention.head_count": 4, "attention.head_count_kv": 2,
        "attention.key_length": d, "attention.value_length": d, "attention.layer_norm_rms_epsilon": 1e-6,
        "expert_count": E, "expert_used_count": 2, "expert_feed_forward_length": F, "rope.freq_base": 10000.0,
    }  # fmt: skip
    return write(path, "qwen3moe", sizes, tensors(shapes, format, np.random.default_rng(seed)), metadata)


def deepseek2(path: Path, *, format: str = "F32", seed: int = 0, **metadata: Any) -> Path:
    """A dense and a sparse block: hidden width 64, 4 heads, latent of 32, rope key of 8; 3 of 8 experts, 1 shared."""
    D, H, L, R, N, W, E, F, M = 64, 4, 32, 8, 32, 32, 8, 32, 96
    shapes: dict[str, tuple[int, ...]] = {"token_embd.weight": (VOCABULARY, D)}
    for i in range(2):
        block: dict[str, tuple[int, ...]] = {
            "attn_norm": (D,), "attn_q": (H * (N + R), D), "attn_kv_a_mqa": (L + R, D), "attn_kv_a_norm": (L,),
            "attn_k_b": (H, L, N), "attn_v_b": (H, W, L), "attn_output": (D, H * W), "ffn_norm": (D,),
        }  # fmt: skip
        if i == 0:
            block |= {"ffn_gate": (M, D), "ffn_up": (M, D), "ffn_down": (D, M)}
        else:
            block |= {"ffn_gate_exps": (E, F, D), "ffn_up_exps": (E, F, D), "ffn_down_exps": (E, D, F)}
            block |= {
                "ffn_gate_inp": (E, D),
                "ffn_gate_shexp": (F, D),
                "ffn_up_shexp": (F, D),
                "ffn_down_shexp": (D, F),
            }
        shapes |= {f"blk.{i}.{name}.weight": shape for name, shape in block.items()}
    shapes |= {"output_norm.weight": (D,), "output.weight": (VOCABULARY, D)}
    sizes = {
        "block_count": 2, "context_length": 300, "embedding_length": D,
        "feed_forward_length": M, "leading_dense_block_count": 1,
        "attention.head_count": H, "attention.head_count_kv": 1, "attention.kv_lora_rank": L,
        "attention.key_length": L + R, "attention.value_length": L,
        "attention.key_length_mla": N + R, "attention.value_length_mla": W, "rope.dimension_count": R,
        "attention.layer_norm_rms_epsilon": 1e-6, "expert_count": E, "expert_used_count": 3,
        "expert_shared_count": 1,
        "expert_feed_forward_length": F, "expert_gating_func": 2, "expert_weights_norm": True,
        "expert_weights_scale": 2.5,
    }  # fmt: skip
    return write(path, "deepseek2", sizes, tensors(shapes, format, np.random.default_rng(seed)), metadata)


def qwen3next(path: Path, *, format: str = "F32", seed: int = 0, **metadata: Any) -> Path:
    """Delta nets in the first three of 4 blocks, 2 key heads of 32 and 4 value heads of 32; else as `qwen3moe`, with a
    shared expert."""
    D, Q, K, d, E, F, heads, values = 64, 64, 32, 16, 6, 32, 2, 4
    channels = 2 * heads * 32 + values * 32
    shapes: dict[str, tuple[int, ...]] = {"token_embd.weight": (VOCABULARY, D)}
    for i in range(4):
        block: dict[str, tuple[int, ...]] = {
            "attn_norm": (D,), "post_attention_norm": (D,), "ffn_gate_inp": (E, D), "ffn_gate_exps": (E, F, D),
            "ffn_up_exps": (E, F, D), "ffn_down_exps": (E, D, F), "ffn_gate_inp_shexp": (D,), "ffn_gate_shexp": (F, D),
            "ffn_up_shexp": (F, D), "ffn_down_shexp": (D, F),
        }  # fmt: skip
        if i == 3:
            block |= {"attn_q": (2 * Q, D), "attn_k": (K, D), "attn_v": (K, D), "attn_output": (D, Q)}
            block |= {"attn_q_norm": (d,), "attn_k_norm": (d,)}
        else:
            block |= {"attn_qkv": (channels, D), "attn_gate": (128, D), "ssm_ba": (2 * values, D), "ssm_out": (D, 128)}
            block |= {"ssm_norm": (32,)}
            shapes |= {f"blk.{i}.ssm_dt.bias": (values,), f"blk.{i}.ssm_a": (values,)}
            shapes |= {f"blk.{i}.ssm_conv1d.weight": (channels, 4)}
        shapes |= {f"blk.{i}.{name}.weight": shape for name, shape in block.items()}
    shapes |= {"output_norm.weight": (D,), "output.weight": (VOCABULARY, D)}
    sizes = {
        "block_count": 4, "context_length": 300, "embedding_length": D,
        "attention.head_count": 4, "attention.head_count_kv": 2,
        "attention.key_length": d, "attention.value_length": d, "attention.layer_norm_rms_epsilon": 1e-6,
        "expert_count": E, "expert_used_count": 2, "expert_feed_forward_length": F,
        "expert_shared_feed_forward_length": F, "rope.freq_base": 10000.0, "rope.dimension_count": 8,
        "ssm.conv_kernel": 4, "ssm.state_size": 32, "ssm.group_count": heads, "ssm.time_step_rank": values,
        "ssm.inner_size": 128,
    }  # fmt: skip
    made = tensors(shapes, format, np.random.default_rng(seed))
    decaying = np.float32([-0.01, -0.1, -1, -3]).tobytes()
    made = [replace(t, data=decaying) if t.name.endswith("ssm_a") else t for t in made]
    return write(path, "qwen3next", sizes, made, metadata)


def write(path: Path, architecture: str, sizes: dict[str, Any], made: list[Tensor], metadata: dict[str, Any]) -> Path:
    head = {"general.architecture": architecture, **{f"{architecture}.{key}": value for key, value in sizes.items()}}
    return write_gguf(path, {**head, **(metadata or vocabulary())}, made)
