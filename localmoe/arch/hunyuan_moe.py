"""Hunyuan-A13B: head norms after rope, softmax top-k experts beside a shared one. Tencent 2025, Hunyuan-A13B Technical
Report, section 2."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from localmoe.arch.rope import Rope
from localmoe.formats import Weight
from localmoe.kernels.ops import Cache, Ops
from localmoe.kernels.program import RopeTable, Router, Tensor
from localmoe.loader.checkpoint import Checkpoint
from localmoe.loader.metadata import Metadata

MODEL_TYPES = ("hunyuan-moe",)


@dataclass(frozen=True)
class Config:
    block_count: int
    embedding_length: int
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
        meta.expect("attention.value_length", key_length)
        meta.expect("expert_gating_func", 0, 1)
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
            expert_shared_feed_forward_length=meta.int("expert_shared_feed_forward_length"),
            router=Router("softmax", meta.int("expert_used_count"), normalise=True),
            rms_epsilon=meta.float("attention.layer_norm_rms_epsilon"),
            rope=Rope.read(meta, key_length),
            vocabulary=meta.vocabulary,
        )


class Feed(NamedTuple):
    gate: Weight
    up: Weight
    down: Weight


class Block(NamedTuple):
    attn_norm: Weight
    attn_qkv: tuple[Weight, Weight, Weight]
    attn_q_norm: Weight
    attn_k_norm: Weight
    attn_output: Weight
    ffn_norm: Weight
    router: Weight
    experts: Feed
    shared: Feed


class Weights(NamedTuple):
    embedding: Weight
    blocks: list[Block]
    norm: Weight
    output: Weight
    rope: RopeTable


def load(c: Config, get: Checkpoint) -> Weights:
    """Every tensor by name and shape."""
    D, E, F, d = c.embedding_length, c.expert_count, c.expert_feed_forward_length, c.key_length
    Q, K, S = c.head_count * d, c.head_count_kv * d, c.expert_shared_feed_forward_length
    embedding = get("token_embd", (c.vocabulary, D))

    def block(i: int) -> Block:
        at = get.scope(f"blk.{i}")
        stacks = ("ffn_gate_exps", (E, F, D)), ("ffn_up_exps", (E, F, D)), ("ffn_down_exps", (E, D, F))
        shared = ("ffn_gate_shexp", (S, D)), ("ffn_up_shexp", (S, D)), ("ffn_down_shexp", (D, S))
        return Block(
            attn_norm=at("attn_norm", (D,)),
            attn_qkv=(at("attn_q", (Q, D)), at("attn_k", (K, D)), at("attn_v", (K, D))),
            attn_q_norm=at("attn_q_norm", (d,)),
            attn_k_norm=at("attn_k_norm", (d,)),
            attn_output=at("attn_output", (D, Q)),
            ffn_norm=at("ffn_norm", (D,)),
            router=at("ffn_gate_inp", (E, D)),
            experts=Feed(*(at.experts(name, shape) for name, shape in stacks)),
            shared=Feed(*(at(name, shape) for name, shape in shared)),
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
    q = ops.rms_norm(ops.rope(q.heads(c.head_count), rope), b.attn_q_norm, c.rms_epsilon)  # (T, H, d)
    k = ops.rms_norm(ops.rope(k.heads(c.head_count_kv), rope), b.attn_k_norm, c.rms_epsilon)  # (T, K, d)
    y = ops.attention(q, cache.append(k, v.heads(c.head_count_kv)), scale=c.key_length**-0.5)
    return ops.linear(y.flat(), b.attn_output)


def mix(ops: Ops, c: Config, b: Block, x: Tensor) -> Tensor:
    ids, shares = ops.route(ops.linear(x, b.router, exact=True), c.router)  # (T, k) each
    gate, up = ops.linears(x, (b.shared.gate, b.shared.up))  # (T, S)
    shared = ops.linear(ops.glu(gate, up), b.shared.down)
    return ops.add(ops.experts(x, ids, shares, *b.experts), shared)
