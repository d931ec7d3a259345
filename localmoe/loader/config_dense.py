"""config.json and tensors of dense families under GGUF's keys and names; see `config_json.Family`.

What transformers 5.23 computes decides (its models/*/modeling_*.py).
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from localmoe.errors import FileFormatError, UnsupportedError
from localmoe.formats import BF16, F16, F32, Weight
from localmoe.loader.config_json import Family, Keys, Makers, Settings
from localmoe.loader.config_steps import (
    BASES,
    COMMON,
    granite_scales,
    head_sizes,
    heads,
    layer_pattern,
    mixtral_window,
    qwen_window,
    rope,
)
from localmoe.loader.source import shown

GPT2 = {
    "block_count": "n_layer", "embedding_length": "n_embd", "context_length": "n_positions", "vocab_size": "vocab_size",
}  # fmt: skip
LAYER_NORM = "attention.layer_norm_epsilon"
TANH = ("gelu_pytorch_tanh",)
# The causal masks that GPT-2's first checkpoints store.
MASK = re.compile(r"(transformer\.)?h\.\d+\.attn\.(masked_)?bias")


def windowed_layers(settings: Settings, keys: Keys, period: int) -> None:
    """One width of window, and which layers have it: all but every n-th where layer_types does not say."""
    width = settings.take("sliding_window") if "sliding_window" in settings.values else 4096
    every = settings.whole("sliding_window_pattern", "_sliding_window_pattern", default=period)
    if type(width) is not int or width < 1:
        raise settings.wrong("sliding_window", width, "a whole number from 1")
    if every < 1:
        raise settings.wrong("sliding_window_pattern", every, "at least 1")
    default = [(i + 1) % every > 0 for i in range(keys["block_count"])]
    settings.expect("sliding_window_size", width)  # said again
    keys["attention.sliding_window"] = width
    keys["attention.sliding_window_pattern"] = layer_pattern(settings, keys, "sliding_attention", default)


def gemma(settings: Settings, keys: Keys, architecture: str) -> None:
    """The softmax scale is that of a number of its own; a soft cap of null is none."""
    heads(settings, keys, architecture)
    settings.expect("hidden_activation", *TANH)
    settings.expect("use_bidirectional_attention", False)
    settings.take("cache_implementation")
    scaled_by = settings.number("query_pre_attn_scalar", default=256)
    if scaled_by <= 0:
        raise settings.wrong("query_pre_attn_scalar", scaled_by, "a number above 0")
    keys["attention.scale"] = scaled_by**-0.5
    caps = {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}
    for name, default in caps.items() if architecture == "gemma2" else [("final_logit_softcapping", 0.0)]:
        keys[name] = settings.number(name, default=0.0 if name in settings.values else default)


def gemma2(settings: Settings, keys: Keys, architecture: str) -> None:
    gemma(settings, keys, architecture)
    windowed_layers(settings, keys, 2)
    rope(settings, keys, architecture)


def gemma3(settings: Settings, keys: Keys, architecture: str) -> None:
    gemma(settings, keys, architecture)
    windowed_layers(settings, keys, 6)
    layered_rope(settings, keys, architecture, settings.number("rope_local_base_freq", default=1e4))


def olmo3(settings: Settings, keys: Keys, architecture: str) -> None:
    """OLMo 2 with windows, whose layers have another rope."""
    heads(settings, keys, architecture)
    windowed_layers(settings, keys, 4)
    layered_rope(settings, keys, architecture, settings.number("rope_theta", default=BASES["olmo3"]))


def layered_rope(settings: Settings, keys: Keys, architecture: str, local_base: float) -> None:
    """Rope by the kind of layer; before transformers 5, rope_scaling was of the layers without window alone."""
    found = Settings(_object(settings, "rope_parameters"), f"{settings.origin}: rope_parameters")
    local = Settings(_object(found, "sliding_attention"), f"{found.origin}: sliding_attention")
    local.expect("rope_type", "default")
    keys["rope.freq_base_swa"] = local.number("rope_theta", default=local_base)
    whole = {**_object(found, "full_attention"), **_object(settings, "rope_scaling")}
    values = {"model_type": settings.take("model_type"), "rope_theta": settings.take("rope_theta")}
    rope(Settings({**values, "rope_parameters": whole}, settings.origin), keys, architecture)
    local.finish()
    found.finish()


def phi3(settings: Settings, keys: Keys, architecture: str) -> None:
    """LongRoPE's factors, of which the rewriting makes the tensors that a GGUF file has, and its amplitude."""
    head_sizes(settings, keys, architecture)
    mixtral_window(settings, keys, architecture)
    for name in ("attention_bias", "mlp_bias", "lm_head_bias"):
        settings.expect(name, False)
    for name in ("interpolate_factor", "full_attn_mod"):
        settings.expect(name, 1)
    found = _object(settings, "rope_scaling") or _object(settings, "rope_parameters")
    inner = Settings(found, f"{settings.origin}: rope")
    keys["rope.freq_base"] = inner.number("rope_theta", default=settings.number("rope_theta", default=1e4))
    share = settings.number("partial_rotary_factor", default=1.0)
    share = inner.number("partial_rotary_factor", default=share)
    keys["rope.dimension_count"] = int(keys["attention.key_length"] * share)
    original = settings.whole("original_max_position_embeddings", default=4096)
    inner.take("original_max_position_embeddings")  # transformers goes by the one outside
    if long_rope(inner, keys, original):
        factor = inner.number("factor", default=keys["context_length"] / original)
        amplitude = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
        keys["rope.scaling.attn_factor"] = inner.number("attention_factor", default=amplitude)
    inner.finish()


