"""Granite 3 MoE: scaled embeddings, branches and logits, a softmax over the chosen experts. IBM 2024, Granite 3.0
Language Models."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from localmoe.arch.rope import Rope
from localmoe.formats import Weight
from localmoe.kernels.ops import Cache, Ops
from localmoe.kernels.program import RopeTable, Router, Tensor
from localmoe.loader.checkpoint import Checkpoint
from localmoe.loader.metadata import Metadata

MODEL_TYPES = ("granitemoe",)


@dataclass(frozen=True)
class Config:
    block_count: int
    embedding_length: int
    head_count: int
    head_count_kv: int
    key_length: int
    embedding_scale: float
    attention_scale: float
    residual_scale: float
    logit_scale: float  # logits are divided by it
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
            embedding_scale=meta.float("embedding_scale", 0.0) or 1.0,
            attention_scale=meta.float("attention.scale", 0.0) or key_length**-0.5,
            residual_scale=meta.float("residual_scale", 0.0) or 1.0,
            logit_scale=meta.float("logit_scale", 0.0) or 1.0,
            expert_count=meta.int("expert_count"),
            expert_feed_forward_length=meta.int("expert_feed_forward_length", meta.int("feed_forward_length", 0)),
            expert_shared_feed_forward_length=meta.int("expert_shared_feed_forward_length", 0),
            # A softmax over all that is renormalised over the chosen is a softmax over the chosen.
            router=Router("softmax", meta.int("expert_used_count"), normalise=True, choice="logits"),
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
    attn_output: Weight
    ffn_norm: Weight
    router: Weight
    experts: Feed
    shared: Feed | None


class Weights(NamedTuple):
    embedding: Weight
    blocks: list[Block]
    norm: Weight
    output: Weight
    rope: RopeTable


def load(c: Config, get: Checkpoint) -> Weights:
    """Every tensor by name and shape. GGUF stores q and k permuted to adjacent rope pairs, as Llama's."""
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
            attn_output=at("attn_output", (D, Q)),
            ffn_norm=at("ffn_norm", (D,)),
            router=at("ffn_gate_inp", (E, D)),
            experts=Feed(*(at.experts(name, shape) for name, shape in stacks)),
            shared=Feed(*(at(name, shape) for name, shape in shared)) if S else None,
        )

    return Weights(
        embedding=embedding,
        blocks=[block(i) for i in range(c.block_count)],
        norm=get("output_norm", (D,)),
        output=get.optional("output", (c.vocabulary, D)) or embedding,
        rope=c.rope.table("pairs" if get.source.rope_permuted else "halves"),
    )


def forward(ops: Ops, c: Config, w: Weights, tokens: Tensor, cache: Cache) -> Tensor:
    """Token ids (T,) -> logits of the wanted rows (rows, V)."""
    x = ops.scale(ops.embed(w.embedding, tokens), c.embedding_scale)  # (T, D)
    for b in w.blocks:
        branch = attend(ops, c, b, w.rope, ops.rms_norm(x, b.attn_norm, c.rms_epsilon), cache)
        x = ops.add(x, ops.scale(branch, c.residual_scale))
        branch = mix(ops, c, b, ops.rms_norm(x, b.ffn_norm, c.rms_epsilon))
        x = ops.add(x, ops.scale(branch, c.residual_scale))
    y = ops.linear(ops.rms_norm(ops.logit_rows(x), w.norm, c.rms_epsilon), w.output)  # (rows, V)
    return ops.scale(y, 1 / c.logit_scale)


def attend(ops: Ops, c: Config, b: Block, rope: RopeTable, x: Tensor, cache: Cache) -> Tensor:
    q, k, v = ops.linears(x, b.attn_qkv)
    k = ops.rope(k.heads(c.head_count_kv), rope)  # (T, K, d)
    q = ops.rope(q.heads(c.head_count), rope)  # (T, H, d)
    y = ops.attention(q, cache.append(k, v.heads(c.head_count_kv)), scale=c.attention_scale)
    return ops.linear(y.flat(), b.attn_output)


def mix(ops: Ops, c: Config, b: Block, x: Tensor) -> Tensor:
    ids, shares = ops.route(ops.linear(x, b.router, exact=True), c.router)  # (T, k) each
    chosen = ops.experts(x, ids, shares, *b.experts)
    if b.shared is None:
        return chosen
    gate, up = ops.linears(x, (b.shared.gate, b.shared.up))  # (T, S)
    return ops.add(chosen, ops.linear(ops.glu(gate, up), b.shared.down))
