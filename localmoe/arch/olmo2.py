"""OLMo 2 and 3: q and k normed over their whole width, norms after each branch and none before. OLMo Team 2024, 2 OLMo
2 Furious, section 2.1. OLMo 3 has windows in three layers of four, and stretches the rope of the others alone."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

from localmoe.arch.rope import Rope
from localmoe.formats import Weight
from localmoe.kernels.ops import Cache, Ops
from localmoe.kernels.program import RopeTable, Tensor
from localmoe.loader.checkpoint import Checkpoint
from localmoe.loader.metadata import Metadata

MODEL_TYPES = ("olmo2",)


@dataclass(frozen=True)
class Config:
    block_count: int
    embedding_length: int
    feed_forward_length: int
    head_count: int
    head_count_kv: int
    key_length: int
    windows: tuple[int, ...]  # of each layer, 0 for none
    rms_epsilon: float
    rope: Rope
    local_rope: Rope  # of layers with a window
    vocabulary: int

    @classmethod
    def read(cls, meta: Metadata) -> Config:
        heads, width = meta.int("attention.head_count"), meta.int("embedding_length")
        key_length = meta.int("attention.key_length", width // heads)
        meta.expect("attention.value_length", key_length)
        blocks, window = meta.int("block_count"), meta.int("attention.sliding_window", 0)  # OLMo 3 has windows
        pattern = meta.pattern("attention.sliding_window_pattern", blocks, 4)
        rope = Rope.read(meta, key_length)
        return cls(
            block_count=blocks,
            embedding_length=width,
            feed_forward_length=meta.int("feed_forward_length"),
            head_count=heads,
            head_count_kv=meta.int("attention.head_count_kv", heads),
            key_length=key_length,
            windows=tuple(window * on for on in pattern),
            rms_epsilon=meta.float("attention.layer_norm_rms_epsilon"),
            rope=rope,
            local_rope=replace(rope, scaling="none", base=meta.float("rope.freq_base_swa", rope.base)),
            vocabulary=meta.vocabulary,
        )


class Block(NamedTuple):
    attn_qkv: tuple[Weight, Weight, Weight]
    attn_q_norm: Weight
    attn_k_norm: Weight
    attn_output: Weight
    post_attention_norm: Weight
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
    local_rope: RopeTable


def load(c: Config, get: Checkpoint) -> Weights:
    """Ask for every tensor by name and shape; one that differs is refused with what was expected."""
    D, F, d = c.embedding_length, c.feed_forward_length, c.key_length
    Q, K = c.head_count * d, c.head_count_kv * d
    embedding = get("token_embd", (c.vocabulary, D))

    def block(i: int) -> Block:
        at = get.scope(f"blk.{i}")
        return Block(
            attn_qkv=(at("attn_q", (Q, D)), at("attn_k", (K, D)), at("attn_v", (K, D))),
            attn_q_norm=at("attn_q_norm", (Q,)),
            attn_k_norm=at("attn_k_norm", (K,)),
            attn_output=at("attn_output", (D, Q)),
            post_attention_norm=at("post_attention_norm", (D,)),
            gate=at("ffn_gate", (F, D)),
            up=at("ffn_up", (F, D)),
            down=at("ffn_down", (D, F)),
            post_ffw_norm=at("post_ffw_norm", (D,)),
        )

    return Weights(
        embedding=embedding,
        blocks=[block(i) for i in range(c.block_count)],
        norm=get("output_norm", (D,)),
        output=get.optional("output", (c.vocabulary, D)) or embedding,
        rope=c.rope.table("halves"),
        local_rope=c.local_rope.table("halves"),
    )


def forward(ops: Ops, c: Config, w: Weights, tokens: Tensor, cache: Cache) -> Tensor:
    """Token ids (T,) -> logits of the wanted rows (rows, V)."""
    x = ops.embed(w.embedding, tokens)  # (T, D)
    for b, window in zip(w.blocks, c.windows, strict=True):
        branch = attend(ops, c, b, w.local_rope if window else w.rope, window, x, cache)
        x = ops.add(x, ops.rms_norm(branch, b.post_attention_norm, c.rms_epsilon))
        x = ops.add(x, ops.rms_norm(feed(ops, b, x), b.post_ffw_norm, c.rms_epsilon))
    return ops.linear(ops.rms_norm(ops.logit_rows(x), w.norm, c.rms_epsilon), w.output)  # (rows, V)


def attend(ops: Ops, c: Config, b: Block, rope: RopeTable, window: int, x: Tensor, cache: Cache) -> Tensor:
    q, k, v = ops.linears(x, b.attn_qkv)
    q = ops.rms_norm(q, b.attn_q_norm, c.rms_epsilon).heads(c.head_count)  # (T, H, d), normed over all heads
    k = ops.rms_norm(k, b.attn_k_norm, c.rms_epsilon).heads(c.head_count_kv)  # (T, K, d)
    layer = cache.append(ops.rope(k, rope), v.heads(c.head_count_kv))
    y = ops.attention(ops.rope(q, rope), layer, scale=c.key_length**-0.5, window=window)
    return ops.linear(y.flat(), b.attn_output)


def feed(ops: Ops, b: Block, x: Tensor) -> Tensor:
    gate, up = ops.linears(x, (b.gate, b.up))  # (T, F)
    return ops.linear(ops.glu(gate, up), b.down)
