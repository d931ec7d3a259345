"""Gemma 4, its text: layers with windows have narrower heads than those without, the last ones read the keys and values
of earlier ones, small models add an embedding of the token to every layer, the 26B has experts beside its dense part.

Google 2026, Gemma 4 model card; what transformers 5.23 and llama.cpp (models/gemma4.cpp) compute decides.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from localmoe.arch.rope import Rope
from localmoe.errors import FileFormatError
from localmoe.formats import Weight
from localmoe.kernels.ops import Cache, Ops
from localmoe.kernels.program import CacheLayer, RopeTable, Router, Tensor
from localmoe.loader.checkpoint import Checkpoint
from localmoe.loader.metadata import Metadata

MODEL_TYPES = ("gemma4",)


@dataclass(frozen=True)
class Config:
    embedding_length: int
    feed_forward_lengths: tuple[int, ...]  # of each layer, as the next three
    windows: tuple[int, ...]  # 0 for none
    key_lengths: tuple[int, ...]
    head_counts_kv: tuple[int, ...]
    sources: tuple[int, ...]  # the layer whose keys and values are read
    head_count: int
    layer_input_length: int  # of the embedding that each layer gets, 0 for none
    expert_count: int
    expert_feed_forward_length: int
    router: Router
    logit_softcap: float
    rms_epsilon: float
    rope: Rope
    local_rope: Rope  # of layers with a window
    vocabulary: int

    @property
    def block_count(self) -> int:
        return len(self.windows)

    @classmethod
    def read(cls, meta: Metadata) -> Config:
        blocks, width, key_length = (
            meta.int(key) for key in ("block_count", "attention.sliding_window", "attention.key_length")
        )
        local_length = meta.int("attention.key_length_swa", key_length)
        meta.expect("attention.value_length", key_length)
        meta.expect("attention.value_length_swa", local_length)
        meta.expect("attention.scale", 1.0)
        meta.expect("expert_gating_func", 0, 1)
        meta.expect("expert_weights_norm", True)
        meta.expect("expert_weights_scale", 0.0, 1.0)
        local = meta.pattern("attention.sliding_window_pattern", blocks, 6)
        rope = Rope.read(meta, key_length)
        shared = meta.int("attention.shared_kv_layers", 0)
        if shared and any(kind not in local[: max(blocks - shared, 0)] for kind in set(local)):
            raise FileFormatError(
                f"{meta.origin}: attention.shared_kv_layers is {shared}; layers with a window and without are expected "
                f"before the last {shared} of {blocks}"
            )
        experts = meta.int("expert_count", 0)
        return cls(
            embedding_length=meta.int("embedding_length"),
            feed_forward_lengths=meta.ints("feed_forward_length", blocks),
            windows=tuple(width * on for on in local),
            key_lengths=tuple(local_length if on else key_length for on in local),
            head_counts_kv=meta.ints("attention.head_count_kv", blocks),
            sources=tuple(source(local, i, blocks - shared) for i in range(blocks)),
            head_count=meta.int("attention.head_count"),
            layer_input_length=meta.int("embedding_length_per_layer_input", 0),
            expert_count=experts,
            expert_feed_forward_length=meta.int("expert_feed_forward_length", 0),
            router=Router("softmax", meta.int("expert_used_count", 0), normalise=True),
            logit_softcap=meta.float("final_logit_softcapping", 0.0),
            rms_epsilon=meta.float("attention.layer_norm_rms_epsilon"),
            rope=rope,
            local_rope=rope.windowed(meta, local_length),
            vocabulary=meta.vocabulary,
        )


def source(local: tuple[bool, ...], layer: int, own: int) -> int:
    """The layer itself, or of the first `own` the last one of its kind."""
    return layer if layer < own else max(i for i in range(own) if local[i] == local[layer])


class Experts(NamedTuple):
    router: Weight
    router_scale: Weight
    pre_norm: Weight
    gate: Weight
    up: Weight
    down: Weight
    down_scale: Weight  # a number for each expert
    post_norm: Weight
    dense_post_norm: Weight


class LayerInput(NamedTuple):
    gate: Weight
    projection: Weight
    post_norm: Weight


class Block(NamedTuple):
    attn_norm: Weight
    attn_q: Weight
    attn_k: Weight | None  # a layer that reads another's has none of the next four
    attn_v: Weight | None  # none: the values are the keys before their norm
    attn_q_norm: Weight
    attn_k_norm: Weight | None
    attn_output: Weight
    post_attention_norm: Weight
    ffn_norm: Weight
    gate: Weight
    up: Weight
    down: Weight
    experts: Experts | None
    post_ffw_norm: Weight
    layer_input: LayerInput | None
    scale: Weight | None


class LayerInputs(NamedTuple):
    embedding: Weight
    projection: Weight
    norm: Weight


class Weights(NamedTuple):
    embedding: Weight
    layer_inputs: LayerInputs | None
    blocks: list[Block]
    norm: Weight
    output: Weight
    rope: RopeTable
    local_rope: RopeTable


def load(c: Config, get: Checkpoint) -> Weights:
    """Every tensor by name and shape. rope_freqs are factors of the layers without window, 1e30 where nothing turns."""
    D, P, L = c.embedding_length, c.layer_input_length, c.block_count
    embedding = get("token_embd", (c.vocabulary, D))
    layer_inputs = LayerInputs(
        embedding=get("per_layer_token_embd", (c.vocabulary, L * P)),
        projection=get("per_layer_model_proj", (L * P, D)),
        norm=get("per_layer_proj_norm", (P,)),
    ) if P else None  # fmt: skip
    return Weights(
        embedding=embedding,
        layer_inputs=layer_inputs,
        blocks=[load_block(c, get.scope(f"blk.{i}"), i) for i in range(L)],
        norm=get("output_norm", (D,)),
        output=get.optional("output", (c.vocabulary, D)) or embedding,
        rope=c.rope.table("halves", get.optional("rope_freqs", (c.rope.dimensions // 2,))),
        local_rope=c.local_rope.table("halves"),
    )


def load_block(c: Config, at: Checkpoint, layer: int) -> Block:
    D, P, F, d = c.embedding_length, c.layer_input_length, c.feed_forward_lengths[layer], c.key_lengths[layer]
    Q, K, own = c.head_count * d, c.head_counts_kv[layer] * d, c.sources[layer] == layer
    # Released files keep unused keys and values of layers that read another's.
    k, v, k_norm = at.optional("attn_k", (K, D)), at.optional("attn_v", (K, D)), at.optional("attn_k_norm", (d,))
    layer_input = LayerInput(at("inp_gate", (P, D)), at("proj", (D, P)), at("post_norm", (D,))) if P else None
    return Block(
        attn_norm=at("attn_norm", (D,)),
        attn_q=at("attn_q", (Q, D)),
        attn_k=(k or at("attn_k", (K, D))) if own else None,
        attn_v=v if own else None,
        attn_q_norm=at("attn_q_norm", (d,)),
        attn_k_norm=(k_norm or at("attn_k_norm", (d,))) if own else None,
        attn_output=at("attn_output", (D, Q)),
        post_attention_norm=at("post_attention_norm", (D,)),
        ffn_norm=at("ffn_norm", (D,)),
        gate=at("ffn_gate", (F, D)),
        up=at("ffn_up", (F, D)),
        down=at("ffn_down", (D, F)),
        experts=load_experts(c, at) if c.expert_count else None,
        post_ffw_norm=at("post_ffw_norm", (D,)),
        layer_input=layer_input,
        scale=at.optional("layer_output_scale", (1,)),
    )


def load_experts(c: Config, at: Checkpoint) -> Experts:
    D, E, F = c.embedding_length, c.expert_count, c.expert_feed_forward_length
    return Experts(
        router=at("ffn_gate_inp", (E, D)),
        router_scale=at("ffn_gate_inp", (D,), suffix="scale"),
        pre_norm=at("pre_ffw_norm_2", (D,)),
        gate=at.experts("ffn_gate_exps", (E, F, D)),
        up=at.experts("ffn_up_exps", (E, F, D)),
        down=at.experts("ffn_down_exps", (E, D, F)),
        down_scale=at("ffn_down_exps", (E,), suffix="scale"),
        post_norm=at("post_ffw_norm_2", (D,)),
        dense_post_norm=at("post_ffw_norm_1", (D,)),
    )


def forward(ops: Ops, c: Config, w: Weights, tokens: Tensor, cache: Cache) -> Tensor:
    """Token ids (T,) -> logits of the wanted rows (rows, V)."""
    x = ops.scale(ops.embed(w.embedding, tokens), c.embedding_length**0.5)  # (T, D)
    inputs = layer_inputs(ops, c, w.layer_inputs, tokens, x) if w.layer_inputs else None  # (T, L·P)
    layers: list[CacheLayer] = []
    for i, b in enumerate(w.blocks):
        rope = w.local_rope if c.windows[i] else w.rope
        branch = attend(ops, c, b, i, rope, ops.rms_norm(x, b.attn_norm, c.rms_epsilon), cache, layers)
        x = ops.add(x, ops.rms_norm(branch, b.post_attention_norm, c.rms_epsilon))
        branch = feed(ops, b, ops.rms_norm(x, b.ffn_norm, c.rms_epsilon))
        if b.experts is not None:
            branch = ops.rms_norm(branch, b.experts.dense_post_norm, c.rms_epsilon)
            branch = ops.add(branch, mix(ops, c, b.experts, x))
        x = ops.add(x, ops.rms_norm(branch, b.post_ffw_norm, c.rms_epsilon))
        if inputs is not None and b.layer_input is not None:
            P = c.layer_input_length
            x = ops.add(x, add_input(ops, c, b.layer_input, x, inputs.columns(i * P, (i + 1) * P)))
        x = x if b.scale is None else ops.scale(x, 1.0, b.scale)
    y = ops.linear(ops.rms_norm(ops.logit_rows(x), w.norm, c.rms_epsilon), w.output)  # (rows, V)
    return ops.softcap(y, c.logit_softcap) if c.logit_softcap else y


def layer_inputs(ops: Ops, c: Config, w: LayerInputs, tokens: Tensor, x: Tensor) -> Tensor:
    """What each layer gets of a token, (T, L·P): a part by its id, and a part by its embedding."""
    L, P = c.block_count, c.layer_input_length
    by_id = ops.scale(ops.embed(w.embedding, tokens), P**0.5)  # (T, L·P)
    projected = ops.scale(ops.linear(x, w.projection), c.embedding_length**-0.5).heads(L)  # (T, L, P)
    return ops.scale(ops.add(ops.rms_norm(projected, w.norm, c.rms_epsilon).flat(), by_id), 0.5**0.5)


def attend(
    ops: Ops, c: Config, b: Block, i: int, rope: RopeTable, x: Tensor, cache: Cache, layers: list[CacheLayer]
) -> Tensor:
    """`layers` are those of the cache so far, by layer of the model; this one is added."""
    q = ops.rms_norm(ops.linear(x, b.attn_q).heads(c.head_count), b.attn_q_norm, c.rms_epsilon)  # (T, H, d)
    if b.attn_k is None:
        layers.append(layers[c.sources[i]])
    else:
        k, *other = ops.linears(x, (b.attn_k, b.attn_v) if b.attn_v else (b.attn_k,))
        k = k.heads(c.head_counts_kv[i])  # (T, K, d)
        v = other[0].heads(c.head_counts_kv[i]) if other else k
        k = ops.rope(ops.rms_norm(k, b.attn_k_norm, c.rms_epsilon), rope)
        layers.append(cache.append(k, ops.rms_norm(v, None, c.rms_epsilon)))
    y = ops.attention(ops.rope(q, rope), layers[i], scale=1.0, window=c.windows[i])
    return ops.linear(y.flat(), b.attn_output)


def feed(ops: Ops, b: Block, x: Tensor) -> Tensor:
    gate, up = ops.linears(x, (b.gate, b.up))  # (T, F)
    return ops.linear(ops.glu(gate, up, "gelu"), b.down)


def mix(ops: Ops, c: Config, w: Experts, x: Tensor) -> Tensor:
    """The experts see what the dense part saw before its norm, and so does their router."""
    h = ops.scale(ops.rms_norm(x, w.router_scale, c.rms_epsilon), c.embedding_length**-0.5)
    ids, shares = ops.route(ops.linear(h, w.router, exact=True), c.router, factors=w.down_scale)  # (T, k) each
    y = ops.experts(ops.rms_norm(x, w.pre_norm, c.rms_epsilon), ids, shares, w.gate, w.up, w.down, "gelu")
    return ops.rms_norm(y, w.post_norm, c.rms_epsilon)


def add_input(ops: Ops, c: Config, w: LayerInput, x: Tensor, given: Tensor) -> Tensor:
    gated = ops.glu(ops.linear(x, w.gate), given, "gelu")  # (T, P)
    return ops.rms_norm(ops.linear(gated, w.projection), w.post_norm, c.rms_epsilon)
