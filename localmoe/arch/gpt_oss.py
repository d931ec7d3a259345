"""gpt-oss: attention with sinks, a window in every other layer; clamped SwiGLU experts, biases throughout. OpenAI 2025,
gpt-oss model card, section 2."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

from localmoe.arch.rope import Rope
from localmoe.formats import Weight
from localmoe.kernels.ops import Cache, Ops
from localmoe.kernels.program import RopeTable, Router, Tensor
from localmoe.loader.checkpoint import Checkpoint
from localmoe.loader.metadata import Metadata

MODEL_TYPES = ("gpt-oss",)


@dataclass(frozen=True)
class Config:
    block_count: int
    embedding_length: int
    head_count: int
    head_count_kv: int
    key_length: int
    windows: tuple[int, ...]  # of each layer, 0 for none
    expert_count: int
    expert_feed_forward_length: int
    router: Router
    rms_epsilon: float
    rope: Rope
    vocabulary: int

    @classmethod
    def read(cls, meta: Metadata) -> Config:
        heads, width = meta.int("attention.head_count"), meta.int("embedding_length")
        key_length = meta.int("attention.key_length", width // heads)
        meta.expect("attention.value_length", key_length)
        meta.expect("expert_gating_func", 0, 1, 3)
        meta.expect("expert_weights_norm", True)
        meta.expect("expert_weights_scale", 0.0, 1.0)
        blocks, window = meta.int("block_count"), meta.int("attention.sliding_window")
        # The model was trained without rounding YaRN's ramp to whole dimensions, which llama.cpp does.
        rope = replace(Rope.read(meta, key_length), truncate=meta.bool("rope.scaling.yarn_truncate", False))
        return cls(
            block_count=blocks,
            embedding_length=width,
            head_count=heads,
            head_count_kv=meta.int("attention.head_count_kv", heads),
            key_length=key_length,
            windows=tuple(window * on for on in meta.pattern("attention.sliding_window_pattern", blocks, 2)),
            expert_count=meta.int("expert_count"),
            expert_feed_forward_length=meta.int("expert_feed_forward_length"),
            # A softmax over all that is renormalised over the chosen is a softmax over the chosen.
            router=Router("softmax", meta.int("expert_used_count"), normalise=True, choice="logits"),
            rms_epsilon=meta.float("attention.layer_norm_rms_epsilon"),
            rope=rope,
            vocabulary=meta.vocabulary,
        )


class Block(NamedTuple):
    attn_norm: Weight
    attn_qkv: tuple[Weight, Weight, Weight]
    attn_qkv_bias: tuple[Weight, Weight, Weight]
    attn_output: Weight
    attn_output_bias: Weight
    attn_sinks: Weight
    post_attention_norm: Weight
    router: Weight
    router_bias: Weight
    gate: Weight
    up: Weight
    down: Weight
    biases: tuple[Weight, Weight, Weight]  # of gate, up, down


class Weights(NamedTuple):
    embedding: Weight
    blocks: list[Block]
    norm: Weight
    output: Weight
    rope: RopeTable


def load(c: Config, get: Checkpoint) -> Weights:
    """Every tensor by name and shape. post_attention_norm stands before the experts, whatever its name says."""
    D, E, F, d = c.embedding_length, c.expert_count, c.expert_feed_forward_length, c.key_length
    Q, K = c.head_count * d, c.head_count_kv * d
    embedding = get("token_embd", (c.vocabulary, D))

    def block(i: int) -> Block:
        at = get.scope(f"blk.{i}")
        return Block(
            attn_norm=at("attn_norm", (D,)),
            attn_qkv=(at("attn_q", (Q, D)), at("attn_k", (K, D)), at("attn_v", (K, D))),
            attn_qkv_bias=(at.bias("attn_q", (Q,)), at.bias("attn_k", (K,)), at.bias("attn_v", (K,))),
            attn_output=at("attn_output", (D, Q)),
            attn_output_bias=at.bias("attn_output", (D,)),
            attn_sinks=at("attn_sinks", (c.head_count,)),
            post_attention_norm=at("post_attention_norm", (D,)),
            router=at("ffn_gate_inp", (E, D)),
            router_bias=at.bias("ffn_gate_inp", (E,)),
            gate=at.experts("ffn_gate_exps", (E, F, D)),
            up=at.experts("ffn_up_exps", (E, F, D)),
            down=at.experts("ffn_down_exps", (E, D, F)),
            biases=(at.bias("ffn_gate_exps", (E, F)), at.bias("ffn_up_exps", (E, F)), at.bias("ffn_down_exps", (E, D))),
        )

    return Weights(
        embedding=embedding,
        blocks=[block(i) for i in range(c.block_count)],
        norm=get("output_norm", (D,)),
        output=get.optional("output", (c.vocabulary, D)) or embedding,
        rope=c.rope.table("halves"),
    )


def forward(ops: Ops, c: Config, w: Weights, tokens: Tensor, cache: Cache) -> Tensor:
    """Token ids (T,) -> logits of the wanted rows (rows, V)."""
    x = ops.embed(w.embedding, tokens)  # (T, D)
    for b, window in zip(w.blocks, c.windows, strict=True):
        x = ops.add(x, attend(ops, c, b, w.rope, window, ops.rms_norm(x, b.attn_norm, c.rms_epsilon), cache))
        x = ops.add(x, mix(ops, c, b, ops.rms_norm(x, b.post_attention_norm, c.rms_epsilon)))
    return ops.linear(ops.rms_norm(ops.logit_rows(x), w.norm, c.rms_epsilon), w.output)  # (rows, V)


def attend(ops: Ops, c: Config, b: Block, rope: RopeTable, window: int, x: Tensor, cache: Cache) -> Tensor:
    q, k, v = ops.linears(x, b.attn_qkv, b.attn_qkv_bias)
    k = ops.rope(k.heads(c.head_count_kv), rope)  # (T, K, d)
    q = ops.rope(q.heads(c.head_count), rope)  # (T, H, d)
    layer = cache.append(k, v.heads(c.head_count_kv))
    y = ops.attention(q, layer, scale=c.key_length**-0.5, window=window, sinks=b.attn_sinks)
    return ops.linear(y.flat(), b.attn_output, b.attn_output_bias)


def mix(ops: Ops, c: Config, b: Block, x: Tensor) -> Tensor:
    ids, shares = ops.route(ops.linear(x, b.router, b.router_bias, exact=True), c.router)  # (T, k) each
    return ops.experts(x, ids, shares, b.gate, b.up, b.down, "clamped_swish", biases=b.biases)
