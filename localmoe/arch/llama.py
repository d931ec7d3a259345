"""Llama 1-3, Mistral and Mixtral: grouped-query attention, SwiGLU or softmax top-k experts. Touvron et al. 2023; Jiang
et al. 2024."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from localmoe.arch.rope import Rope
from localmoe.formats import Weight
from localmoe.kernels.ops import Cache, Ops
from localmoe.kernels.program import CacheLayer, RopeTable, Router, Tensor
from localmoe.loader.checkpoint import Checkpoint
from localmoe.loader.metadata import Metadata

MODEL_TYPES = ("llama",)


@dataclass(frozen=True)
class Config:
    block_count: int
    embedding_length: int
    feed_forward_length: int
    head_count: int
    head_count_kv: int
    key_length: int
    expert_count: int
    expert_used_count: int
    sliding_window: int
    rms_epsilon: float
    rope: Rope
    vocabulary: int

    @classmethod
    def read(cls, meta: Metadata) -> Config:
        heads, width = meta.int("attention.head_count"), meta.int("embedding_length")
        key_length = meta.int("attention.key_length", width // heads)
        meta.expect("attention.value_length", key_length)
        meta.expect("expert_shared_count", 0)
        meta.expect("expert_weights_scale", 0.0, 1.0)
        meta.expect("expert_weights_norm", True)
        meta.expect("expert_gating_func", 0, 1)
        experts = meta.int("expert_count", 0)
        return cls(
            block_count=meta.int("block_count"),
            embedding_length=width,
            feed_forward_length=meta.int("expert_feed_forward_length", meta.int("feed_forward_length")),
            head_count=heads,
            head_count_kv=meta.int("attention.head_count_kv", heads),
            key_length=key_length,
            expert_count=experts,
            expert_used_count=meta.int("expert_used_count", 0),
            sliding_window=meta.int("attention.sliding_window", 0),
            rms_epsilon=meta.float("attention.layer_norm_rms_epsilon"),
            rope=Rope.read(meta, key_length),
            vocabulary=meta.vocabulary,
        )

    @property
    def router(self) -> Router:
        """Mixtral: softmax over all, the best two, their shares made to sum to 1."""
        return Router("softmax", self.expert_used_count, normalise=True)


class Block(NamedTuple):
    attn_norm: Weight
    attn_qkv: tuple[Weight, Weight, Weight]
    attn_qkv_bias: tuple[Weight | None, Weight | None, Weight | None]
    attn_output: Weight
    attn_output_bias: Weight | None
    ffn_norm: Weight
    router: Weight | None  # with it, gate, up and down are experts
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
    """Every tensor by name and shape. GGUF stores q and k of this family permuted to adjacent rope pairs."""
    D, F, E, d = c.embedding_length, c.feed_forward_length, c.expert_count, c.key_length
    Q, K = c.head_count * d, c.head_count_kv * d
    embedding = get("token_embd", (c.vocabulary, D))

    def block(i: int) -> Block:
        at = get.scope(f"blk.{i}")
        return Block(
            attn_norm=at("attn_norm", (D,)),
            attn_qkv=(at("attn_q", (Q, D)), at("attn_k", (K, D)), at("attn_v", (K, D))),
            attn_qkv_bias=(
                at.optional("attn_q", (Q,), suffix="bias"),
                at.optional("attn_k", (K,), suffix="bias"),
                at.optional("attn_v", (K,), suffix="bias"),
            ),
            attn_output=at("attn_output", (D, Q)),
            attn_output_bias=at.optional("attn_output", (D,), suffix="bias"),
            ffn_norm=at("ffn_norm", (D,)),
            router=at("ffn_gate_inp", (E, D)) if E else None,
            gate=at.experts("ffn_gate_exps", (E, F, D)) if E else at("ffn_gate", (F, D)),
            up=at.experts("ffn_up_exps", (E, F, D)) if E else at("ffn_up", (F, D)),
            down=at.experts("ffn_down_exps", (E, D, F)) if E else at("ffn_down", (D, F)),
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
    for b in w.blocks:
        x = ops.add(x, attend(ops, c, b, w.rope, ops.rms_norm(x, b.attn_norm, c.rms_epsilon), cache))
        h = ops.rms_norm(x, b.ffn_norm, c.rms_epsilon)
        x = ops.add(x, mix(ops, c, b, b.router, h) if b.router else feed(ops, b, h))
    return ops.linear(ops.rms_norm(ops.logit_rows(x), w.norm, c.rms_epsilon), w.output)  # (rows, V)


def attend(ops: Ops, c: Config, b: Block, rope: RopeTable, x: Tensor, cache: Cache) -> Tensor:
    q, k, v = ops.linears(x, b.attn_qkv, b.attn_qkv_bias)
    k = ops.rope(k.heads(c.head_count_kv), rope)  # (T, K, d)
    q = ops.rope(q.heads(c.head_count), rope)  # (T, H, d)
    layer: CacheLayer = cache.append(k, v.heads(c.head_count_kv))
    y = ops.attention(q, layer, scale=c.key_length**-0.5, window=c.sliding_window)
    return ops.linear(y.flat(), b.attn_output, b.attn_output_bias)


def feed(ops: Ops, b: Block, x: Tensor) -> Tensor:
    gate, up = ops.linears(x, (b.gate, b.up))  # (T, F)
    return ops.linear(ops.glu(gate, up), b.down)


def mix(ops: Ops, c: Config, b: Block, router: Weight, x: Tensor) -> Tensor:
    ids, shares = ops.route(ops.linear(x, router, exact=True), c.router)  # (T, k) each
    return ops.experts(x, ids, shares, b.gate, b.up, b.down)
