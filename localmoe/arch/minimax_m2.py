"""MiniMax-M2: q and k normed over their full width, a part of each head turned, sigmoid router with a bias. MiniMax
2025, MiniMax-M2 model card."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from localmoe.arch.rope import Rope
from localmoe.formats import Weight
from localmoe.kernels.ops import Cache, Ops
from localmoe.kernels.program import RopeTable, Router, Tensor
from localmoe.loader.checkpoint import Checkpoint
from localmoe.loader.metadata import Metadata

MODEL_TYPES = ("minimax-m2",)


@dataclass(frozen=True)
class Config:
    block_count: int
    embedding_length: int
    head_count: int
    head_count_kv: int
    key_length: int
    expert_count: int
    expert_feed_forward_length: int
    router: Router
    rms_epsilon: float
    rope: Rope
    vocabulary: int

    @classmethod
    def read(cls, meta: Metadata) -> Config:
        heads, width = meta.int("attention.head_count"), meta.int("embedding_length")
        key_length = meta.int("attention.key_length", width // heads)
        meta.expect("attention.value_length", key_length)
        meta.expect("expert_gating_func", 2, absent_ok=False)
        meta.expect("expert_weights_norm", True)
        meta.expect("expert_weights_scale", 0.0, 1.0)
        return cls(
            block_count=meta.int("block_count"),
            embedding_length=width,
            head_count=heads,
            head_count_kv=meta.int("attention.head_count_kv", heads),
            key_length=key_length,
            expert_count=meta.int("expert_count"),
            expert_feed_forward_length=meta.int("expert_feed_forward_length"),
            router=Router("sigmoid", meta.int("expert_used_count"), normalise=True),
            rms_epsilon=meta.float("attention.layer_norm_rms_epsilon"),
            rope=Rope.read(meta, key_length),
            vocabulary=meta.vocabulary,
        )


class Block(NamedTuple):
    attn_norm: Weight
    attn_qkv: tuple[Weight, Weight, Weight]
    attn_q_norm: Weight
    attn_k_norm: Weight
    attn_output: Weight
    ffn_norm: Weight
    router: Weight
    router_bias: Weight
    gate: Weight
    up: Weight
    down: Weight


class Weights(NamedTuple):
    embedding: Weight
    blocks: list[Block]
    norm: Weight
    output: Weight
    rope: RopeTable


def load(c: Config, get: Checkpoint) -> Weights:
    """Every tensor by name and shape."""
    D, E, F, d = c.embedding_length, c.expert_count, c.expert_feed_forward_length, c.key_length
    Q, K = c.head_count * d, c.head_count_kv * d
    embedding = get("token_embd", (c.vocabulary, D))

    def block(i: int) -> Block:
        at = get.scope(f"blk.{i}")
        return Block(
            attn_norm=at("attn_norm", (D,)),
            attn_qkv=(at("attn_q", (Q, D)), at("attn_k", (K, D)), at("attn_v", (K, D))),
            attn_q_norm=at("attn_q_norm", (Q,)),
            attn_k_norm=at("attn_k_norm", (K,)),
            attn_output=at("attn_output", (D, Q)),
            ffn_norm=at("ffn_norm", (D,)),
            router=at("ffn_gate_inp", (E, D)),
            router_bias=at.bias("exp_probs_b", (E,)),
            gate=at.experts("ffn_gate_exps", (E, F, D)),
            up=at.experts("ffn_up_exps", (E, F, D)),
            down=at.experts("ffn_down_exps", (E, D, F)),
        )

    return Weights(
        embedding=embedding,
        blocks=[block(i) for i in range(c.block_count)],
        norm=get("output_norm", (D,)),
        output=get.optional("output", (c.vocabulary, D)) or embedding,
        rope=c.rope.table("halves"),
    )


def forward(ops: Ops, c: Config, w: Weights, tokens: Tensor, cache: Cache) -> Tensor:
    """Token ids (T,) -> logits of the wanted rows (rows, V)."""
    x = ops.embed(w.embedding, tokens)  # (T, D)
    for b in w.blocks:
        x = ops.add(x, attend(ops, c, b, w.rope, ops.rms_norm(x, b.attn_norm, c.rms_epsilon), cache))
        x = ops.add(x, mix(ops, c, b, ops.rms_norm(x, b.ffn_norm, c.rms_epsilon)))
    return ops.linear(ops.rms_norm(ops.logit_rows(x), w.norm, c.rms_epsilon), w.output)  # (rows, V)


def attend(ops: Ops, c: Config, b: Block, rope: RopeTable, x: Tensor, cache: Cache) -> Tensor:
    q, k, v = ops.linears(x, b.attn_qkv)
    q = ops.rms_norm(q, b.attn_q_norm, c.rms_epsilon).heads(c.head_count)  # (T, H, d), normed over all heads at once
    k = ops.rms_norm(k, b.attn_k_norm, c.rms_epsilon).heads(c.head_count_kv)  # (T, K, d)
    layer = cache.append(ops.rope(k, rope), v.heads(c.head_count_kv))
    y = ops.attention(ops.rope(q, rope), layer, scale=c.key_length**-0.5)
    return ops.linear(y.flat(), b.attn_output)


def mix(ops: Ops, c: Config, b: Block, x: Tensor) -> Tensor:
    ids, shares = ops.route(ops.linear(x, b.router, exact=True), c.router, b.router_bias)  # (T, k) each
    return ops.experts(x, ids, shares, b.gate, b.up, b.down)
