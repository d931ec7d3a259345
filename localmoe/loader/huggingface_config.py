"""config.json's values under GGUF's keys; every value that alters the computation is carried over or refused by name.

A family is a row of `FAMILIES`: the GGUF architecture, whole numbers that only change their name, and functions.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from localmoe.errors import UnsupportedError
from localmoe.loader.config_dense import DENSE
from localmoe.loader.config_gemma4 import GEMMA4
from localmoe.loader.config_json import Family, Keys, Settings
from localmoe.loader.config_mixtures import MIXTURES
from localmoe.loader.config_recurrent import RECURRENT
from localmoe.loader.config_sparse import SPARSE
from localmoe.loader.config_steps import (
    COMMON,
    deepseek_experts,
    heads,
    latent_heads,
    mistral_window,
    mixtral_window,
    qwen_window,
    rope,
    softmax_experts,
)
from localmoe.loader.metadata import LAYER_LIMIT
from localmoe.loader.quantization import Quantization, read_quantization
from localmoe.loader.source import shown

# Values without any bearing on the forward pass of these families: bookkeeping, training, and how to generate.
HARMLESS = frozenset(
    {
        "_attn_implementation", "_commit_hash", "_name_or_path", "architectures", "attention_dropout",
        "attn_implementation", "auto_map", "aux_loss_alpha", "bos_token_id", "decoder_start_token_id", "do_sample",
        "dtype", "embd_pdrop", "eos_token_id", "ep_size", "hidden_dropout", "id2label", "initializer_range",
        "is_llama_config", "label2id", "length_penalty", "max_length", "max_window_layers", "model_type",
        "num_beam_groups", "num_beams",
        "num_mtp_layers", "num_nextn_predict_layers", "num_return_sequences", "output_router_logits", "pad_token_id",
        "pretraining_tp", "qk_head_dim", "repetition_penalty", "resid_pdrop", "return_dict", "router_aux_loss_coef",
        "router_jitter_noise", "seq_aux", "temperature", "tokenizer_class", "top_k", "top_p", "torch_dtype",
        "transformers.js_config", "transformers_version", "typical_p", "unsloth_fixed", "unsloth_version",
        "use_cache", "use_flash_attn",
    }
)  # fmt: skip


CHOSEN = {**COMMON, "expert_used_count": "num_experts_per_tok"}
QWEN_MOE = {**CHOSEN, "expert_feed_forward_length": "moe_intermediate_size"}
SHARED = {"expert_shared_feed_forward_length": "shared_expert_intermediate_size"}
DEEPSEEK = {**QWEN_MOE, "expert_shared_count": "n_shared_experts"}
EXPERT_COUNT = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")

# model_type of files that keep a text model's settings in text_config.
WRAPPERS = ("llama4", "mistral3", "gemma3", "gemma4", "qwen3_5", "qwen3_5_moe")
# Gemma 3's published text_config says only what differs from these (transformers' configuration_gemma3.py).
UNSAID: dict[str, dict[str, Any]] = {
    "gemma3_text": {
        "vocab_size": 262208, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256,
        "max_position_embeddings": 131072, "rms_norm_eps": 1e-6,
    },
    "mistral": {"model_type": "mistral"},
}  # fmt: skip

FAMILIES: dict[str, Family] = {
    "llama": Family("llama", COMMON, (heads, rope)),
    "mistral": Family("llama", COMMON, (heads, mistral_window, rope)),
    "mixtral": Family("llama", CHOSEN, (heads, mixtral_window, rope)),
    "qwen2": Family("qwen2", COMMON, (heads, qwen_window, rope)),
    "qwen2_moe": Family("qwen2moe", {**QWEN_MOE, **SHARED}, (heads, qwen_window, softmax_experts, rope)),
    "qwen3": Family("qwen3", COMMON, (heads, qwen_window, rope)),
    "qwen3_moe": Family("qwen3moe", QWEN_MOE, (heads, qwen_window, softmax_experts, rope)),
    "olmoe": Family("olmoe", CHOSEN, (heads, softmax_experts, rope)),
    "deepseek_v2": Family("deepseek2", DEEPSEEK, (latent_heads, deepseek_experts, rope)),
    "deepseek_v3": Family("deepseek2", DEEPSEEK, (latent_heads, deepseek_experts, rope)),
    **DENSE,
    **MIXTURES,
    **RECURRENT,
    **SPARSE,
    "gemma4_text": GEMMA4,
}


def text_settings(values: Mapping[str, Any]) -> Mapping[str, Any]:
    """The text model's settings where one stands beside a vision model, else the same."""
    text = values.get("text_config")
    if values.get("model_type") not in WRAPPERS or not isinstance(text, dict):
        return values
    kind = text.get("model_type", "mistral" if values["model_type"] == "mistral3" else None)
    found = {**UNSAID.get(str(kind), {}), **text}
    if found.get("quantization_config") is None and "quantization_config" in values:
        found["quantization_config"] = values["quantization_config"]
    tied = {values.get("tie_word_embeddings"), text.get("tie_word_embeddings")} - {None}
    return found | {"tie_word_embeddings": tied.pop() if len(tied) == 1 else None}  # else the tensors say it


def quantization_of(values: Mapping[str, Any], origin: str) -> Quantization | None:
    """How matrices are quantised; None where they are not, or in a way that the family itself sees to."""
    found = values.get("quantization_config")
    method = found.get("quant_method") if isinstance(found, dict) else found
    own = FAMILIES[values["model_type"]].quantizations
    return None if found is None or (isinstance(method, str) and method in own) else read_quantization(found, origin)


def config_keys(values: Mapping[str, Any], origin: str) -> tuple[str, dict[str, Any], bool | None]:
    """The GGUF architecture, its keys with prefix, and what tie_word_embeddings says (None where it says nothing).

    Raises: UnsupportedError (model_type, or a value that is not implemented), FileFormatError (missing, wrong kind).
    """
    settings = Settings(values, origin)
    kind = settings.take("model_type")
    family = FAMILIES.get(kind) if isinstance(kind, str) else None
    if family is None:
        raise UnsupportedError(f"{origin}: model_type is {shown(kind)}; possible are {', '.join(FAMILIES)}")
    settings.take("quantization_config")
    quantization_of(values, origin)
    keys: Keys = {name: settings.whole(key) for name, key in family.numbers.items()}
    if keys["block_count"] > LAYER_LIMIT:
        raise settings.wrong(family.numbers["block_count"], keys["block_count"], f"at most {LAYER_LIMIT}")
    if "expert_used_count" in keys:
        keys["expert_count"] = settings.whole(*EXPERT_COUNT)
    keys[family.epsilon[0]] = settings.number(family.epsilon[1])
    settings.expect("hidden_act", *family.activations)
    for step in family.steps:
        step(settings, keys, family.architecture)
    tied = settings.flag("tie_word_embeddings", False) if settings.take("tie_word_embeddings") is not None else None
    settings.finish(HARMLESS)
    return family.architecture, {f"{family.architecture}.{name}": value for name, value in keys.items()}, tied
