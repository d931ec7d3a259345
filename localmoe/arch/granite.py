"""Granite 3: Llama with four multipliers, of embeddings, scores, branches and logits. IBM Granite Team 2024, Granite
3.0 Language Models, section 2."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from localmoe.arch.rope import Rope
from localmoe.formats import Weight
from localmoe.kernels.ops import Cache, Ops
from localmoe.kernels.program import RopeTable, Tensor
from localmoe.loader.checkpoint import Checkpoint
from localmoe.loader.metadata import Metadata

MODEL_TYPES = ("granite",)


@dataclass(frozen=True)
class Config:
    block_count: int
    embedding_length: int
    feed_forward_length: int
    head_count: int
    head_count_kv: int
    key_length: int
    embedding_scale: float
    attention_scale: float
    residual_scale: float
    logit_scale: float  # logits are divided by it
    rms_epsilon: float
    rope: Rope
    vocabulary: int

    @classmethod
    def read(cls, meta: Metadata) -> Config:
        heads, width = meta.int("attention.head_count"), meta.int("embedding_length")
        key_length = meta.int("attention.key_length", width // heads)
        meta.expect("attention.value_length", key_length)
        meta.expect("rope.scaling.finetuned", True)  # to llama.cpp false means no rope at all in this family
        return cls(
            block_count=meta.int("block_count"),
            embedding_length=width,
            feed_forward_length=meta.int("feed_forward_length"),
            head_count=heads,
            head_count_kv=meta.int("attention.head_count_kv", heads),
            key_length=key_length,
            embedding_scale=meta.float("embedding_scale", 0.0) or 1.0,
            attention_scale=meta.float("attention.scale", 0.0) or key_length**-0.5,
            residual_scale=meta.float("residual_scale", 0.0) or 1.0,
            logit_scale=meta.float("logit_scale", 0.0) or 1.0,
            rms_epsilon=meta.float("attention.layer_norm_rms_epsilon"),
            rope=Rope.read(meta, key_length),
            vocabulary=meta.vocabulary,
        )


class Block(NamedTuple):
    attn_norm: Weight
    attn_qkv: tuple[Weight, Weight, Weight]
    attn_output: Weight
    ffn_norm: Weight
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
    """Every tensor by name and shape. GGUF stores q and k permuted to adjacent rope pairs, as Llama's."""
    D, F, d = c.embedding_length, c.feed_forward_length, c.key_length
    Q, K = c.head_count * d, c.head_count_kv * d
    embedding = get("token_embd", (c.vocabulary, D))

    def block(i: int) -> Block:
        at = get.scope(f"blk.{i}")
        return Block(
            attn_norm=at("attn_norm", (D,)),
            attn_qkv=(at("attn_q", (Q, D)), at("attn_k", (K, D)), at("attn_v", (K, D))),
            attn_output=at("attn_output", (D, Q)),
            ffn_norm=at("ffn_norm", (D,)),
            gate=at("ffn_gate", (F, D)),
            up=at("ffn_up", (F, D)),
            down=at("ffn_down", (D, F)),
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
        x = ops.add(x, ops.scale(feed(ops, b, ops.rms_norm(x, b.ffn_norm, c.rms_epsilon)), c.residual_scale))
    y = ops.linear(ops.rms_norm(ops.logit_rows(x), w.norm, c.rms_epsilon), w.output)  # (rows, V)
    return ops.scale(y, 1 / c.logit_scale)


def attend(ops: Ops, c: Config, b: Block, rope: RopeTable, x: Tensor, cache: Cache) -> Tensor:
    q, k, v = ops.linears(x, b.attn_qkv)
    k = ops.rope(k.heads(c.head_count_kv), rope)  # (T, K, d)
    q = ops.rope(q.heads(c.head_count), rope)  # (T, H, d)
    y = ops.attention(q, cache.append(k, v.heads(c.head_count_kv)), scale=c.attention_scale)
    return ops.linear(y.flat(), b.attn_output)


def feed(ops: Ops, b: Block, x: Tensor) -> Tensor:
    gate, up = ops.linears(x, (b.gate, b.up))  # (T, F)
    return ops.linear(ops.glu(gate, up), b.down)
