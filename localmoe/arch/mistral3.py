"""Ministral 3 and Devstral 2: Llama with queries that warm with the position. Mistral AI 2025, Ministral 3;
temperature: Nakanishi 2025, Scalable-Softmax."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from localmoe.arch.rope import Rope
from localmoe.errors import FileFormatError
from localmoe.formats import Weight
from localmoe.kernels.ops import Cache, Ops
from localmoe.kernels.program import RopeTable, Temperature, Tensor
from localmoe.loader.checkpoint import Checkpoint
from localmoe.loader.metadata import Metadata

MODEL_TYPES = ("mistral3",)


@dataclass(frozen=True)
class Config:
    block_count: int
    embedding_length: int
    feed_forward_length: int
    head_count: int
    head_count_kv: int
    key_length: int
    sliding_window: int
    temperature: Temperature | None
    rms_epsilon: float
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
            temperature=read_temperature(meta),
            rms_epsilon=meta.float("attention.layer_norm_rms_epsilon"),
            rope=Rope.read(meta, key_length),
            vocabulary=meta.vocabulary,
        )


def read_temperature(meta: Metadata) -> Temperature | None:
    """Where the file names no length, it is YaRN's original context."""
    scale = meta.float("attention.temperature_scale", 0.0)
    length = meta.int("attention.temperature_length", meta.int("rope.scaling.original_context_length", 0))
    if scale and not length:
        raise FileFormatError(
            f"{meta.origin}: attention.temperature_length is 0 or missing, a number of tokens is expected"
        )
    return Temperature(scale, length) if scale else None


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
    x = ops.embed(w.embedding, tokens)  # (T, D)
    for b in w.blocks:
        x = ops.add(x, attend(ops, c, b, w.rope, ops.rms_norm(x, b.attn_norm, c.rms_epsilon), cache))
        x = ops.add(x, feed(ops, b, ops.rms_norm(x, b.ffn_norm, c.rms_epsilon)))
    return ops.linear(ops.rms_norm(ops.logit_rows(x), w.norm, c.rms_epsilon), w.output)  # (rows, V)


def attend(ops: Ops, c: Config, b: Block, rope: RopeTable, x: Tensor, cache: Cache) -> Tensor:
    q, k, v = ops.linears(x, b.attn_qkv)
    layer = cache.append(ops.rope(k.heads(c.head_count_kv), rope), v.heads(c.head_count_kv))  # (T, K, d)
    q = ops.rope(q.heads(c.head_count), rope)  # (T, H, d)
    y = ops.attention(q, layer, scale=c.key_length**-0.5, window=c.sliding_window, temperature=c.temperature)
    return ops.linear(y.flat(), b.attn_output)


def feed(ops: Ops, b: Block, x: Tensor) -> Tensor:
    gate, up = ops.linears(x, (b.gate, b.up))  # (T, F)
    return ops.linear(ops.glu(gate, up), b.down)