def long_rope(inner: Settings, keys: Keys, original: int) -> bool:
    """Whether there is LongRoPE, and its factors."""
    kind = inner.take("rope_type", "type") or "default"
    if kind not in ("default", "longrope", "su"):
        raise UnsupportedError(f"{inner.origin}: rope_type is {shown(kind)}; possible are default and longrope")
    if kind == "default":
        return False
    if original < 2:
        raise inner.wrong("original_max_position_embeddings", original, "at least 2")
    keys["rope.scaling.original_context_length"] = original
    for length in ("short", "long"):
        keys[f"rope.factors_{length}"] = _factors(inner, f"{length}_factor", keys["rope.dimension_count"] // 2)
    return True


def _object(settings: Settings, name: str) -> dict[str, Any]:
    found = settings.take(name) or {}
    if not isinstance(found, dict):
        raise settings.wrong(name, found, "an object")
    return found


def _factors(settings: Settings, name: str, count: int) -> list[float]:
    found = settings.take(name)
    sound = isinstance(found, list) and len(found) == count
    if not sound or any(type(n) not in (int, float) or not 0 < n < 1e30 for n in found):
        raise settings.wrong(name, found, f"{count} numbers above 0")
    return [float(n) for n in found]


def glm4(settings: Settings, keys: Keys, architecture: str) -> None:
    """Biases are told by the tensors that there are."""
    head_sizes(settings, keys, architecture)
    settings.take("attention_bias")
    rope(settings, keys, architecture)


def smollm3(settings: Settings, keys: Keys, architecture: str) -> None:
    """no_rope_layers has a 1 for layers that do have rope."""
    heads(settings, keys, architecture)
    qwen_window(settings, keys, architecture)
    blocks, every = keys["block_count"], settings.whole("no_rope_layer_interval", default=4)
    turned = settings.take("no_rope_layers") or [int(not every or (i + 1) % every > 0) for i in range(blocks)]
    if not isinstance(turned, list) or len(turned) < blocks or any(on not in (0, 1) for on in turned):
        raise settings.wrong("no_rope_layers", turned, f"0 or 1 for each of {blocks} layers")
    keys["rope.layer_pattern"] = [bool(on) for on in turned[:blocks]]
    rope(settings, keys, architecture)


def cohere(settings: Settings, keys: Keys, architecture: str) -> None:
    """Norms of q and k are told by the tensors that there are; the first files name what their code always does."""
    heads(settings, keys, architecture)
    keys["logit_scale"] = settings.number("logit_scale", default=0.0625)
    if not keys["logit_scale"]:
        raise settings.wrong("logit_scale", keys["logit_scale"], "another number than 0")
    settings.take("cache_implementation", "layer_switch")
    if architecture == "command-r":
        keys["context_length"] = settings.whole("model_max_length", default=keys["context_length"])
        settings.take("use_qk_norm")
    else:
        settings.expect("head_dim", keys["embedding_length"] // keys["attention.head_count"])
        settings.expect("order_of_interleaved_layers", "local_attn_first")
        settings.expect("position_embedding_type", "rope_gptj")
        settings.expect("rotary_pct", 1, 1.0)
        for name in ("use_embedding_sharing", "use_gated_activation", "use_parallel_block"):
            settings.expect(name, True)
        windowed_layers(settings, keys, 4)
    rope(settings, keys, architecture)


def starcoder2(settings: Settings, keys: Keys, architecture: str) -> None:
    """Biases are told by the tensors that there are."""
    heads(settings, keys, architecture)
    mixtral_window(settings, keys, architecture)
    settings.expect("mlp_type", "default")
    settings.expect("norm_type", "layer_norm")
    settings.expect("scale_attention_softmax_in_fp32", True)
    settings.take("use_bias", "residual_dropout", "embedding_dropout")
    settings.take("attention_softmax_in_fp32", "scale_attn_weights")
    settings.take("activation_function", "layer_norm_epsilon")  # transformers goes by hidden_act and norm_epsilon
    rope(settings, keys, architecture)


def gpt2(settings: Settings, keys: Keys, architecture: str) -> None:
    """Names of its own; what concerns classification heads has no bearing."""
    keys["attention.head_count"] = count = settings.whole("n_head")
    if count < 1 or keys["embedding_length"] % count:
        raise settings.wrong("n_head", count, f"a divisor of n_embd, {keys['embedding_length']}")
    keys["feed_forward_length"] = settings.whole("n_inner", default=4 * keys["embedding_length"])
    settings.expect("activation_function", "gelu_new", *TANH)
    settings.expect("scale_attn_weights", True)
    settings.take("n_ctx", "attn_pdrop", "task_specific_params", "reorder_and_upcast_attn")
    settings.take("summary_type", "summary_use_proj", "summary_activation", "summary_first_dropout")
    settings.take("summary_proj_to_labels", "predict_special_tokens")


def raised_norms(makers: Makers, keys: Keys) -> None:
    """Gemma's norms multiply by 1 + weight; GGUF files have the sum."""
    for name in [name for name in makers if name.endswith("norm.weight")]:
        makers[name] = partial(raised, makers[name])


def factor_tensors(makers: Makers, keys: Keys) -> None:
    for name in ("rope_factors_short", "rope_factors_long"):
        if factors := keys.get(name.replace("_", ".", 1)):
            makers[f"{name}.weight"] = partial(vector, f"{name}.weight", np.array(factors, np.float32))


def turned_matrices(makers: Makers, keys: Keys) -> None:
    """GPT-2's matrices have a row for each input; masks are left out."""
    for name in list(makers):
        if MASK.fullmatch(name):
            del makers[name]
        elif re.fullmatch(r"blk\.\d+\.(attn_qkv|attn_output|ffn_up|ffn_down)\.weight", name):
            makers[name] = partial(_turned, makers[name])


def vector(name: str, values: Any) -> Weight:
    return Weight(name, values.shape, F32, (values.view(np.uint8).reshape(-1),))


def raised(make: Callable[[], Weight]) -> Weight:
    weight = make()
    return vector(weight.name, floats(weight) + np.float32(1))


def floats(weight: Weight) -> Any:
    """The values of a vector as float32."""
    if weight.format not in (F32, F16, BF16) or len(weight.shape) != 1:
        raise FileFormatError(f"tensor {shown(weight.name)} has shape {weight.shape}, expected one axis of floats")
    (stored,) = weight.slabs
    if weight.format == BF16:
        return (stored.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    return stored.view(np.float16 if weight.format == F16 else np.float32).astype(np.float32)


def _turned(make: Callable[[], Weight]) -> Weight:
    weight = make()
    if len(weight.shape) != 2:
        raise FileFormatError(f"tensor {shown(weight.name)} has shape {weight.shape}, expected two axes")
    matrix = np.ascontiguousarray(weight.slabs[0].view(f"u{weight.format.nbytes}").reshape(weight.shape).T)
    return Weight(weight.name, matrix.shape, weight.format, (matrix.view(np.uint8).reshape(-1),))


DENSE: dict[str, Family] = {
    "gemma2": Family("gemma2", COMMON, (gemma2,), TANH, rewrite=raised_norms),
    "gemma3_text": Family("gemma3", COMMON, (gemma3,), TANH, rewrite=raised_norms),
    "phi3": Family("phi3", COMMON, (phi3,), rewrite=factor_tensors),
    "olmo2": Family("olmo2", COMMON, (heads, rope)),
    "olmo3": Family("olmo2", COMMON, (olmo3,)),
    "granite": Family("granite", COMMON, (heads, granite_scales, rope)),
    "glm4": Family("glm4", COMMON, (glm4,)),
    "smollm3": Family("smollm3", COMMON, (smollm3,)),
    "ministral3": Family("mistral3", COMMON, (heads, mixtral_window, rope)),
    "cohere": Family("command-r", COMMON, (cohere,), epsilon=(LAYER_NORM, "layer_norm_eps")),
    "cohere2": Family("cohere2", COMMON, (cohere,), epsilon=(LAYER_NORM, "layer_norm_eps")),
    "starcoder2": Family("starcoder2", COMMON, (starcoder2,), TANH, epsilon=(LAYER_NORM, "norm_epsilon")),
    "gpt2": Family("gpt2", GPT2, (gpt2,), TANH, epsilon=(LAYER_NORM, "layer_norm_epsilon"), rewrite=turned_matrices),
}
