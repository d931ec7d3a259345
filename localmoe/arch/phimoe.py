"""Phi-3.5-MoE: layer norms, biases in attention, LongRoPE, two experts chosen one after the other by sparse mixing.
Abdin et al. 2024, Phi-3 Technical Report, section 2; Liu et al. 2024, GRIN, section 2.2."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

from localmoe.arch.rope import Rope
from localmoe.formats import Weight
from localmoe.kernels.ops import Cache, Ops
from localmoe.kernels.program import RopeTable, Router, Tensor
from localmoe.loader.checkpoint import Checkpoint
from localmoe.loader.metadata import Metadata

MODEL_TYPES = ("phimoe",)
JITTER = 0.01  # router_jitter_noise of every released model; GGUF has no key for it


@dataclass(frozen=True)
class Config:
    block_count: int
    embedding_length: int
    head_count: int
    head_count_kv: int
    key_length: int
    sliding_window: int
    expert_count: int
    expert_feed_forward_length: int
    router: Router
    epsilon: float
    rope: Rope
    vocabulary: int

    @classmethod
    def read(cls, meta: Metadata) -> Config:
        heads, width = meta.int("attention.head_count"), meta.int("embedding_length")
        key_length = meta.int("attention.key_length", width // heads)
        meta.expect("attention.value_length", key_length)
        meta.expect("expert_gating_func", 0, 1)
        meta.expect("expert_used_count", 2, absent_ok=False)
        meta.expect("rope.scaling.type", "none")  # the two tensors of factors are all the scaling that there is
        return cls(
            block_count=meta.int("block_count"),
            embedding_length=width,
            head_count=heads,
            head_count_kv=meta.int("attention.head_count_kv", heads),
            key_length=key_length,
            sliding_window=meta.int("attention.sliding_window", 0),
            expert_count=meta.int("expert_count"),
            expert_feed_forward_length=meta.int("expert_feed_forward_length", meta.int("feed_forward_length", 0)),
            router=Router(
                "sparsemixer", 2, normalise=False, choice="logits", jitter=meta.float("expert_router_jitter", JITTER)
            ),
            epsilon=meta.float("attention.layer_norm_rms_epsilon"),
            rope=Rope.read(meta, key_length),
            vocabulary=meta.vocabulary,
        )


class Norm(NamedTuple):
    weight: Weight
    bias: Weight


class Block(NamedTuple):
    attn_norm: Norm
    attn_qkv: tuple[Weight, Weight, Weight]
    attn_qkv_bias: tuple[Weight | None, Weight | None, Weight | None]
    attn_output: Weight
    attn_output_bias: Weight | None
    ffn_norm: Norm
    router: Weight
    gate: Weight
    up: Weight
    down: Weight


class Weights(NamedTuple):
    embedding: Weight
    blocks: list[Block]
    norm: Norm
    output: Weight
    output_bias: Weight | None
    rope: RopeTable


def load(c: Config, get: Checkpoint) -> Weights:
    """Every tensor by name and shape."""
    D, E, F, d = c.embedding_length, c.expert_count, c.expert_feed_forward_length, c.key_length
    Q, K = c.head_count * d, c.head_count_kv * d
    embedding = get("token_embd", (c.vocabulary, D))

    def block(i: int) -> Block:
        at = get.scope(f"blk.{i}")
        return Block(
            attn_norm=Norm(at("attn_norm", (D,)), at.bias("attn_norm", (D,))),
            attn_qkv=(at("attn_q", (Q, D)), at("attn_k", (K, D)), at("attn_v", (K, D))),
            attn_qkv_bias=(
                at.optional("attn_q", (Q,), suffix="bias"),
                at.optional("attn_k", (K,), suffix="bias"),
                at.optional("attn_v", (K,), suffix="bias"),
            ),
            attn_output=at("attn_output", (D, Q)),
            attn_output_bias=at.optional("attn_output", (D,), suffix="bias"),
            ffn_norm=Norm(at("ffn_norm", (D,)), at.bias("ffn_norm", (D,))),
            router=at("ffn_gate_inp", (E, D)),
            gate=at.experts("ffn_gate_exps", (E, F, D)),
            up=at.experts("ffn_up_exps", (E, F, D)),
            down=at.experts("ffn_down_exps", (E, D, F)),
        )

    return Weights(
        embedding=embedding,
        blocks=[block(i) for i in range(c.block_count)],
        norm=Norm(get("output_norm", (D,)), get.bias("output_norm", (D,))),
        output=get.optional("output", (c.vocabulary, D)) or embedding,
        output_bias=get.optional("output", (c.vocabulary,), suffix="bias"),
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
        x = ops.add(x, attend(ops, c, b, w.rope, ops.layer_norm(x, *b.attn_norm, c.epsilon), cache))
        x = ops.add(x, mix(ops, c, b, ops.layer_norm(x, *b.ffn_norm, c.epsilon)))
    return ops.linear(ops.layer_norm(ops.logit_rows(x), *w.norm, c.epsilon), w.output, w.output_bias)  # (rows, V)


def attend(ops: Ops, c: Config, b: Block, rope: RopeTable, x: Tensor, cache: Cache) -> Tensor:
    q, k, v = ops.linears(x, b.attn_qkv, b.attn_qkv_bias)
    k = ops.rope(k.heads(c.head_count_kv), rope)  # (T, K, d)
    q = ops.rope(q.heads(c.head_count), rope)  # (T, H, d)
    layer = cache.append(k, v.heads(c.head_count_kv))
    y = ops.attention(q, layer, scale=c.key_length**-0.5, window=c.sliding_window)
    return ops.linear(y.flat(), b.attn_output, b.attn_output_bias)


def mix(ops: Ops, c: Config, b: Block, x: Tensor) -> Tensor:
    ids, shares = ops.route(ops.linear(x, b.router, exact=True), c.router)  # (T, 2) each
    return ops.experts(x, ids, shares, b.gate, b.up, b.down)
