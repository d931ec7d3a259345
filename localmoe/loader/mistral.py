"""Mistral's own folders, params.json with consolidated*.safetensors, told in Hugging Face's words; knows no GGUF name.

Names of keys as Mistral's published params.json have them. What the runtime that Mistral names, vLLM, makes of them
decides: where yarn's apply_scale is false, neither cos and sin nor the softmax are scaled. (transformers since 5.20 and
llama.cpp's converter scale the softmax there; SGLang measured that it costs accuracy, sgl-project/sglang#26203.)
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from localmoe.errors import UnsupportedError
from localmoe.loader.config_json import Settings
from localmoe.loader.huggingface import SMALL, folder_source
from localmoe.loader.safetensors import read_json, read_shards
from localmoe.loader.source import Source, shown

PARAMS = "params.json"
FILES = "consolidated"
SIZES = {
    "hidden_size": "dim", "num_hidden_layers": "n_layers", "num_attention_heads": "n_heads", "vocab_size": "vocab_size",
    "num_key_value_heads": "n_kv_heads", "intermediate_size": "hidden_dim", "head_dim": "head_dim",
    "rms_norm_eps": "norm_eps",
}  # fmt: skip
LATENT = ("q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
EXPERTS = {
    "n_routed_experts": "num_experts", "num_experts_per_tok": "num_experts_per_tok",
    "n_shared_experts": "num_shared_experts", "moe_intermediate_size": "expert_hidden_dim",
    "first_k_dense_replace": "first_k_dense_replace", "n_group": "num_expert_groups",
    "topk_group": "num_expert_groups_per_tok", "routed_scaling_factor": "routed_scale",
}  # fmt: skip
YARN = {
    "factor": "factor", "original_max_position_embeddings": "original_max_position_embeddings", "beta_fast": "beta",
    "beta_slow": "alpha",
}  # fmt: skip
# Parts of tensor names; w1, w2 and w3 are gate, down and up.
WORDS = {
    "attention": "self_attn", "feed_forward": "mlp", "attention_norm": "input_layernorm", "wq": "q_proj",
    "wk": "k_proj", "wv": "v_proj", "wo": "o_proj", "ffn_norm": "post_attention_layernorm", "w1": "gate_proj",
    "w2": "down_proj", "w3": "up_proj", "wq_a": "q_a_proj", "wq_b": "q_b_proj", "q_a_norm": "q_a_layernorm",
    "wkv_b": "kv_b_proj", "wkv_a_with_mqa": "kv_a_proj_with_mqa", "kv_a_norm": "kv_a_layernorm",
}  # fmt: skip
OUTSIDE = {"tok_embeddings": "model.embed_tokens", "norm": "model.norm", "output": "lm_head"}
VISION = ("vision_encoder", "vision_language_adapter", "patch_merger", "pre_mm_projector_norm")


def is_native(folder: Path) -> bool:
    """Whether a folder holds Mistral's form, and no weights in Hugging Face's beside it."""
    if not (folder / PARAMS).is_file() or next(folder.glob(f"{FILES}*.safetensors"), None) is None:
        return False
    theirs = (folder / "config.json").is_file()
    return not (theirs and next(folder.glob("model*.safetensors"), None))


def open_native(path: Path) -> Source:
    """Opens a folder with params.json and consolidated*.safetensors; raises as `open_folder` does."""
    origin = str(path / PARAMS)
    entries = read_shards(path, FILES)
    config, keys = hugging_face(read_json(path / PARAMS, SMALL), origin)
    named = {renamed(name): entry for name, entry in entries.items()}
    return folder_source(path, "mistral", config, origin, named, keys)


def hugging_face(params: Mapping[str, Any], origin: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """params.json as a config.json, and GGUF keys (without prefix) that no config.json says.

    Raises: UnsupportedError for a value that is not implemented, FileFormatError for one that is missing or broken.
    """
    settings = Settings(params, origin)
    config: dict[str, Any] = {name: settings.take(key) for name, key in SIZES.items()}
    positions = settings.take("max_position_embeddings", "max_seq_len")
    settings.take("max_seq_len", "max_batch_size", "model_type", "vision_encoder", "multimodal", "image_token_id")
    config["max_position_embeddings"] = 32768 if positions is None else positions
    config["tie_word_embeddings"] = settings.flag("tied_embeddings", False)
    config["sliding_window"] = settings.take("sliding_window")
    settings.expect("activation", "silu")
    settings.expect("use_biases", False)
    settings.expect("causal", True)
    moe, latent = settings.take("moe"), settings.take("kv_lora_rank") is not None
    keys: dict[str, Any] = {}
    if latent:
        config |= {name: settings.take(name) for name in LATENT}
        keys["attention.lora_norm_rms_epsilon"] = settings.number("norm_eps")  # one epsilon for all norms
    if moe is not None:
        config |= _experts(settings, moe, latent)
    elif latent:
        raise settings.wrong("moe", moe, "an object, where kv_lora_rank is set")
    else:
        config["model_type"] = "mistral" if settings.values.get("llama_4_scaling") is None else "ministral3"
    config["rope_parameters"] = _rope(settings, keys, latent)
    quantization = settings.take("quantization")
    if quantization is not None:
        config["quantization_config"] = _quantization(settings, quantization)
    settings.finish()
    return {name: value for name, value in config.items() if value is not None or name == "sliding_window"}, keys


def _inner(settings: Settings, name: str, found: Any) -> Settings:
    if not isinstance(found, dict):
        raise settings.wrong(name, found, "an object")
    return Settings(found, f"{settings.origin}: {name}")


def _experts(settings: Settings, moe: Any, latent: bool) -> dict[str, Any]:
    """Mixtral's experts, or Large 3's: a softmax over all, renormalised, as its runtime says and no key does."""
    inner = _inner(settings, "moe", moe)
    inner.take("expert_parallel", "expert_model_parallel")
    if not latent:
        names = {"num_local_experts": "num_experts", "num_experts_per_tok": "num_experts_per_tok"}
        found = {name: inner.take(key) for name, key in names.items()}
        inner.finish()
        return found | {"model_type": "mixtral"}
    inner.expect("route_every_n", 1)
    found = {name: inner.take(key) for name, key in EXPERTS.items()}
    inner.finish()
    return found | {"model_type": "mistral4", "norm_topk_prob": True}


def _rope(settings: Settings, keys: dict[str, Any], latent: bool) -> dict[str, Any]:
    base, yarn, warming = (settings.take(name) for name in ("rope_theta", "yarn", "llama_4_scaling"))
    if base is None:
        raise settings.wrong("rope_theta", base, "a number")
    rope: dict[str, Any] = {"rope_theta": base}
    if yarn is not None:
        inner = _inner(settings, "yarn", yarn)
        rope |= {"rope_type": "yarn"} | {name: inner.number(key) for name, key in YARN.items()}
        rope["original_max_position_embeddings"] = inner.whole("original_max_position_embeddings")
        if not inner.flag("apply_scale", True):
            rope["attention_factor"] = 1.0
        elif latent:
            rope |= {"mscale": 1.0, "mscale_all_dim": 1.0}
        inner.finish()
    if warming is not None:
        inner = _inner(settings, "llama_4_scaling", warming)
        rope["llama_4_scaling_beta"] = inner.number("beta")
        keys["attention.temperature_length"] = inner.whole("original_max_position_embeddings")
        inner.finish()
    return rope


def _quantization(settings: Settings, found: Any) -> Any:
    """Mistral's own words for 8-bit floats with a scale a matrix; another program's settings as they are."""
    inner = _inner(settings, "quantization", found)
    if inner.take("quant_method") is not None:
        return found
    if inner.take("qformat_weight") != "fp8_e4m3":
        weight = shown(inner.values.get("qformat_weight"))
        raise UnsupportedError(f"{inner.origin}: qformat_weight is {weight}; possible is 'fp8_e4m3'")
    inner.take("qscheme_act")
    inner.finish()
    return {"quant_method": "fp8"}


def renamed(name: str) -> str:
    """Hugging Face's name of a tensor: "layers.3.attention.wq.weight" -> "model.layers.3.self_attn.q_proj.weight"."""
    first, *rest = name.split(".")
    if first in VISION:
        return f"vision_tower.{name}"
    if first != "layers" or len(rest) < 2:
        return ".".join([OUTSIDE.get(first, first), *rest])
    inner = [WORDS.get(word, word) for word in rest[1:]]
    if inner[0] in ("gate", "experts", "shared_experts"):
        inner = ["mlp", *inner]
    return ".".join(["model.layers", rest[0], *inner])
