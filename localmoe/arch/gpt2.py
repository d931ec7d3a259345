"""GPT-2: learned positions, layer norms, q, k and v as one matrix, biases throughout, a feed-forward without gate.
Radford et al. 2019, section 2.3."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from localmoe.formats import Weight
from localmoe.kernels.ops import Cache, Ops
from localmoe.kernels.program import Tensor
from localmoe.loader.checkpoint import Checkpoint
from localmoe.loader.metadata import Metadata

MODEL_TYPES = ("gpt2",)


@dataclass(frozen=True)
class Config:
    block_count: int
    context_length: int
    embedding_length: int
    feed_forward_length: int
    head_count: int
    epsilon: float
    vocabulary: int

    @classmethod
    def read(cls, meta: Metadata) -> Config:
        heads, width = meta.int("attention.head_count"), meta.int("embedding_length")
        meta.expect("attention.head_count_kv", heads)
        meta.expect("attention.key_length", width // heads)
        meta.expect("attention.value_length", width // heads)
        return cls(
            block_count=meta.int("block_count"),
            context_length=meta.int("context_length"),
            embedding_length=width,
            feed_forward_length=meta.int("feed_forward_length"),
            head_count=heads,
            epsilon=meta.float("attention.layer_norm_epsilon"),
            vocabulary=meta.vocabulary,
        )


class Layer(NamedTuple):
    """A matrix or a norm's weight, with its bias."""

    weight: Weight
    bias: Weight


class Block(NamedTuple):
    attn_norm: Layer
    attn_qkv: Layer
    attn_output: Layer
    ffn_norm: Layer
    up: Layer
    down: Layer


class Weights(NamedTuple):
    embedding: Weight
    positions: Weight
    blocks: list[Block]
    norm: Layer
    output: Weight


def load(c: Config, get: Checkpoint) -> Weights:
    """Every tensor by name and shape. Matrices are rows of outputs, as llama.cpp's converter turns them."""
    D, F = c.embedding_length, c.feed_forward_length
    embedding = get("token_embd", (c.vocabulary, D))

    def layer(at: Checkpoint, name: str, shape: tuple[int, ...]) -> Layer:
        return Layer(at(name, shape), at.bias(name, shape[:1]))

    def block(i: int) -> Block:
        at = get.scope(f"blk.{i}")
        return Block(
            attn_norm=layer(at, "attn_norm", (D,)),
            attn_qkv=layer(at, "attn_qkv", (3 * D, D)),
            attn_output=layer(at, "attn_output", (D, D)),
            ffn_norm=layer(at, "ffn_norm", (D,)),
            up=layer(at, "ffn_up", (F, D)),
            down=layer(at, "ffn_down", (D, F)),
        )

    return Weights(
        embedding=embedding,
        positions=get("position_embd", (c.context_length, D)),
        blocks=[block(i) for i in range(c.block_count)],
        norm=layer(get, "output_norm", (D,)),
        output=get.optional("output", (c.vocabulary, D)) or embedding,
    )


def forward(ops: Ops, c: Config, w: Weights, tokens: Tensor, cache: Cache) -> Tensor:
    """Token ids (T,) -> logits of the wanted rows (rows, V)."""
    x = ops.add_positions(ops.embed(w.embedding, tokens), w.positions)  # (T, D)
    for b in w.blocks:
        x = ops.add(x, attend(ops, c, b, ops.layer_norm(x, *b.attn_norm, c.epsilon), cache))
        x = ops.add(x, feed(ops, b, ops.layer_norm(x, *b.ffn_norm, c.epsilon)))
    return ops.linear(ops.layer_norm(ops.logit_rows(x), *w.norm, c.epsilon), w.output)  # (rows, V)


def attend(ops: Ops, c: Config, b: Block, x: Tensor, cache: Cache) -> Tensor:
    D, d = c.embedding_length, c.embedding_length // c.head_count
    qkv = ops.linear(x, *b.attn_qkv)  # (T, 3 D)
    q, k, v = (qkv.columns(i * D, (i + 1) * D).heads(c.head_count) for i in range(3))  # (T, H, d)
    y = ops.attention(q, cache.append(k, v), scale=d**-0.5)
    return ops.linear(y.flat(), *b.attn_output)


def feed(ops: Ops, b: Block, x: Tensor) -> Tensor:
    return ops.linear(ops.gelu(ops.linear(x, *b.up)), *b.down)  # (T, F) between
