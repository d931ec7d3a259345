"""DeepSeek-V2, V3, R1, Mistral Large 3 and Small 4: latent attention in absorbed form, shared and routed experts.

DeepSeek-V2 (2024) section 2.1, DeepSeek-V3 (2024) section 2.1. Only the latent and one rope key per token are cached;
q is carried into the latent space by k_b, and the attended latent out of it by v_b.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from localmoe.arch.rope import Rope
from localmoe.errors import FileFormatError
from localmoe.formats import Weight
from localmoe.kernels.ops import Cache, Ops
from localmoe.kernels.program import RopeTable, Router, Temperature, Tensor
from localmoe.loader.checkpoint import Checkpoint
from localmoe.loader.metadata import Metadata

MODEL_TYPES = ("deepseek2", "mistral4")
GATING = {0: "softmax", 1: "softmax", 2: "sigmoid"}  # expert_gating_func; 0 and absent mean softmax


@dataclass(frozen=True)
class Config:
    block_count: int
    leading_dense_block_count: int
    embedding_length: int
    feed_forward_length: int
    head_count: int
    q_lora_rank: int
    kv_lora_rank: int
    nope_length: int
    rope_length: int
    value_length: int
    expert_count: int
    expert_feed_forward_length: int
    expert_shared_feed_forward_length: int
    router: Router
    scale: float
    temperature: Temperature | None
    rms_epsilon: float
    lora_rms_epsilon: float
    rope: Rope
    vocabulary: int

    @classmethod
    def read(cls, meta: Metadata) -> Config:
        rope = Rope.read(meta, meta.int("rope.dimension_count"), log_multiplier_unit=0.1)
        # With k_b and v_b apart, key_length and value_length describe the latent; the heads' own are the _mla keys.
        key = meta.int("attention.key_length_mla", meta.int("attention.key_length"))
        value = meta.int("attention.value_length_mla", meta.int("attention.value_length"))
        epsilon = meta.float("attention.layer_norm_rms_epsilon")
        expert_width = meta.int("expert_feed_forward_length", 0)
        meta.expect("attention.head_count_kv", 1, meta.int("attention.head_count"))
        return cls(
            block_count=meta.int("block_count") - meta.int("nextn_predict_layers", 0),
            leading_dense_block_count=meta.int("leading_dense_block_count", 0),
            embedding_length=meta.int("embedding_length"),
            feed_forward_length=meta.int("feed_forward_length"),
            head_count=meta.int("attention.head_count"),
            q_lora_rank=meta.int("attention.q_lora_rank", 0),
            kv_lora_rank=meta.int("attention.kv_lora_rank"),
            nope_length=key - rope.dimensions,
            rope_length=rope.dimensions,
            value_length=value,
            expert_count=meta.int("expert_count", 0),
            expert_feed_forward_length=expert_width,
            expert_shared_feed_forward_length=expert_width * meta.int("expert_shared_count", 0),
            router=read_router(meta),
            scale=key**-0.5 * rope.softmax_magnitude**2,
            temperature=read_temperature(meta),
            rms_epsilon=epsilon,
            lora_rms_epsilon=meta.float("attention.lora_norm_rms_epsilon", epsilon),
            rope=rope,
            vocabulary=meta.vocabulary,
        )


def read_router(meta: Metadata) -> Router:
    """V3 and Mistral 4 sum a group's two best biased scores, V2 takes its best; all mask the other groups out."""
    meta.expect("expert_gating_func", *GATING)
    # GLM-4.7-Flash is stored as deepseek2 without the key, and it is sigmoid (llama.cpp knows it by these sizes).
    glm_flash = meta.int("block_count") in (47, 48) and meta.vocabulary == 154880
    score = GATING[meta.int("expert_gating_func", 2 if glm_flash else 0)]
    older = meta.architecture == "deepseek2"
    return Router(
        score=score,
        used=meta.int("expert_used_count", 0),
        normalise=meta.bool("expert_weights_norm", False),
        scale=meta.float("expert_weights_scale", 1.0) or 1.0,
        groups=meta.int("expert_group_count", 1) or 1,
        groups_used=meta.int("expert_group_used_count", 1) or 1,
        group_score=meta.str("expert_group_score", "max" if older and score == "softmax" else "top2"),
    )


