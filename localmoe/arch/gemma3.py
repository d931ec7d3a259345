"""Gemma 3, its text: windows in five layers of six with a rope base of their own, head norms, norms before and after
each branch. Gemma Team 2025, Gemma 3 Technical Report, section 2."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from localmoe.arch.rope import Rope
from localmoe.formats import Weight
from localmoe.kernels.ops import Cache, Ops
from localmoe.kernels.program import RopeTable, Tensor
from localmoe.loader.checkpoint import Checkpoint
from localmoe.loader.metadata import Metadata

MODEL_TYPES = ("gemma3",)
BLOCKS_OF_27B = 62  # whose softmax scale GGUF has no key for: that of embedding_length / head_count


@dataclass(frozen=True)
class Config:
    block_count: int
    embedding_length: int
    feed_forward_length: int
    head_count: int
    head_count_kv: int
    key_length: int
    windows: tuple[int, ...]  # of each layer, 0 for none
    attention_scale: float
    logit_softcap: float
    rms_epsilon: float
    rope: Rope
    local_rope: Rope  # of layers with a window
    vocabulary: int

    @classmethod
    def read(cls, meta: Metadata) -> Config:
        heads, width, blocks = meta.int("attention.head_count"), meta.int("embedding_length"), meta.int("block_count")
        key_length = meta.int("attention.key_length", width // heads)
        meta.expect("attention.value_length", key_length)
        window = meta.int("attention.sliding_window", 0)
        scaled_by = width // heads if blocks == BLOCKS_OF_27B else key_length
        rope = Rope.read(meta, key_length)
        return cls(
            block_count=blocks,
            embedding_length=width,
            feed_forward_length=meta.int("feed_forward_length"),
            head_count=heads,
            head_count_kv=meta.int("attention.head_count_kv", heads),
            key_length=key_length,
            windows=tuple(window * on for on in meta.pattern("attention.sliding_window_pattern", blocks, 6)),
            attention_scale=meta.float("attention.scale", scaled_by**-0.5),
            logit_softcap=meta.float("final_logit_softcapping", 0.0),
            rms_epsilon=meta.float("attention.layer_norm_rms_epsilon"),
            rope=rope,
            local_rope=rope.windowed(meta, rope.dimensions),
            vocabulary=meta.vocabulary,
        )


class Block(NamedTuple):
    attn_norm: Weight
    attn_qkv: tuple[Weight, Weight, Weight]
    attn_q_norm: Weight
    attn_k_norm: Weight
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
    local_rope: RopeTable


def load(c: Config, get: Checkpoint) -> Weights:
    """Every tensor by name and shape. Norm weights have their 1 added, as llama.cpp's converter leaves them."""
    D, F, d = c.embedding_length, c.feed_forward_length, c.key_length
    Q, K = c.head_count * d, c.head_count_kv * d
    embedding = get("token_embd", (c.vocabulary, D))

    def block(i: int) -> Block:
        at = get.scope(f"blk.{i}")
        return Block(
            attn_norm=at("attn_norm", (D,)),
            attn_qkv=(at("attn_q", (Q, D)), at("attn_k", (K, D)), at("attn_v", (K, D))),
            attn_q_norm=at("attn_q_norm", (d,)),
            attn_k_norm=at("attn_k_norm", (d,)),
            attn_output=at("attn_output", (D, Q)),
            post_attention_norm=at("post_attention_norm", (D,)),
            ffn_norm=at("ffn_norm", (D,)),
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
    x = ops.scale(ops.embed(w.embedding, tokens), c.embedding_length**0.5)  # (T, D)
    for b, window in zip(w.blocks, c.windows, strict=True):
        rope = w.local_rope if window else w.rope
        branch = attend(ops, c, b, rope, window, ops.rms_norm(x, b.attn_norm, c.rms_epsilon), cache)
        x = ops.add(x, ops.rms_norm(branch, b.post_attention_norm, c.rms_epsilon))
        branch = feed(ops, b, ops.rms_norm(x, b.ffn_norm, c.rms_epsilon))
        x = ops.add(x, ops.rms_norm(branch, b.post_ffw_norm, c.rms_epsilon))
    y = ops.linear(ops.rms_norm(ops.logit_rows(x), w.norm, c.rms_epsilon), w.output)  # (rows, V)
    return ops.softcap(y, c.logit_softcap) if c.logit_softcap else y


def attend(ops: Ops, c: Config, b: Block, rope: RopeTable, window: int, x: Tensor, cache: Cache) -> Tensor:
    q, k, v = ops.linears(x, b.attn_qkv)
    q = ops.rms_norm(q.heads(c.head_count), b.attn_q_norm, c.rms_epsilon)  # (T, H, d), each head by itself
    k = ops.rms_norm(k.heads(c.head_count_kv), b.attn_k_norm, c.rms_epsilon)  # (T, K, d)
    layer = cache.append(ops.rope(k, rope), v.heads(c.head_count_kv))
    q = ops.rope(q, rope)
    y = ops.attention(q, layer, scale=c.attention_scale, window=window)
    return ops.linear(y.flat(), b.attn_output)


def feed(ops: Ops, b: Block, x: Tensor) -> Tensor:
    gate, up = ops.linears(x, (b.gate, b.up))  # (T, F)
    return ops.linear(ops.glu(gate, up, "gelu"), b.down)
