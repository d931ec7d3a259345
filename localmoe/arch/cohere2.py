"""Command R7B and Command A: attention and feed-forward side by side behind one layer norm, windows and rope in three
layers of four, neither in the fourth. Cohere 2025, Command A, section 2."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from localmoe.arch.rope import Rope
from localmoe.formats import Weight
from localmoe.kernels.ops import Cache, Ops
from localmoe.kernels.program import RopeTable, Tensor
from localmoe.loader.checkpoint import Checkpoint
from localmoe.loader.metadata import Metadata

MODEL_TYPES = ("cohere2",)


@dataclass(frozen=True)
class Config:
    block_count: int
    embedding_length: int
    feed_forward_length: int
    head_count: int
    head_count_kv: int
    key_length: int
    windows: tuple[int, ...]  # of each layer, 0 for none; layers without one have no rope
    logit_scale: float
    epsilon: float
    rope: Rope
    vocabulary: int

    @classmethod
    def read(cls, meta: Metadata) -> Config:
        heads, width, blocks = meta.int("attention.head_count"), meta.int("embedding_length"), meta.int("block_count")
        key_length = meta.int("attention.key_length", width // heads)
        meta.expect("attention.value_length", key_length)
        window = meta.int("attention.sliding_window")
        return cls(
            block_count=blocks,
            embedding_length=width,
            feed_forward_length=meta.int("feed_forward_length"),
            head_count=heads,
            head_count_kv=meta.int("attention.head_count_kv", heads),
            key_length=key_length,
            windows=tuple(window * on for on in meta.pattern("attention.sliding_window_pattern", blocks, 4)),
            logit_scale=meta.float("logit_scale", 0.0) or 1.0,
            epsilon=meta.float("attention.layer_norm_epsilon"),
            rope=Rope.read(meta, key_length),
            vocabulary=meta.vocabulary,
        )


class Block(NamedTuple):
    attn_norm: Weight
    attn_qkv: tuple[Weight, Weight, Weight]
    attn_output: Weight
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
    """Every tensor by name and shape. Rope pairs are adjacent in folders too; the embedding is the output."""
    D, F, d = c.embedding_length, c.feed_forward_length, c.key_length
    Q, K = c.head_count * d, c.head_count_kv * d
    embedding = get("token_embd", (c.vocabulary, D))

    def block(i: int) -> Block:
        at = get.scope(f"blk.{i}")
        return Block(
            attn_norm=at("attn_norm", (D,)),
            attn_qkv=(at("attn_q", (Q, D)), at("attn_k", (K, D)), at("attn_v", (K, D))),
            attn_output=at("attn_output", (D, Q)),
            gate=at("ffn_gate", (F, D)),
            up=at("ffn_up", (F, D)),
            down=at("ffn_down", (D, F)),
        )

    return Weights(
        embedding=embedding,
        blocks=[block(i) for i in range(c.block_count)],
        norm=get("output_norm", (D,)),
        output=get.optional("output", (c.vocabulary, D)) or embedding,
        rope=c.rope.table("pairs"),
    )


def forward(ops: Ops, c: Config, w: Weights, tokens: Tensor, cache: Cache) -> Tensor:
    """Token ids (T,) -> logits of the wanted rows (rows, V)."""
    x = ops.embed(w.embedding, tokens)  # (T, D)
    for b, window in zip(w.blocks, c.windows, strict=True):
        h = ops.layer_norm(x, b.attn_norm, None, c.epsilon)
        x = ops.add(ops.add(x, attend(ops, c, b, w.rope, window, h, cache)), feed(ops, b, h))
    y = ops.linear(ops.layer_norm(ops.logit_rows(x), w.norm, None, c.epsilon), w.output)  # (rows, V)
    return ops.scale(y, c.logit_scale)


def attend(ops: Ops, c: Config, b: Block, rope: RopeTable, window: int, x: Tensor, cache: Cache) -> Tensor:
    q, k, v = ops.linears(x, b.attn_qkv)
    q, k, v = q.heads(c.head_count), k.heads(c.head_count_kv), v.heads(c.head_count_kv)  # (T, H, d), (T, K, d)
    if window:
        q, k = ops.rope(q, rope), ops.rope(k, rope)
    y = ops.attention(q, cache.append(k, v), scale=c.key_length**-0.5, window=window)
    return ops.linear(y.flat(), b.attn_output)


def feed(ops: Ops, b: Block, x: Tensor) -> Tensor:
    gate, up = ops.linears(x, (b.gate, b.up))  # (T, F)
    return ops.linear(ops.glu(gate, up), b.down)