def read_temperature(meta: Metadata) -> Temperature | None:
    """Mistral Large 3 and Small 4 warm their queries with the position; the length is that of YaRN if not said."""
    scale = meta.float("attention.temperature_scale", 0.0)
    original = meta.int("rope.scaling.original_context_length", 0) if meta.architecture == "mistral4" else 0
    length = meta.int("attention.temperature_length", original)
    if scale and not length:
        raise FileFormatError(
            f"{meta.origin}: attention.temperature_length is 0 or missing, a number of tokens is expected"
        )
    return Temperature(scale, length) if scale else None


class Block(NamedTuple):
    attn_norm: Weight
    attn_q: Weight | None  # "lite" models project q at once
    attn_q_a: Weight | None
    attn_q_a_norm: Weight | None
    attn_q_b: Weight | None
    attn_kv_a: Weight
    attn_kv_a_norm: Weight
    attn_k_b: Weight  # (H, latent, nope), or (H, nope, latent) when cut from kv_b
    k_b_transposed: bool
    attn_v_b: Weight  # (H, value, latent)
    attn_output: Weight
    ffn_norm: Weight
    router: Weight | None
    router_bias: Weight | None
    gate: Weight
    up: Weight
    down: Weight
    shared: tuple[Weight, Weight, Weight] | None  # gate, up, down


class Weights(NamedTuple):
    embedding: Weight
    blocks: list[Block]
    norm: Weight
    output: Weight
    rope: RopeTable


def load(c: Config, get: Checkpoint) -> Weights:
    """Every tensor by name and shape; `attn_kv_b` of older files and of safetensors is cut into k_b and v_b without a
    copy."""
    embedding = get("token_embd", (c.vocabulary, c.embedding_length))
    return Weights(
        embedding=embedding,
        blocks=[load_block(c, get.scope(f"blk.{i}"), i >= c.leading_dense_block_count) for i in range(c.block_count)],
        norm=get("output_norm", (c.embedding_length,)),
        output=get.optional("output", (c.vocabulary, c.embedding_length)) or embedding,
        rope=c.rope.table("pairs"),
    )


def load_block(c: Config, at: Checkpoint, sparse: bool) -> Block:
    D, H, R, L = c.embedding_length, c.head_count, c.q_lora_rank, c.kv_lora_rank
    E, S = c.expert_count, c.expert_shared_feed_forward_length
    F = c.expert_feed_forward_length if sparse else c.feed_forward_length
    Q = H * (c.nope_length + c.rope_length)
    if split := at.has("attn_k_b"):
        k_b = at("attn_k_b", (H, L, c.nope_length))
        v_b = at("attn_v_b", (H, c.value_length, L))
    else:
        kv_b = at("attn_kv_b", (H * (c.nope_length + c.value_length), L)).matrices(H)
        k_b, v_b = kv_b.part(0, c.nope_length), kv_b.part(c.nope_length, c.nope_length + c.value_length)
    return Block(
        attn_norm=at("attn_norm", (D,)),
        attn_q=None if R else at("attn_q", (Q, D)),
        attn_q_a=at("attn_q_a", (R, D)) if R else None,
        attn_q_a_norm=at("attn_q_a_norm", (R,)) if R else None,
        attn_q_b=at("attn_q_b", (Q, R)) if R else None,
        attn_kv_a=at("attn_kv_a_mqa", (L + c.rope_length, D)),
        attn_kv_a_norm=at("attn_kv_a_norm", (L,)),
        attn_k_b=k_b,
        k_b_transposed=not split,
        attn_v_b=v_b,
        attn_output=at("attn_output", (D, H * c.value_length)),
        ffn_norm=at("ffn_norm", (D,)),
        router=at("ffn_gate_inp", (E, D)) if sparse else None,
        router_bias=at.optional("exp_probs_b", (E,), suffix="bias") if sparse else None,
        gate=at.experts("ffn_gate_exps", (E, F, D)) if sparse else at("ffn_gate", (F, D)),
        up=at.experts("ffn_up_exps", (E, F, D)) if sparse else at("ffn_up", (F, D)),
        down=at.experts("ffn_down_exps", (E, D, F)) if sparse else at("ffn_down", (D, F)),
        shared=(at("ffn_gate_shexp", (S, D)), at("ffn_up_shexp", (S, D)), at("ffn_down_shexp", (D, S)))
        if sparse and S
        else None,
    )


