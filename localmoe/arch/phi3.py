"""Phi-3 and Phi-4: q, k and v as one matrix, gate and up as another, frequencies divided one by one (LongRoPE), in the
small ones a part of each head turned. Abdin et al. 2024, section 2; Ding et al. 2024."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

from localmoe.arch.rope import Rope
from localmoe.formats import Weight
from localmoe.kernels.ops import Cache, Ops
from localmoe.kernels.program import RopeTable, Tensor
from localmoe.loader.checkpoint import Checkpoint
from localmoe.loader.metadata import Metadata

MODEL_TYPES = ("phi3",)


@dataclass(frozen=True)
class Config:
    block_count: int
    embedding_length: int
    feed_forward_length: int
    head_count: int
    head_count_kv: int
    key_length: int
    sliding_window: int
    rms_epsilon: float
    rope: Rope
    vocabulary: int

    @classmethod
    def read(cls, meta: Metadata) -> Config:
        heads, width = meta.int("attention.head_count"), meta.int("embedding_length")
        key_length = meta.int("attention.key_length", width // heads)
        meta.expect("attention.value_length", key_length)
        meta.expect("rope.scaling.type", "none")  # the two tensors of factors are all the scaling that there is
        return cls(
            block_count=meta.int("block_count"),
            embedding_length=width,
            feed_forward_length=meta.int("feed_forward_length"),
            head_count=heads,
            head_count_kv=meta.int("attention.head_count_kv", heads),
            key_length=key_length,
            sliding_window=meta.int("attention.sliding_window", 0),
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
    """Every tensor by name and shape. ffn_up holds gate and up, gate first."""
    D, F, d = c.embedding_length, c.feed_forward_length, c.key_length
    Q, K = c.head_count * d, c.head_count_kv * d
    embedding = get("token_embd", (c.vocabulary, D))

    def block(i: int) -> Block:
        at = get.scope(f"blk.{i}")
        qkv, gate_up = at("attn_qkv", (Q + 2 * K, D)), at("ffn_up", (2 * F, D))
        return Block(
            attn_norm=at("attn_norm", (D,)),
            attn_qkv=(qkv.part(0, Q), qkv.part(Q, Q + K), qkv.part(Q + K, Q + 2 * K)),
            attn_output=at("attn_output", (D, Q)),
            ffn_norm=at("ffn_norm", (D,)),
            gate=gate_up.part(0, F),
            up=gate_up.part(F, 2 * F),
            down=at("ffn_down", (D, F)),
        )

    return Weights(
        embedding=embedding,
        blocks=[block(i) for i in range(c.block_count)],
        norm=get("output_norm", (D,)),
        output=get.optional("output", (c.vocabulary, D)) or embedding,
        rope=rope_table(c, get),
    )


def rope_table(c: Config, get: Checkpoint) -> RopeTable:
    """The short factors' frequencies, and the long ones' for a context of more than the original one."""
    shape = (c.rope.dimensions // 2,)
    short, long = get.optional("rope_factors_short", shape), get.optional("rope_factors_long", shape)
    table = replace(c.rope.table("halves", short), amplitude=c.rope.attention_factor)
    if long is None:
        return table
    longer = c.rope.table("halves", long).inverse_frequencies
    return replace(table, longer=longer, original_context=c.rope.original_context)


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
    y = ops.attention(q, layer, scale=c.key_length**-0.5, window=c.sliding_window)
    return ops.linear(y.flat(), b.attn_output)


def feed(ops: Ops, b: Block, x: Tensor) -> Tensor:
    gate, up = ops.linears(x, (b.gate, b.up))  # (T, F)
    return ops.linear(ops.glu(gate, up), b.down)
