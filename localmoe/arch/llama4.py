"""Llama 4 Scout and Maverick, their text: rope and chunks in three layers of four, neither in the fourth; one routed
expert beside a shared one. Meta 2025, Llama 4 model card; temperature: Nakanishi 2025, Scalable-Softmax."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from localmoe.arch.rope import Rope
from localmoe.formats import Weight
from localmoe.kernels.ops import Cache, Ops
from localmoe.kernels.program import RopeTable, Router, Temperature, Tensor
from localmoe.loader.checkpoint import Checkpoint
from localmoe.loader.metadata import Metadata

MODEL_TYPES = ("llama4",)
MAVERICK_EXPERTS = 128


@dataclass(frozen=True)
class Config:
    block_count: int
    embedding_length: int
    feed_forward_length: int
    head_count: int
    head_count_kv: int
    key_length: int
    chunk: int
    turned: tuple[bool, ...]  # layers with rope and chunks; the others see everything, unturned, with warmed queries
    qk_norm: bool
    temperature: Temperature | None
    moe_layer_step: int
    expert_count: int
    expert_feed_forward_length: int
    router: Router
    rms_epsilon: float
    rope: Rope
    vocabulary: int

    @classmethod
    def read(cls, meta: Metadata) -> Config:
        heads, width, blocks = meta.int("attention.head_count"), meta.int("embedding_length"), meta.int("block_count")
        key_length, experts = meta.int("attention.key_length", width // heads), meta.int("expert_count")
        meta.expect("attention.value_length", key_length)
        meta.expect("expert_used_count", 1, absent_ok=False)
        meta.expect("expert_gating_func", 0, 2)
        meta.expect("expert_weights_norm", False)
        meta.expect("expert_weights_scale", 0.0, 1.0)
        if meta.has("attention.sliding_window") and not meta.int("attention.sliding_window"):
            meta.expect("attention.sliding_window")  # to llama.cpp 0 means rope in every layer: no released model
        # GGUF has no key for the next four: llama.cpp takes the released models' own numbers.
        warmth, length = meta.float("attention.temperature_scale", 0.1), meta.int("attention.temperature_length", 8192)
        return cls(
            block_count=blocks,
            embedding_length=width,
            feed_forward_length=meta.int("feed_forward_length"),
            head_count=heads,
            head_count_kv=meta.int("attention.head_count_kv", heads),
            key_length=key_length,
            chunk=meta.int("attention.sliding_window", 8192),
            turned=meta.pattern("attention.sliding_window_pattern", blocks, 4),
            qk_norm=meta.bool("attention.qk_norm", experts != MAVERICK_EXPERTS),
            temperature=Temperature(warmth, length, offset=1) if warmth and length else None,
            moe_layer_step=meta.int("interleave_moe_layer_step"),
            expert_count=experts,
            expert_feed_forward_length=meta.int("expert_feed_forward_length"),
            router=Router("sigmoid", 1, normalise=False, choice="logits"),
            rms_epsilon=meta.float("attention.layer_norm_rms_epsilon"),
            rope=Rope.read(meta, key_length),
            vocabulary=meta.vocabulary,
        )

    def sparse(self, layer: int) -> bool:
        return self.moe_layer_step > 0 and (layer + 1) % self.moe_layer_step == 0


class Feed(NamedTuple):
    gate: Weight
    up: Weight
    down: Weight


class Block(NamedTuple):
    attn_norm: Weight
    attn_qkv: tuple[Weight, Weight, Weight]
    attn_output: Weight
    ffn_norm: Weight
    dense: Feed  # of a dense layer, or the shared expert
    router: Weight | None
    experts: Feed | None


class Weights(NamedTuple):
    embedding: Weight
    blocks: list[Block]
    norm: Weight
    output: Weight
    rope: RopeTable


def load(c: Config, get: Checkpoint) -> Weights:
    """Every tensor by name and shape. Rope pairs are adjacent in folders too: llama.cpp does not permute these."""
    embedding = get("token_embd", (c.vocabulary, c.embedding_length))
    return Weights(
        embedding=embedding,
        blocks=[load_block(c, get.scope(f"blk.{i}"), c.sparse(i)) for i in range(c.block_count)],
        norm=get("output_norm", (c.embedding_length,)),
        output=get.optional("output", (c.vocabulary, c.embedding_length)) or embedding,
        rope=c.rope.table("pairs", get.optional("rope_freqs", (c.rope.dimensions // 2,))),
    )


def load_block(c: Config, at: Checkpoint, sparse: bool) -> Block:
    D, E, F, d = c.embedding_length, c.expert_count, c.expert_feed_forward_length, c.key_length
    Q, K = c.head_count * d, c.head_count_kv * d
    suffix, S = ("_shexp", F) if sparse else ("", c.feed_forward_length)
    dense = (at(f"ffn_gate{suffix}", (S, D)), at(f"ffn_up{suffix}", (S, D)), at(f"ffn_down{suffix}", (D, S)))
    stacks = ("ffn_gate_exps", (E, F, D)), ("ffn_up_exps", (E, F, D)), ("ffn_down_exps", (E, D, F))
    return Block(
        attn_norm=at("attn_norm", (D,)),
        attn_qkv=(at("attn_q", (Q, D)), at("attn_k", (K, D)), at("attn_v", (K, D))),
        attn_output=at("attn_output", (D, Q)),
        ffn_norm=at("ffn_norm", (D,)),
        dense=Feed(*dense),
        router=at("ffn_gate_inp", (E, D)) if sparse else None,
        experts=Feed(*(at.experts(name, shape) for name, shape in stacks)) if sparse else None,
    )


def forward(ops: Ops, c: Config, w: Weights, tokens: Tensor, cache: Cache) -> Tensor:
    """Token ids (T,) -> logits of the wanted rows (rows, V)."""
    x = ops.embed(w.embedding, tokens)  # (T, D)
    for b, turned in zip(w.blocks, c.turned, strict=True):
        rope = w.rope if turned else None
        x = ops.add(x, attend(ops, c, b, rope, ops.rms_norm(x, b.attn_norm, c.rms_epsilon), cache))
        x = ops.add(x, mix(ops, c, b, ops.rms_norm(x, b.ffn_norm, c.rms_epsilon)))
    return ops.linear(ops.rms_norm(ops.logit_rows(x), w.norm, c.rms_epsilon), w.output)  # (rows, V)


def attend(ops: Ops, c: Config, b: Block, rope: RopeTable | None, x: Tensor, cache: Cache) -> Tensor:
    q, k, v = ops.linears(x, b.attn_qkv)
    q, k, v = q.heads(c.head_count), k.heads(c.head_count_kv), v.heads(c.head_count_kv)  # (T, H, d), (T, K, d)
    if rope is None:
        y = ops.attention(q, cache.append(k, v), scale=c.key_length**-0.5, temperature=c.temperature)
    else:
        q, k = ops.rope(q, rope), ops.rope(k, rope)
        if c.qk_norm:
            q, k = ops.rms_norm(q, None, c.rms_epsilon), ops.rms_norm(k, None, c.rms_epsilon)
        y = ops.attention(q, cache.append(k, v), scale=c.key_length**-0.5, chunk=c.chunk)
    return ops.linear(y.flat(), b.attn_output)


def feed(ops: Ops, x: Tensor, weights: Feed) -> Tensor:
    gate, up = ops.linears(x, (weights.gate, weights.up))  # (T, F)
    return ops.linear(ops.glu(gate, up), weights.down)


def mix(ops: Ops, c: Config, b: Block, x: Tensor) -> Tensor:
    """The chosen expert's share multiplies its input, not its output."""
    dense = feed(ops, x, b.dense)
    if b.router is None or b.experts is None:
        return dense
    ids, shares = ops.route(ops.linear(x, b.router, exact=True), c.router)  # (T, 1) each
    weighted = ops.glu(shares, x, "product")
    return ops.add(dense, ops.experts(weighted, ids, shares, *b.experts, weighted=False))
