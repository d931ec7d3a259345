"""DeepSeek-V3.2 and GLM-5: latent attention over those positions alone that an indexer with keys of its own chooses.

DeepSeek-V3.2 (2025), section 2.1; the latent in absorbed form as in DeepSeek-V2 (2024), section 2.1. In GLM-5.2 most
layers share the choice of an earlier one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from localmoe.arch.rope import Rope
from localmoe.errors import FileFormatError
from localmoe.formats import Weight
from localmoe.kernels.ops import Cache, Ops
from localmoe.kernels.program import RopeTable, Router, Tensor
from localmoe.loader.checkpoint import Checkpoint
from localmoe.loader.metadata import Metadata

MODEL_TYPES = ("deepseek32", "glm-dsa")
INDEXER_EPSILON = 1e-6  # of its layer norm, whatever the other norms have (DeepSeek's and transformers' code)


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
    indexer_heads: int
    indexer_length: int
    indexer_top_k: int
    indexer_layout: str  # of its rope's pairs
    indexed: tuple[bool, ...] | None  # layers with an indexer of their own; None: as the tensors say
    expert_count: int
    expert_feed_forward_length: int
    expert_shared_feed_forward_length: int
    router: Router
    scale: float
    rms_epsilon: float
    lora_rms_epsilon: float
    rope: Rope
    vocabulary: int

    @classmethod
    def read(cls, meta: Metadata) -> Config:
        glm = meta.architecture == "glm-dsa"
        rope = Rope.read(meta, meta.int("rope.dimension_count"), log_multiplier_unit=0.1)
        # With k_b and v_b apart, key_length and value_length describe the latent; the heads' own are the _mla keys.
        key = meta.int("attention.key_length_mla", meta.int("attention.key_length"))
        value = meta.int("attention.value_length_mla", meta.int("attention.value_length"))
        epsilon, width = meta.float("attention.layer_norm_rms_epsilon"), meta.int("expert_feed_forward_length")
        blocks = meta.int("block_count") - meta.int("nextn_predict_layers", 0)
        meta.expect("attention.head_count_kv", 1, meta.int("attention.head_count"))
        meta.expect("expert_gating_func", 2, absent_ok=glm)
        indexer_length = meta.int("attention.indexer.key_length")
        if indexer_length < rope.dimensions or not meta.int("attention.indexer.top_k"):
            raise FileFormatError(
                f"{meta.origin}: an indexer with keys of {indexer_length} that chooses "
                f"{meta.int('attention.indexer.top_k')} is not possible; keys of at least {rope.dimensions} and 1 are"
            )
        types = "attention.indexer.types"
        return cls(
            block_count=blocks,
            leading_dense_block_count=meta.int("leading_dense_block_count", 0),
            embedding_length=meta.int("embedding_length"),
            feed_forward_length=meta.int("feed_forward_length"),
            head_count=meta.int("attention.head_count"),
            q_lora_rank=meta.int("attention.q_lora_rank"),
            kv_lora_rank=meta.int("attention.kv_lora_rank"),
            nope_length=key - rope.dimensions,
            rope_length=rope.dimensions,
            value_length=value,
            indexer_heads=meta.int("attention.indexer.head_count"),
            indexer_length=indexer_length,
            indexer_top_k=meta.int("attention.indexer.top_k"),
            indexer_layout="pairs" if glm else "halves",
            indexed=meta.pattern(types, blocks, 0) if glm and meta.has(types) else None,
            expert_count=meta.int("expert_count"),
            expert_feed_forward_length=width,
            expert_shared_feed_forward_length=width * meta.int("expert_shared_count", 0),
            router=Router(
                score="sigmoid",
                used=meta.int("expert_used_count"),
                normalise=meta.bool("expert_weights_norm", False),
                scale=meta.float("expert_weights_scale", 1.0) or 1.0,
                groups=meta.int("expert_group_count", 1) or 1,
                groups_used=meta.int("expert_group_used_count", 1) or 1,
                group_score="top2",
            ),
            scale=key**-0.5 * rope.softmax_magnitude**2,
            rms_epsilon=epsilon,
            lora_rms_epsilon=meta.float("attention.lora_norm_rms_epsilon", epsilon),
            rope=rope,
            vocabulary=meta.vocabulary,
        )


class Indexer(NamedTuple):
    q_b: Weight
    k: Weight
    k_norm: Weight
    k_norm_bias: Weight
    weights: Weight


class Block(NamedTuple):
    attn_norm: Weight
    attn_q_a: Weight
    attn_q_a_norm: Weight
    attn_q_b: Weight
    attn_kv_a: Weight
    attn_kv_a_norm: Weight
    attn_k_b: Weight  # (H, latent, nope), or (H, nope, latent) when cut from kv_b
    k_b_transposed: bool
    attn_v_b: Weight  # (H, value, latent)
    attn_output: Weight
    indexer: Indexer | None  # a layer without one goes by the choice of the one before
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
    indexer_rope: RopeTable


def load(c: Config, get: Checkpoint) -> Weights:
    """Every tensor by name and shape; a whole `attn_kv_b` is cut into k_b and v_b without a copy."""
    embedding = get("token_embd", (c.vocabulary, c.embedding_length))
    blocks = [load_block(c, get.scope(f"blk.{i}"), i) for i in range(c.block_count)]
    if blocks and blocks[0].indexer is None:
        raise FileFormatError(f"{get.source.path}: the first layer has no indexer whose choice others could share")
    return Weights(
        embedding=embedding,
        blocks=blocks,
        norm=get("output_norm", (c.embedding_length,)),
        output=get.optional("output", (c.vocabulary, c.embedding_length)) or embedding,
        rope=c.rope.table("pairs"),
        indexer_rope=c.rope.table(c.indexer_layout),
    )


def load_block(c: Config, at: Checkpoint, layer: int) -> Block:
    D, H, R, L = c.embedding_length, c.head_count, c.q_lora_rank, c.kv_lora_rank
    E, S, sparse = c.expert_count, c.expert_shared_feed_forward_length, layer >= c.leading_dense_block_count
    F = c.expert_feed_forward_length if sparse else c.feed_forward_length
    if split := at.has("attn_k_b"):
        k_b = at("attn_k_b", (H, L, c.nope_length))
        v_b = at("attn_v_b", (H, c.value_length, L))
    else:
        kv_b = at("attn_kv_b", (H * (c.nope_length + c.value_length), L)).matrices(H)
        k_b, v_b = kv_b.part(0, c.nope_length), kv_b.part(c.nope_length, c.nope_length + c.value_length)
    return Block(
        attn_norm=at("attn_norm", (D,)),
        attn_q_a=at("attn_q_a", (R, D)),
        attn_q_a_norm=at("attn_q_a_norm", (R,)),
        attn_q_b=at("attn_q_b", (H * (c.nope_length + c.rope_length), R)),
        attn_kv_a=at("attn_kv_a_mqa", (L + c.rope_length, D)),
        attn_kv_a_norm=at("attn_kv_a_norm", (L,)),
        attn_k_b=k_b,
        k_b_transposed=not split,
        attn_v_b=v_b,
        attn_output=at("attn_output", (D, H * c.value_length)),
        indexer=load_indexer(c, at.scope("indexer"), layer),
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


def load_indexer(c: Config, at: Checkpoint, layer: int) -> Indexer | None:
    """None for a layer that shares a choice; it may have the tensors all the same: converters write what there is."""
    d, own = c.indexer_length, at.has("attn_k") if c.indexed is None else c.indexed[layer]
    if not own and not at.has("attn_k"):
        return None
    indexer = Indexer(
        q_b=at("attn_q_b", (c.indexer_heads * d, c.q_lora_rank)),
        k=at("attn_k", (d, c.embedding_length)),
        k_norm=at("k_norm", (d,)),
        k_norm_bias=at.bias("k_norm", (d,)),
        weights=at("proj", (c.indexer_heads, c.embedding_length)),
    )
    return indexer if own else None


def forward(ops: Ops, c: Config, w: Weights, tokens: Tensor, cache: Cache) -> Tensor:
    """Token ids (T,) -> logits of the wanted rows (rows, V)."""
    x = ops.embed(w.embedding, tokens)  # (T, D)
    chosen: Tensor | None = None
    for b in w.blocks:
        h = ops.rms_norm(x, b.attn_norm, c.rms_epsilon)
        q_latent = ops.rms_norm(ops.linear(h, b.attn_q_a), b.attn_q_a_norm, c.lora_rms_epsilon)  # (T, R)
        if b.indexer is not None:
            chosen = choose(ops, c, b.indexer, w.indexer_rope, h, q_latent, cache)  # (T, k)
        assert chosen is not None, "the first layer has an indexer"
        x = ops.add(x, attend(ops, c, b, w.rope, h, q_latent, chosen, cache))
        h = ops.rms_norm(x, b.ffn_norm, c.rms_epsilon)
        x = ops.add(x, mix(ops, c, b, b.router, h) if b.router else feed(ops, h, b.gate, b.up, b.down))
    return ops.linear(ops.rms_norm(ops.logit_rows(x), w.norm, c.rms_epsilon), w.output)  # (rows, V)


def choose(ops: Ops, c: Config, i: Indexer, rope: RopeTable, x: Tensor, q_latent: Tensor, cache: Cache) -> Tensor:
    """The lightning indexer. Its scales are left out, as they are positive and the same for every position."""
    key = ops.layer_norm(ops.linear(x, i.k), i.k_norm, i.k_norm_bias, INDEXER_EPSILON).heads(1)  # (T, 1, d)
    layer = cache.append(ops.rope(key, rope), value_prefix=0)
    q = ops.rope(ops.linear(q_latent, i.q_b).heads(c.indexer_heads), rope)  # (T, I, d)
    return ops.select(q, ops.linear(x, i.weights, exact=True), layer, c.indexer_top_k)


def attend(
    ops: Ops, c: Config, b: Block, rope: RopeTable, x: Tensor, q_latent: Tensor, chosen: Tensor, cache: Cache
) -> Tensor:
    kv = ops.linear(x, b.attn_kv_a)  # (T, L + rope)
    latent = ops.rms_norm(kv.columns(0, c.kv_lora_rank), b.attn_kv_a_norm, c.lora_rms_epsilon).heads(1)  # (T, 1, L)
    turned = ops.rope(kv.columns(c.kv_lora_rank, kv.shape[1]).heads(1), rope)  # (T, 1, rope), for all heads
    layer = cache.append(ops.concat(latent, turned), value_prefix=c.kv_lora_rank)
    q = ops.linear(q_latent, b.attn_q_b).heads(c.head_count)
    carried = ops.head_linear(q.columns(0, c.nope_length), b.attn_k_b, transposed=b.k_b_transposed)  # (T, H, L)
    query = ops.concat(carried, ops.rope(q.columns(c.nope_length, q.shape[2]), rope))  # (T, H, L + rope)
    y = ops.attention(query, layer, scale=c.scale, selected=chosen)  # (T, H, L)
    return ops.linear(ops.head_linear(y, b.attn_v_b).flat(), b.attn_output)


def feed(ops: Ops, x: Tensor, gate: Weight, up: Weight, down: Weight) -> Tensor:
    opened, passed = ops.linears(x, (gate, up))  # (T, F)
    return ops.linear(ops.glu(opened, passed), down)


def mix(ops: Ops, c: Config, b: Block, router: Weight, x: Tensor) -> Tensor:
    ids, shares = ops.route(ops.linear(x, router, exact=True), c.router, b.router_bias)  # (T, k) each
    chosen = ops.experts(x, ids, shares, b.gate, b.up, b.down)
    return ops.add(chosen, feed(ops, x, *b.shared)) if b.shared else chosen
