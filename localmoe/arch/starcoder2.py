"""StarCoder2: grouped-query attention with layer norms, biases throughout and a feed-forward without gate. Lozhkov et
al. 2024, StarCoder 2, section 6."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from localmoe.arch.rope import Rope
from localmoe.formats import Weight
from localmoe.kernels.ops import Cache, Ops
from localmoe.kernels.program import RopeTable, Tensor
from localmoe.loader.checkpoint import Checkpoint
from localmoe.loader.metadata import Metadata

MODEL_TYPES = ("starcoder2",)


@dataclass(frozen=True)
class Config:
    block_count: int
    embedding_length: int
    feed_forward_length: int
    head_count: int
    head_count_kv: int
    key_length: int
    sliding_window: int
    epsilon: float
    rope: Rope
    vocabulary: int

    @classmethod
    def read(cls, meta: Metadata) -> Config:
        heads, width = meta.int("attention.head_count"), meta.int("embedding_length")
        key_length = meta.int("attention.key_length", width // heads)
        meta.expect("attention.value_length", key_length)
        return cls(
            block_count=meta.int("block_count"),
            embedding_length=width,
            feed_forward_length=meta.int("feed_forward_length"),
            head_count=heads,
            head_count_kv=meta.int("attention.head_count_kv", heads),
            key_length=key_length,
            sliding_window=meta.int("attention.sliding_window", 0),
            epsilon=meta.float("attention.layer_norm_epsilon"),
            rope=Rope.read(meta, key_length),
            vocabulary=meta.vocabulary,
        )


class Layer(NamedTuple):
    """A matrix or a norm's weight, with its bias."""

    weight: Weight
    bias: Weight | None


class Block(NamedTuple):
    attn_norm: Layer
    attn_qkv: tuple[Layer, Layer, Layer]
    attn_output: Layer
    ffn_norm: Layer
    up: Layer
    down: Layer


class Weights(NamedTuple):
    embedding: Weight
    blocks: list[Block]
    norm: Layer
    output: Weight
    rope: RopeTable


def load(c: Config, get: Checkpoint) -> Weights:
    """Ask for every tensor by name and shape; one that differs is refused with what was expected."""
    D, F, d = c.embedding_length, c.feed_forward_length, c.key_length
    Q, K = c.head_count * d, c.head_count_kv * d
    embedding = get("token_embd", (c.vocabulary, D))

    def layer(at: Checkpoint, name: str, shape: tuple[int, ...]) -> Layer:
        return Layer(at(name, shape), at.optional(name, shape[:1], suffix="bias"))

    def block(i: int) -> Block:
        at = get.scope(f"blk.{i}")
        return Block(
            attn_norm=layer(at, "attn_norm", (D,)),
            attn_qkv=(layer(at, "attn_q", (Q, D)), layer(at, "attn_k", (K, D)), layer(at, "attn_v", (K, D))),
            attn_output=layer(at, "attn_output", (D, Q)),
            ffn_norm=layer(at, "ffn_norm", (D,)),
            up=layer(at, "ffn_up", (F, D)),
            down=layer(at, "ffn_down", (D, F)),
        )

    return Weights(
        embedding=embedding,
        blocks=[block(i) for i in range(c.block_count)],
        norm=layer(get, "output_norm", (D,)),
        output=get.optional("output", (c.vocabulary, D)) or embedding,
        rope=c.rope.table("halves"),
    )


def forward(ops: Ops, c: Config, w: Weights, tokens: Tensor, cache: Cache) -> Tensor:
    """Token ids (T,) -> logits of the wanted rows (rows, V)."""
    x = ops.embed(w.embedding, tokens)  # (T, D)
    for b in w.blocks:
        x = ops.add(x, attend(ops, c, b, w.rope, ops.layer_norm(x, *b.attn_norm, c.epsilon), cache))
        x = ops.add(x, feed(ops, b, ops.layer_norm(x, *b.ffn_norm, c.epsilon)))
    return ops.linear(ops.layer_norm(ops.logit_rows(x), *w.norm, c.epsilon), w.output)  # (rows, V)


def attend(ops: Ops, c: Config, b: Block, rope: RopeTable, x: Tensor, cache: Cache) -> Tensor:
    q, k, v = ops.linears(x, [part.weight for part in b.attn_qkv], [part.bias for part in b.attn_qkv])
    layer = cache.append(ops.rope(k.heads(c.head_count_kv), rope), v.heads(c.head_count_kv))  # (T, K, d)
    q = ops.rope(q.heads(c.head_count), rope)  # (T, H, d)
    y = ops.attention(q, layer, scale=c.key_length**-0.5, window=c.sliding_window)
    return ops.linear(y.flat(), *b.attn_output)


def feed(ops: Ops, b: Block, x: Tensor) -> Tensor:
    return ops.linear(ops.gelu(ops.linear(x, *b.up)), *b.down)  # (T, F) between
