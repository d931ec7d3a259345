"""Tiny random models of each family, as GGUF keys and tensors, beside the formula that they should follow."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from families import in_memory
from paper import Formula, plain_frequencies, yarn_frequencies, yarn_magnitude

from localmoe.loader.source import Source
from localmoe.network import Network

D, H, K, d, F, E, V, S = 64, 4, 2, 24, 32, 12, 61, 64  # a head's 24 is not D / H
L, R, NOPE, TURN, VALUE = 32, 32, 16, 8, 32  # latent, q's rank, a key's two parts, a value
BASE, FACTOR, ORIGINAL, MSCALE = 10000.0, 8.0, 8, 0.7
IDS = np.random.default_rng(7).integers(0, V, 28).tolist()


@dataclass(frozen=True)
class Tiny:
    """Keys without the architecture's prefix; `tensors` have attn_kv_b whole, as the formula wants it."""

    architecture: str
    keys: Mapping[str, Any]
    tensors: Mapping[str, np.ndarray]
    formula: Formula

    def source(self, formats: Any = lambda name: "F32") -> Source:
        metadata = {f"{self.architecture}.{name}": value for name, value in self.keys.items()}
        return in_memory({"general.architecture": self.architecture, **metadata}, self.tensors, formats=formats)

    def network(self) -> Network:
        return Network(self.source())

    def with_keys(self, **keys: Any) -> Tiny:
        """Keys changed (dots as __), those of None left out."""
        changed = {**self.keys, **{name.replace("__", "."): value for name, value in keys.items()}}
        return replace(self, keys={name: value for name, value in changed.items() if value is not None})

    def with_tensors(self, tensors: Mapping[str, np.ndarray]) -> Tiny:
        return replace(self, tensors=tensors)

    def following(self, **changes: Any) -> Tiny:
        return replace(self, formula=replace(self.formula, **changes))


def random_tensors(shapes: Mapping[str, tuple[int, ...]], seed: int = 1) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)

    def drawn(name: str, shape: tuple[int, ...]) -> np.ndarray:
        noise = rng.standard_normal(shape)
        if "norm" in name:
            return 1 + 0.4 * noise
        if "exp_probs_b" in name:
            return 0.3 * noise - 1.5  # so low that every biased score is negative
        if "bias" in name or name == "token_embd.weight":
            return noise
        return noise * 1.5 / shape[-1] ** 0.5

    return {name: drawn(name, shape).astype(np.float32) for name, shape in shapes.items()}


def tensors(block: Mapping[str, tuple[int, ...]], blocks: int = 2, *dense: int) -> dict[str, np.ndarray]:
    """`block` in every block, but a plain feed-forward for experts in the blocks of `dense`."""
    shapes: dict[str, tuple[int, ...]] = {
        "token_embd.weight": (V, D),
        "output_norm.weight": (D,),
        "output.weight": (V, D),
    }
    for i in range(blocks):
        for name, shape in {"attn_norm.weight": (D,), "ffn_norm.weight": (D,), **block}.items():
            if i not in dense or not name.startswith(("ffn_", "exp_")) or name == "ffn_norm.weight":
                shapes[f"blk.{i}.{name}"] = shape
        if i in dense:
            shapes |= {f"blk.{i}.{name}": shape for name, shape in FEED.items()}
    return random_tensors(shapes)


