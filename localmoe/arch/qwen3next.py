"""Qwen3-Next: three layers of four with a gated delta net (Yang et al. 2024) for attention, the fourth with attention
behind a sigmoid gate; many small experts and a shared one. Qwen Team 2025, Qwen3-Next."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from localmoe.arch.rope import Rope
from localmoe.formats import Weight
from localmoe.kernels.ops import Cache, Ops
from localmoe.kernels.program import RopeTable, Router, Tensor
from localmoe.loader.checkpoint import Checkpoint
from localmoe.loader.metadata import Metadata

MODEL_TYPES = ("qwen3next",)


@dataclass(frozen=True)
class Config:
    block_count: int
    embedding_length: int
    head_count: int
    head_count_kv: int
    key_length: int
    recurrent: tuple[bool, ...]  # of each layer, whether it has a delta net
    delta_keys: int  # heads
    delta_values: int
    delta_key_length: int
    delta_value_length: int
    conv_kernel: int
    expert_count: int
    expert_feed_forward_length: int
    expert_shared_feed_forward_length: int
    router: Router
    rms_epsilon: float
    rope: Rope
    vocabulary: int

    @classmethod
    def read(cls, meta: Metadata) -> Config:
        heads, width = meta.int("attention.head_count"), meta.int("embedding_length")
        key_length = meta.int("attention.key_length", width // heads)
        predicted = meta.int("nextn_predict_layers", 0)  # layers for further tokens, the last ones
        blocks, values = meta.int("block_count"), meta.int("ssm.time_step_rank")
        interval = meta.int("full_attention_interval", 4)
        meta.expect("attention.value_length", key_length)
        meta.expect("attention.sliding_window", 0)
        meta.expect("expert_gating_func", 0, 1)
        meta.expect("expert_weights_scale", 0.0, 1.0)
        meta.int("feed_forward_length", 0)  # of dense layers, which no released model has
        return cls(
            block_count=blocks - predicted,
            embedding_length=width,
            head_count=heads,
            head_count_kv=meta.int("attention.head_count_kv", heads),
            key_length=key_length,
            recurrent=meta.pattern("attention.recurrent_layers", blocks, interval),
            delta_keys=meta.int("ssm.group_count"),
            delta_values=values,
            delta_key_length=meta.int("ssm.state_size"),
            delta_value_length=meta.int("ssm.inner_size") // values,
            conv_kernel=meta.int("ssm.conv_kernel"),
            expert_count=meta.int("expert_count"),
            expert_feed_forward_length=meta.int("expert_feed_forward_length"),
            expert_shared_feed_forward_length=meta.int("expert_shared_feed_forward_length"),
            router=Router("softmax", meta.int("expert_used_count"), normalise=meta.bool("expert_weights_norm", True)),
            rms_epsilon=meta.float("attention.layer_norm_rms_epsilon"),
            rope=Rope.read(meta, key_length // 4),
            vocabulary=meta.vocabulary,
        )


class Attention(NamedTuple):
    qkv: tuple[Weight, Weight, Weight]  # q with a gate behind each head
    q_norm: Weight
    k_norm: Weight
    output: Weight


class DeltaNet(NamedTuple):
    projections: tuple[Weight, ...]  # qkv and z; or both in one, by key heads (folders, and GGUF files of 2025)
    beta_alpha: Weight
    conv: Weight
    rate: Weight
    bias: Weight
    norm: Weight
    output: Weight


class Block(NamedTuple):
    attn_norm: Weight
    mixer: Attention | DeltaNet
    ffn_norm: Weight
    router: Weight
    gate: Weight
    up: Weight
    down: Weight
    shared_router: Weight
    shared_gate: Weight
    shared_up: Weight
    shared_down: Weight


class Weights(NamedTuple):
    embedding: Weight
    blocks: list[Block]
    norm: Weight
    output: Weight
    rope: RopeTable


def load(c: Config, get: Checkpoint) -> Weights:
    """Every tensor by name and shape, without the layers that predict further tokens."""
    D, E, F, S = c.embedding_length, c.expert_count, c.expert_feed_forward_length, c.expert_shared_feed_forward_length
    embedding = get("token_embd", (c.vocabulary, D))

    def block(i: int) -> Block:
        at = get.scope(f"blk.{i}")
        return Block(
            attn_norm=at("attn_norm", (D,)),
            mixer=delta_net(c, at) if c.recurrent[i] else attention(c, at),
            ffn_norm=at("post_attention_norm", (D,)),
            router=at("ffn_gate_inp", (E, D)),
            gate=at.experts("ffn_gate_exps", (E, F, D)),
            up=at.experts("ffn_up_exps", (E, F, D)),
            down=at.experts("ffn_down_exps", (E, D, F)),
            shared_router=at("ffn_gate_inp_shexp", (1, D)),
            shared_gate=at("ffn_gate_shexp", (S, D)),
            shared_up=at("ffn_up_shexp", (S, D)),
            shared_down=at("ffn_down_shexp", (D, S)),
        )

    return Weights(
        embedding=embedding,
        blocks=[block(i) for i in range(c.block_count)],
        norm=get("output_norm", (D,)),
        output=get.optional("output", (c.vocabulary, D)) or embedding,
        rope=c.rope.table("halves"),
    )


def attention(c: Config, at: Checkpoint) -> Attention:
    D, d = c.embedding_length, c.key_length
    Q, K = c.head_count * d, c.head_count_kv * d
    return Attention(
        qkv=(at("attn_q", (2 * Q, D)), at("attn_k", (K, D)), at("attn_v", (K, D))),
        q_norm=at("attn_q_norm", (d,)),
        k_norm=at("attn_k_norm", (d,)),
        output=at("attn_output", (D, Q)),
    )


def delta_net(c: Config, at: Checkpoint) -> DeltaNet:
    D, H = c.embedding_length, c.delta_values
    K, V = c.delta_keys * c.delta_key_length, H * c.delta_value_length
    fused = at.optional("ssm_in", (2 * K + 2 * V, D))
    return DeltaNet(
        projections=(fused,) if fused else (at("attn_qkv", (2 * K + V, D)), at("attn_gate", (V, D))),
        beta_alpha=at("ssm_ba", (2 * H, D)),
        conv=at("ssm_conv1d", (2 * K + V, c.conv_kernel)),
        rate=at("ssm_a", (H,), suffix=""),
        bias=at.bias("ssm_dt", (H,)),
        norm=at("ssm_norm", (c.delta_value_length,)),
        output=at("ssm_out", (D, V)),
    )


def forward(ops: Ops, c: Config, w: Weights, tokens: Tensor, cache: Cache) -> Tensor:
    """Token ids (T,) -> logits of the wanted rows (rows, V)."""
    x = ops.embed(w.embedding, tokens)  # (T, D)
    for b in w.blocks:
        h = ops.rms_norm(x, b.attn_norm, c.rms_epsilon)
        if isinstance(b.mixer, DeltaNet):
            x = ops.add(x, recur(ops, c, b.mixer, h, cache))
        else:
            x = ops.add(x, attend(ops, c, b.mixer, w.rope, h, cache))
        x = ops.add(x, mix(ops, c, b, ops.rms_norm(x, b.ffn_norm, c.rms_epsilon)))
    return ops.linear(ops.rms_norm(ops.logit_rows(x), w.norm, c.rms_epsilon), w.output)  # (rows, V)


def attend(ops: Ops, c: Config, b: Attention, rope: RopeTable, x: Tensor, cache: Cache) -> Tensor:
    q, k, v = ops.linears(x, b.qkv)
    q, d = q.heads(c.head_count), c.key_length  # (T, H, 2 d): a head's query, then its gate
    k = ops.rms_norm(k.heads(c.head_count_kv), b.k_norm, c.rms_epsilon)  # (T, K, d)
    layer = cache.append(ops.rope(k, rope), v.heads(c.head_count_kv))
    gate, q = q.columns(d, 2 * d), ops.rms_norm(q.columns(0, d), b.q_norm, c.rms_epsilon)
    y = ops.attention(ops.rope(q, rope), layer, scale=d**-0.5)
    return ops.linear(ops.glu(gate, y, "sigmoid").flat(), b.output)


def recur(ops: Ops, c: Config, b: DeltaNet, x: Tensor, cache: Cache) -> Tensor:
    """Each key head serves as many value heads, one after the other."""
    K, H, d, e = c.delta_keys, c.delta_values, c.delta_key_length, c.delta_value_length
    projected, group = ops.linears(x, b.projections), H // K
    if len(projected) == 1:
        parts = split(projected[0].heads(K), d, d, group * e, group * e)  # of each key head
    else:
        q, k, v = split(projected[0], K * d, K * d, H * e)
        parts = [q.heads(K), k.heads(K), v.heads(K), projected[1].heads(K)]
    channels = 2 * K * d + H * e
    mixed = ops.causal_conv(parts[:3], b.conv, cache.state(1, c.conv_kernel - 1, channels))  # (T, channels)
    q, k, v = split(mixed, K * d, K * d, H * e)
    beta, alpha = split(ops.linear(x, b.beta_alpha, exact=True).heads(K), group, group)
    rule = (q.heads(K), k.heads(K), v.heads(H), beta, alpha, b.rate, b.bias)
    y = ops.rms_norm(ops.delta_rule(*rule, cache.state(H, d, e)), b.norm, c.rms_epsilon)  # (T, H, e)
    return ops.linear(ops.glu(parts[3], y.flat().heads(K)).flat(), b.output)


def split(x: Tensor, *widths: int) -> list[Tensor]:
    """Views of so many elements each of the last axis, one after the other."""
    ends = [sum(widths[: i + 1]) for i in range(len(widths))]
    return [x.columns(end - width, end) for end, width in zip(ends, widths, strict=True)]


def mix(ops: Ops, c: Config, b: Block, x: Tensor) -> Tensor:
    ids, shares = ops.route(ops.linear(x, b.router, exact=True), c.router)  # (T, k) each
    chosen = ops.experts(x, ids, shares, b.gate, b.up, b.down)
    gate, up = ops.linears(x, (b.shared_gate, b.shared_up))
    shared = ops.linear(ops.glu(gate, up), b.shared_down)
    weight = ops.linear(x, b.shared_router, exact=True)  # (T, 1)
    return ops.add(chosen, ops.glu(weight, shared, "sigmoid"))
