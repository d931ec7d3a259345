"""ERNIE 4.5 MoE, its text: adjacent rope pairs, a softmax router whose bias moves the choice alone, shared experts as
one. Baidu 2025, ERNIE 4.5 Technical Report, section 2."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from localmoe.arch.rope import Rope
from localmoe.formats import Weight
from localmoe.kernels.ops import Cache, Ops
from localmoe.kernels.program import RopeTable, Router, Tensor
from localmoe.loader.checkpoint import Checkpoint
from localmoe.loader.metadata import Metadata

MODEL_TYPES = ("ernie4_5-moe",)


@dataclass(frozen=True)
class Config:
    block_count: int
    leading_dense_block_count: int
    moe_layer_step: int
    embedding_length: int
    feed_forward_length: int
    head_count: int
    head_count_kv: int
    key_length: int
    expert_count: int
    expert_feed_forward_length: int
    expert_shared_feed_forward_length: int
    router: Router
    rms_epsilon: float
    rope: Rope
    vocabulary: int

    @classmethod
    def read(cls, meta: Metadata) -> Config:
        heads, width = meta.int("attention.head_count"), meta.int("embedding_length")
        key_length = meta.int("attention.key_length", width // heads)
        expert_width = meta.int("expert_feed_forward_length")
        meta.expect("attention.value_length", key_length)
        meta.expect("expert_gating_func", 0, 1)
        meta.expect("expert_weights_norm", True)
        meta.expect("expert_weights_scale", 0.0, 1.0)
        return cls(
            block_count=meta.int("block_count"),
            leading_dense_block_count=meta.int("leading_dense_block_count", 0),
            moe_layer_step=meta.int("interleave_moe_layer_step", 1) or 1,
            embedding_length=width,
            feed_forward_length=meta.int("feed_forward_length"),
            head_count=heads,
            head_count_kv=meta.int("attention.head_count_kv", heads),
            key_length=key_length,
            expert_count=meta.int("expert_count"),
            expert_feed_forward_length=expert_width,
            expert_shared_feed_forward_length=meta.int(
                "expert_shared_feed_forward_length", expert_width * meta.int("expert_shared_count", 0)
            ),
            router=Router("softmax", meta.int("expert_used_count"), normalise=True),
            rms_epsilon=meta.float("attention.layer_norm_rms_epsilon"),
            rope=Rope.read(meta, key_length),
            vocabulary=meta.vocabulary,
        )

    def sparse(self, layer: int) -> bool:
        return layer >= self.leading_dense_block_count and (layer + 1) % self.moe_layer_step == 0


class Feed(NamedTuple):
    gate: Weight
    up: Weight
    down: Weight


class Block(NamedTuple):
    attn_norm: Weight
    attn_qkv: tuple[Weight, Weight, Weight]
    attn_output: Weight
    ffn_norm: Weight
    router: Weight | None
    router_bias: Weight | None
    feed: Feed  # with a router, of experts
    shared: Feed | None


class Weights(NamedTuple):
    embedding: Weight
    blocks: list[Block]
    norm: Weight
    output: Weight
    rope: RopeTable


def load(c: Config, get: Checkpoint) -> Weights:
    """Every tensor by name and shape; rope pairs are adjacent in folders too."""
    embedding = get("token_embd", (c.vocabulary, c.embedding_length))
    return Weights(
        embedding=embedding,
        blocks=[load_block(c, get.scope(f"blk.{i}"), c.sparse(i)) for i in range(c.block_count)],
        norm=get("output_norm", (c.embedding_length,)),
        output=get.optional("output", (c.vocabulary, c.embedding_length)) or embedding,
        rope=c.rope.table("pairs"),
    )


def load_block(c: Config, at: Checkpoint, sparse: bool) -> Block:
    D, E, F, d = c.embedding_length, c.expert_count, c.expert_feed_forward_length, c.key_length
    Q, K, S = c.head_count * d, c.head_count_kv * d, c.expert_shared_feed_forward_length

    def feed(suffix: str, width: int) -> Feed:
        up = (width, D)
        return Feed(at(f"ffn_gate{suffix}", up), at(f"ffn_up{suffix}", up), at(f"ffn_down{suffix}", (D, width)))

    def experts() -> Feed:
        up = (E, F, D)
        return Feed(
            at.experts("ffn_gate_exps", up), at.experts("ffn_up_exps", up), at.experts("ffn_down_exps", (E, D, F))
        )

    return Block(
        attn_norm=at("attn_norm", (D,)),
        attn_qkv=(at("attn_q", (Q, D)), at("attn_k", (K, D)), at("attn_v", (K, D))),
        attn_output=at("attn_output", (D, Q)),
        ffn_norm=at("ffn_norm", (D,)),
        router=at("ffn_gate_inp", (E, D)) if sparse else None,
        router_bias=at.optional("exp_probs_b", (E,), suffix="bias") if sparse else None,
        feed=experts() if sparse else feed("", c.feed_forward_length),
        shared=feed("_shexp", S) if sparse and S else None,
    )


def forward(ops: Ops, c: Config, w: Weights, tokens: Tensor, cache: Cache) -> Tensor:
    """Token ids (T,) -> logits of the wanted rows (rows, V)."""
    x = ops.embed(w.embedding, tokens)  # (T, D)
    for b in w.blocks:
        x = ops.add(x, attend(ops, c, b, w.rope, ops.rms_norm(x, b.attn_norm, c.rms_epsilon), cache))
        h = ops.rms_norm(x, b.ffn_norm, c.rms_epsilon)
        x = ops.add(x, mix(ops, c, b, b.router, h) if b.router else feed_forward(ops, h, b.feed))
    return ops.linear(ops.rms_norm(ops.logit_rows(x), w.norm, c.rms_epsilon), w.output)  # (rows, V)


def attend(ops: Ops, c: Config, b: Block, rope: RopeTable, x: Tensor, cache: Cache) -> Tensor:
    q, k, v = ops.linears(x, b.attn_qkv)
    k = ops.rope(k.heads(c.head_count_kv), rope)  # (T, K, d)
    q = ops.rope(q.heads(c.head_count), rope)  # (T, H, d)
    y = ops.attention(q, cache.append(k, v.heads(c.head_count_kv)), scale=c.key_length**-0.5)
    return ops.linear(y.flat(), b.attn_output)


def feed_forward(ops: Ops, x: Tensor, weights: Feed) -> Tensor:
    gate, up = ops.linears(x, (weights.gate, weights.up))  # (T, F)
    return ops.linear(ops.glu(gate, up), weights.down)


def mix(ops: Ops, c: Config, b: Block, router: Weight, x: Tensor) -> Tensor:
    ids, shares = ops.route(ops.linear(x, router, exact=True), c.router, b.router_bias)  # (T, k) each
    chosen = ops.experts(x, ids, shares, *b.feed)
    return ops.add(chosen, feed_forward(ops, x, b.shared)) if b.shared else chosen