ATTENTION = {
    "attn_q.weight": (H * d, D), "attn_k.weight": (K * d, D), "attn_v.weight": (K * d, D),
    "attn_output.weight": (D, H * d),
}  # fmt: skip
BIASES = {"attn_q.bias": (H * d,), "attn_k.bias": (K * d,), "attn_v.bias": (K * d,)}
HEAD_NORMS = {"attn_q_norm.weight": (d,), "attn_k_norm.weight": (d,)}
FULL_NORMS = {"attn_q_norm.weight": (H * d,), "attn_k_norm.weight": (K * d,)}
FEED = {"ffn_gate.weight": (F, D), "ffn_up.weight": (F, D), "ffn_down.weight": (D, F)}
EXPERTS = {
    "ffn_gate_inp.weight": (E, D), "ffn_gate_exps.weight": (E, F, D), "ffn_up_exps.weight": (E, F, D),
    "ffn_down_exps.weight": (E, D, F),
}  # fmt: skip
SHARED = {"ffn_gate_shexp.weight": (S, D), "ffn_up_shexp.weight": (S, D), "ffn_down_shexp.weight": (D, S)}
Q_LORA = {"attn_q_a.weight": (R, D), "attn_q_a_norm.weight": (R,), "attn_q_b.weight": (H * (NOPE + TURN), R)}
Q_LITE = {"attn_q.weight": (H * (NOPE + TURN), D)}
LATENT = {
    "attn_kv_a_mqa.weight": (L + TURN, D), "attn_kv_a_norm.weight": (L,), "attn_kv_b.weight": (H * (NOPE + VALUE), L),
    "attn_output.weight": (D, H * VALUE),
}  # fmt: skip
COMMON = {
    "block_count": 2, "context_length": 64, "embedding_length": D, "feed_forward_length": F, "vocab_size": V,
    "attention.head_count": H, "attention.head_count_kv": K, "attention.key_length": d, "attention.value_length": d,
    "attention.layer_norm_rms_epsilon": 1e-5, "rope.dimension_count": d, "rope.freq_base": BASE,
}  # fmt: skip
CHOSEN = {"expert_count": E, "expert_used_count": 3}
MOE = {**CHOSEN, "expert_feed_forward_length": F}
PLAIN = Formula(2, H, K, d, plain_frequencies(d, BASE), d**-0.5, biased=False)
MLA_KEYS = {
    **COMMON, **MOE, "attention.head_count_kv": H, "attention.key_length": NOPE + TURN, "attention.value_length": VALUE,
    "attention.kv_lora_rank": L, "rope.dimension_count": TURN, "leading_dense_block_count": 1,
    "expert_shared_count": 2, "attention.layer_norm_rms_epsilon": 1e-2,
}  # fmt: skip
YARN = {
    "rope.scaling.type": "yarn", "rope.scaling.factor": FACTOR, "rope.scaling.original_context_length": ORIGINAL,
    "rope.scaling.yarn_log_multiplier": 0.1 * MSCALE,
}  # fmt: skip
MLA = Formula(
    2, H, H, NOPE + TURN, plain_frequencies(TURN, BASE), (NOPE + TURN) ** -0.5, 1e-2, "pairs", used=3, shared="plain",
    latent=L, nope=NOPE, latent_epsilon=1e-2,
)  # fmt: skip


def llama() -> Tiny:
    """Interleaved, as every GGUF file of this family."""
    return Tiny("llama", COMMON, tensors({**ATTENTION, **FEED}), replace(PLAIN, layout="pairs"))


def mistral() -> Tiny:
    return llama().with_keys(attention__sliding_window=5).following(window=5)


def mixtral() -> Tiny:
    formula = replace(PLAIN, layout="pairs", used=3, normalise=True)
    return Tiny("llama", {**COMMON, **CHOSEN}, tensors({**ATTENTION, **EXPERTS}), formula)


def qwen2() -> Tiny:
    return Tiny("qwen2", COMMON, tensors({**ATTENTION, **BIASES, **FEED}), replace(PLAIN, biased=True))


def qwen2moe() -> Tiny:
    keys = {**COMMON, **MOE, "expert_shared_feed_forward_length": S}
    gate = {"ffn_gate_inp_shexp.weight": (D,)}  # one axis, as llama.cpp's converter writes it
    made = tensors({**ATTENTION, **BIASES, **EXPERTS, **SHARED, **gate})
    return Tiny("qwen2moe", keys, made, replace(PLAIN, biased=True, used=3, shared="gated"))


def qwen3() -> Tiny:
    return Tiny("qwen3", COMMON, tensors({**ATTENTION, **HEAD_NORMS, **FEED}), replace(PLAIN, head_norm="head"))


def qwen3moe() -> Tiny:
    formula = replace(PLAIN, head_norm="head", used=3, normalise=True)
    return Tiny("qwen3moe", {**COMMON, **MOE}, tensors({**ATTENTION, **HEAD_NORMS, **EXPERTS}), formula)