def forward(ops: Ops, c: Config, w: Weights, tokens: Tensor, cache: Cache) -> Tensor:
    """Token ids (T,) -> logits of the wanted rows (rows, V)."""
    x = ops.embed(w.embedding, tokens)  # (T, D)
    for b in w.blocks:
        x = ops.add(x, attend(ops, c, b, w.rope, ops.rms_norm(x, b.attn_norm, c.rms_epsilon), cache))
        h = ops.rms_norm(x, b.ffn_norm, c.rms_epsilon)
        x = ops.add(x, mix(ops, c, b, b.router, h) if b.router else feed(ops, h, b.gate, b.up, b.down))
    return ops.linear(ops.rms_norm(ops.logit_rows(x), w.norm, c.rms_epsilon), w.output)  # (rows, V)


def attend(ops: Ops, c: Config, b: Block, rope: RopeTable, x: Tensor, cache: Cache) -> Tensor:
    q, kv = project(ops, c, b, x)
    latent = ops.rms_norm(kv.columns(0, c.kv_lora_rank), b.attn_kv_a_norm, c.lora_rms_epsilon).heads(1)  # (T, 1, L)
    turned = ops.rope(
        kv.columns(c.kv_lora_rank, kv.shape[1]).heads(1), rope
    )  # (T, 1, rope), one for all heads, not normed
    layer = cache.append(ops.concat(latent, turned), value_prefix=c.kv_lora_rank)
    q = q.heads(c.head_count)
    carried = ops.head_linear(q.columns(0, c.nope_length), b.attn_k_b, transposed=b.k_b_transposed)  # (T, H, L)
    query = ops.concat(carried, ops.rope(q.columns(c.nope_length, q.shape[2]), rope))  # (T, H, L + rope)
    y = ops.attention(query, layer, scale=c.scale, temperature=c.temperature)  # (T, H, L)
    return ops.linear(ops.head_linear(y, b.attn_v_b).flat(), b.attn_output)


def project(ops: Ops, c: Config, b: Block, x: Tensor) -> tuple[Tensor, Tensor]:
    """x -> q (T, H · (nope + rope)) and the latent with its rope key (T, L + rope)."""
    if b.attn_q is not None:
        q, kv = ops.linears(x, (b.attn_q, b.attn_kv_a))
        return q, kv
    assert b.attn_q_a is not None and b.attn_q_b is not None
    q, kv = ops.linears(x, (b.attn_q_a, b.attn_kv_a))
    return ops.linear(ops.rms_norm(q, b.attn_q_a_norm, c.lora_rms_epsilon), b.attn_q_b), kv


def feed(ops: Ops, x: Tensor, gate: Weight, up: Weight, down: Weight) -> Tensor:
    opened, passed = ops.linears(x, (gate, up))  # (T, F)
    return ops.linear(ops.glu(opened, passed), down)


def mix(ops: Ops, c: Config, b: Block, router: Weight, x: Tensor) -> Tensor:
    ids, shares = ops.route(ops.linear(x, router, exact=True), c.router, b.router_bias)  # (T, k) each
    chosen = ops.experts(x, ids, shares, b.gate, b.up, b.down)
    return ops.add(chosen, feed(ops, x, *b.shared)) if b.shared else chosen
