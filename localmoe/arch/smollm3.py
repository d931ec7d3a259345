"""SmolLM3: Llama without rope in every fourth layer. Bakouch et al. 2025, SmolLM3; Yang et al. 2025, Rope to Nope and
Back Again."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from localmoe.arch.rope import Rope
from localmoe.formats import Weight
from localmoe.kernels.ops import Cache, Ops
from localmoe.kernels.program import RopeTable, Tensor
from localmoe.loader.checkpoint import Checkpoint
from localmoe.loader.metadata import Metadata

MODEL_TYPES = ("smollm3",)


@dataclass(frozen=True)
class Config:
    block_count: int
    embedding_length: int
    feed_forward_length: int
    head_count: int
    head_count_kv: int
    key_length: int
    turned: tuple[bool, ...]  # layers with rope
    rms_epsilon: float
    rope: Rope
    vocabulary: int

    @classmethod
    def read(cls, meta: Metadata) -> Config:
        heads, width, blocks = meta.int("attention.head_count"), meta.int("embedding_length"), meta.int("block_count")
        key_length = meta.int("attention.key_length", width // heads)
        meta.expect("attention.value_length", key_length)
        return cls(
            block_count=blocks,
            embedding_length=width,
            feed_forward_length=meta.int("feed_forward_length"),
            head_count=heads,
            head_count_kv=meta.int("attention.head_count_kv", heads),
            key_length=key_length,
            turned=meta.pattern("rope.layer_pattern", blocks, 4),  # no key of GGUF's: llama.cpp has it in its code
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
        rope=c.rope.table(
            "pairs" if get.source.rope_permuted else "halves", get.optional("rope_freqs", (c.rope.dimensions // 2,))
        ),
    )


def forward(ops: Ops, c: Config, w: Weights, tokens: Tensor, cache: Cache) -> Tensor:
    """Token ids (T,) -> logits of the wanted rows (rows, V)."""
    x = ops.embed(w.embedding, tokens)  # (T, D)
    for b, turned in zip(w.blocks, c.turned, strict=True):
        rope = w.rope if turned else None
        x = ops.add(x, attend(ops, c, b, rope, ops.rms_norm(x, b.attn_norm, c.rms_epsilon), cache))
        x = ops.add(x, feed(ops, b, ops.rms_norm(x, b.ffn_norm, c.rms_epsilon)))
    return ops.linear(ops.rms_norm(ops.logit_rows(x), w.norm, c.rms_epsilon), w.output)  # (rows, V)


def attend(ops: Ops, c: Config, b: Block, rope: RopeTable | None, x: Tensor, cache: Cache) -> Tensor:
    q, k, v = ops.linears(x, b.attn_qkv)
    q, k, v = q.heads(c.head_count), k.heads(c.head_count_kv), v.heads(c.head_count_kv)  # (T, H, d), (T, K, d)
    if rope:
        q, k = ops.rope(q, rope), ops.rope(k, rope)
    y = ops.attention(q, cache.append(k, v), scale=c.key_length**-0.5)
    return ops.linear(y.flat(), b.attn_output)


def feed(ops: Ops, b: Block, x: Tensor) -> Tensor:
    gate, up = ops.linears(x, (b.gate, b.up))  # (T, F)
    return ops.linear(ops.glu(gate, up), b.down)
