"""A model of DeepSeek-R1's shape, 400 GB of which the disk holds the header alone; knows nothing of the loader."""

from __future__ import annotations

from pathlib import Path

from gguf_writing import ARRAY, STRING, Tensor, Typed, write_sparse
from tiny_models import byte_alphabet

HIDDEN, VOCABULARY, BLOCKS, DENSE_BLOCKS = 7168, 129280, 61, 3
HEADS, QUERY, LATENT, ROPE, NOPE, VALUE = 128, 1536, 512, 64, 128, 128
EXPERTS, USED, WIDTH, DENSE_WIDTH = 256, 8, 2048, 18432
TOTAL, ACTIVE = 671_026_419_200, 37_552_297_472  # of its model card: 671B, 37B


def deepseek_r1(path: Path) -> Path:
    """Formats as in Q4_K_M files: Q6_K for half of the experts' down matrices, Q8_0 for the short rows of latent heads,
    F32 for norms and routers, Q4_K for all else."""
    shapes: dict[str, tuple[int, ...]] = {
        "token_embd.weight": (VOCABULARY, HIDDEN),
        "output_norm.weight": (HIDDEN,),
        "output.weight": (VOCABULARY, HIDDEN),
    }
    for i in range(BLOCKS):
        block: dict[str, tuple[int, ...]] = {
            "attn_norm": (HIDDEN,), "ffn_norm": (HIDDEN,),
            "attn_q_a": (QUERY, HIDDEN), "attn_q_a_norm": (QUERY,), "attn_q_b": (HEADS * (NOPE + ROPE), QUERY),
            "attn_kv_a_mqa": (LATENT + ROPE, HIDDEN), "attn_kv_a_norm": (LATENT,),
            "attn_k_b": (HEADS, LATENT, NOPE), "attn_v_b": (HEADS, VALUE, LATENT),
            "attn_output": (HIDDEN, HEADS * VALUE),
        }  # fmt: skip
        if i < DENSE_BLOCKS:
            block |= {"ffn_gate": (DENSE_WIDTH, HIDDEN), "ffn_up": (DENSE_WIDTH, HIDDEN)}
            block |= {"ffn_down": (HIDDEN, DENSE_WIDTH)}
        else:
            block |= {"ffn_gate_inp": (EXPERTS, HIDDEN), "ffn_gate_exps": (EXPERTS, WIDTH, HIDDEN)}
            block |= {"ffn_up_exps": (EXPERTS, WIDTH, HIDDEN), "ffn_down_exps": (EXPERTS, HIDDEN, WIDTH)}
            block |= {"ffn_gate_shexp": (WIDTH, HIDDEN), "ffn_up_shexp": (WIDTH, HIDDEN)}
            block |= {"ffn_down_shexp": (HIDDEN, WIDTH)}
            shapes[f"blk.{i}.exp_probs_b.bias"] = (EXPERTS,)
        shapes |= {f"blk.{i}.{name}.weight": shape for name, shape in block.items()}

    def stored(name: str, shape: tuple[int, ...]) -> str:
        if len(shape) == 1 or name.endswith("gate_inp.weight"):
            return "F32"
        if name.endswith("ffn_down_exps.weight") and int(name.split(".")[1]) % 2:
            return "Q6_K"
        return "Q8_0" if name.endswith("k_b.weight") else "Q4_K"

    tensors = [Tensor(name, shape, stored(name, shape)) for name, shape in shapes.items()]
    return write_sparse(path, metadata(), tensors)


def metadata() -> dict[str, object]:
    """Keys as llama.cpp's converter writes them, with a vocabulary and merges of that size."""
    sizes: dict[str, object] = {
        "block_count": BLOCKS, "context_length": 163840, "embedding_length": HIDDEN, "feed_forward_length": DENSE_WIDTH,
        "leading_dense_block_count": DENSE_BLOCKS, "attention.head_count": HEADS, "attention.head_count_kv": 1,
        "attention.q_lora_rank": QUERY, "attention.kv_lora_rank": LATENT, "attention.key_length": LATENT + ROPE,
        "attention.value_length": LATENT, "attention.key_length_mla": NOPE + ROPE, "attention.value_length_mla": VALUE,
        "attention.layer_norm_rms_epsilon": 1e-6, "rope.dimension_count": ROPE, "rope.freq_base": 10000.0,
        "rope.scaling.type": "yarn", "rope.scaling.factor": 40.0, "rope.scaling.original_context_length": 4096,
        "rope.scaling.yarn_log_multiplier": 0.1, "vocab_size": VOCABULARY, "expert_count": EXPERTS,
        "expert_used_count": USED, "expert_shared_count": 1, "expert_feed_forward_length": WIDTH,
        "expert_group_count": 8, "expert_group_used_count": 4, "expert_gating_func": 2, "expert_weights_norm": True,
        "expert_weights_scale": 2.5,
    }  # fmt: skip
    tokens = [*byte_alphabet(), *(f"t{i}" for i in range(VOCABULARY - 256))]
    merges = [f"t{i} t{i + 1}" for i in range(VOCABULARY - 2000)]
    return {
        "general.architecture": "deepseek2",
        "general.name": "DeepSeek R1, a hole",
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "deepseek-v3",
        "tokenizer.ggml.tokens": Typed(ARRAY, tokens, STRING),
        "tokenizer.ggml.token_type": [1] * VOCABULARY,
        "tokenizer.ggml.merges": Typed(ARRAY, merges, STRING),
        "tokenizer.ggml.eos_token_id": 1,
        **{f"deepseek2.{key}": found for key, found in sizes.items()},
    }