def olmoe() -> Tiny:
    made = tensors({**ATTENTION, **FULL_NORMS, **EXPERTS})
    return Tiny("olmoe", {**COMMON, **CHOSEN}, made, replace(PLAIN, head_norm="full", used=3))


def deepseek_lite() -> Tiny:
    """V2-Lite in an old file: no rank for q, no groups, no key for the gating."""
    made = tensors({**Q_LITE, **LATENT, **EXPERTS, **SHARED}, 2, 0)
    return Tiny("deepseek2", MLA_KEYS, made, MLA)


def deepseek_v2() -> Tiny:
    """Groups by their best expert, shares times a factor and not renormalised; plain rope."""
    keys = {
        "expert_group_count": 4,
        "expert_group_used_count": 2,
        "expert_weights_scale": 16.0,
        "attention.q_lora_rank": R,
    }
    made = tensors({**Q_LORA, **LATENT, **EXPERTS, **SHARED}, 2, 0)
    return Tiny("deepseek2", {**MLA_KEYS, **keys}, made, replace(MLA, groups=4, groups_used=2, share_scale=16.0))


def deepseek_v3() -> Tiny:
    """Sigmoid, bias, groups by their best two, renormalised; YaRN in the frequencies and in the softmax scale."""
    keys = {
        **YARN, "expert_group_count": 4, "expert_group_used_count": 2, "expert_weights_scale": 2.5,
        "expert_weights_norm": True, "expert_gating_func": 2, "attention.q_lora_rank": R,
    }  # fmt: skip
    made = tensors({**Q_LORA, **LATENT, **EXPERTS, **SHARED, "exp_probs_b.bias": (E,)}, 2, 0)
    formula = replace(
        MLA, groups=4, groups_used=2, group_score="top2", share_scale=2.5, score="sigmoid", normalise=True,
        frequencies=yarn_frequencies(TURN, BASE, FACTOR, ORIGINAL),
        scale=(NOPE + TURN) ** -0.5 * yarn_magnitude(FACTOR, MSCALE) ** 2,
    )  # fmt: skip
    return Tiny("deepseek2", {**MLA_KEYS, **keys}, made, formula)


def mistral_large() -> Tiny:
    """Mistral Large 3: a softmax router that is renormalised, and queries that warm with the position."""
    keys = {
        **YARN, "expert_weights_norm": True, "expert_gating_func": 1, "expert_group_count": 1,
        "expert_group_used_count": 1, "attention.q_lora_rank": R, "attention.temperature_scale": 0.4,
        "attention.temperature_length": 6,
    }  # fmt: skip
    made = tensors({**Q_LORA, **LATENT, **EXPERTS, **SHARED}, 2, 0)
    formula = replace(deepseek_v3().formula, groups=1, groups_used=1, share_scale=1.0, score="softmax")
    return Tiny("deepseek2", {**MLA_KEYS, **keys}, made, replace(formula, temperature=(0.4, 6, 0)))


def mistral4() -> Tiny:
    """Mistral Small 4: llama.cpp's converter and graph are those of Mistral Large 3."""
    return replace(mistral_large(), architecture="mistral4")


def split_heads(tiny: Tiny) -> Tiny:
    """The newer form of a deepseek2 file: k_b and v_b apart, k_b transposed, keys that describe the latent."""
    made = dict(tiny.tensors)
    for name in [name for name in made if "attn_kv_b" in name]:
        heads = made.pop(name).reshape(H, NOPE + VALUE, L)
        made[name.replace("kv_b", "k_b")] = np.ascontiguousarray(heads[:, :NOPE].transpose(0, 2, 1))
        made[name.replace("kv_b", "v_b")] = np.ascontiguousarray(heads[:, NOPE:])
    latent = {"attention__head_count_kv": 1, "attention__key_length": L + TURN, "attention__value_length": L}
    apart = {"attention__key_length_mla": NOPE + TURN, "attention__value_length_mla": VALUE}
    return tiny.with_tensors(made).with_keys(**latent, **apart)


MODELS = {
    f.__name__: f
    for f in (
        llama, mistral, mixtral, qwen2, qwen2moe, qwen3, qwen3moe, olmoe, deepseek_lite, deepseek_v2, deepseek_v3,
        mistral_large, mistral4,
    )
}  # fmt: skip
