"""GLM-4 of 2025: the first part of each head turned in adjacent pairs, gate and up as one matrix, norms before and
after each branch. GLM Team 2024, ChatGLM, section 2; the norms are those of GLM-4-0414."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from localmoe.arch.rope import Rope
from localmoe.formats import Weight
from localmoe.kernels.ops import Cache, Ops
from localmoe.kernels.program import RopeTable, Tensor
from localmoe.loader.checkpoint import Checkpoint
from localmoe.loader.metadata import Metadata

MODEL_TYPES = ("glm4",)


@dataclass(frozen=True)
class Config:
    block_count: int
    embedding_length: int
    feed_forward_length: int
    head_count: int
    head_count_kv: int
    key_length: int
    rms_epsilon: float
    rope: Rope
    vocabulary: int

    @classmethod
    def read(cls, meta: Metadata) -> Config:
        heads, width = meta.int("attention.head_count"), meta.int("embedding_length")
        key_length = meta.int("attention.key_length", width // heads)
        meta.expect("attention.value_length", key_length)
        return cls(
            block_count=meta.int("block_count") - meta.int("nextn_predict_layers", 0),
            embedding_length=width,
            feed_forward_length=meta.int("feed_forward_length"),
            head_count=heads,
            head_count_kv=meta.int("attention.head_count_kv", heads),
            key_length=key_length,
            rms_epsilon=meta.float("attention.layer_norm_rms_epsilon"),
            rope=Rope.read(meta, key_length),
            vocabulary=meta.vocabulary,
        )


class Block(NamedTuple):
    attn_norm: Weight
    attn_qkv: tuple[Weight, Weight, Weight]
    attn_qkv_bias: tuple[Weight | None, Weight | None, Weight | None]
    attn_output: Weight
    post_attention_norm: Weight
    ffn_norm: Weight
    gate: Weight
    up: Weight
    down: Weight
    post_ffw_norm: Weight


class Weights(NamedTuple):
    embedding: Weight
    blocks: list[Block]
    norm: Weight
    output: Weight
    rope: RopeTable


def load(c: Config, get: Checkpoint) -> Weights:
    """Every tensor by name and shape. ffn_up holds gate and up, gate first; rope pairs are adjacent in folders too."""
    D, F, d = c.embedding_length, c.feed_forward_length, c.key_length
    Q, K = c.head_count * d, c.head_count_kv * d
    embedding = get("token_embd", (c.vocabulary, D))

    def block(i: int) -> Block:
        at = get.scope(f"blk.{i}")
        gate_up = at("ffn_up", (2 * F, D))
        return Block(
            attn_norm=at("attn_norm", (D,)),
            attn_qkv=(at("attn_q", (Q, D)), at("attn_k", (K, D)), at("attn_v", (K, D))),
            attn_qkv_bias=(
                at.optional("attn_q", (Q,), suffix="bias"),
                at.optional("attn_k", (K,), suffix="bias"),
                at.optional("attn_v", (K,), suffix="bias"),
            ),
            attn_output=at("attn_output", (D, Q)),
            post_attention_norm=at("post_attention_norm", (D,)),
            ffn_norm=at("ffn_norm", (D,)),
            gate=gate_up.part(0, F),
            up=gate_up.part(F, 2 * F),
            down=at("ffn_down", (D, F)),
            post_ffw_norm=at("post_ffw_norm", (D,)),
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
    for b in w.blocks:
        branch = attend(ops, c, b, w.rope, ops.rms_norm(x, b.attn_norm, c.rms_epsilon), cache)
        x = ops.add(x, ops.rms_norm(branch, b.post_attention_norm, c.rms_epsilon))
        branch = feed(ops, b, ops.rms_norm(x, b.ffn_norm, c.rms_epsilon))
        x = ops.add(x, ops.rms_norm(branch, b.post_ffw_norm, c.rms_epsilon))
    return ops.linear(ops.rms_norm(ops.logit_rows(x), w.norm, c.rms_epsilon), w.output)  # (rows, V)


def attend(ops: Ops, c: Config, b: Block, rope: RopeTable, x: Tensor, cache: Cache) -> Tensor:
    q, k, v = ops.linears(x, b.attn_qkv, b.attn_qkv_bias)
    layer = cache.append(ops.rope(k.heads(c.head_count_kv), rope), v.heads(c.head_count_kv))  # (T, K, d)
    y = ops.attention(ops.rope(q.heads(c.head_count), rope), layer, scale=c.key_length**-0.5)  # (T, H, d)
    return ops.linear(y.flat(), b.attn_output)


def feed(ops: Ops, b: Block, x: Tensor) -> Tensor:
    gate, up = ops.linears(x, (b.gate, b.up))  # (T, F)
    return ops.linear(ops.glu(gate, up), b.down)
