"""config.json of families with a sparse indexer under GGUF's keys; see `config_json.Family`.

What transformers 5.23 computes decides (its models/*/modeling_*.py).
"""

from __future__ import annotations

from localmoe.errors import UnsupportedError
from localmoe.loader.config_json import Family, Keys, Settings
from localmoe.loader.config_mixtures import COMMON, SHARED, weighted_groups
from localmoe.loader.config_steps import latent_heads, rope
from localmoe.loader.source import shown

KINDS = ("full", "shared")


def sparse_latent(settings: Settings, keys: Keys, architecture: str) -> None:
    """DeepSeek-V3's attention and router, and an indexer."""
    if settings.values.get("q_lora_rank") is None:
        raise settings.wrong("q_lora_rank", None, "a whole number from 1: the indexer's queries come from there")
    latent_heads(settings, keys, architecture)
    settings.take("qk_rope_head_dim", "ep_size", "scale_fmt", "moe_router_dtype")
    settings.expect("topk_method", "noaux_tc")
    settings.expect("scoring_func", "sigmoid")
    settings.expect("moe_layer_freq", 1)
    keys["expert_gating_func"] = 2
    keys["leading_dense_block_count"] = dense_layers(settings, keys["block_count"])
    weighted_groups(settings, keys)
    keys["attention.indexer.head_count"] = settings.whole("index_n_heads")
    keys["attention.indexer.key_length"] = settings.whole("index_head_dim")
    keys["attention.indexer.top_k"] = settings.whole("index_topk", default=2048)
    blocks = keys["block_count"]
    settings.expect("layer_types", ["indexed_attention"] * blocks)
    settings.expect("indexer_rope_interleave", architecture == "glm-dsa")
    if architecture == "glm-dsa":
        keys["attention.indexer.types"] = [kind == "full" for kind in indexer_types(settings, blocks)]
    rope(settings, keys, architecture)


def dense_layers(settings: Settings, blocks: int) -> int:
    """The first so many layers have no experts, by either spelling."""
    count = settings.whole("first_k_dense_replace", default=3)
    found = settings.take("mlp_layer_types")
    if found is None:
        return min(count, blocks)
    if not isinstance(found, list) or len(found) != blocks:
        raise settings.wrong("mlp_layer_types", found, f"a name for each of {blocks} layers")
    dense = next((i for i, kind in enumerate(found) if kind != "dense"), blocks)
    if found[dense:] != ["sparse"] * (blocks - dense):
        raise UnsupportedError(
            f"{settings.origin}: mlp_layer_types is {shown(found)}; possible is 'dense' for the first, then 'sparse'"
        )
    return dense


def indexer_types(settings: Settings, blocks: int) -> list[str]:
    """Layers with an indexer of their own ("full"), or that share the choice of the last one that has."""
    pattern, found = settings.take("index_topk_pattern"), settings.take("indexer_types")
    period = max(settings.whole("index_topk_freq", default=1), 1)
    offset = settings.whole("index_skip_topk_offset", default=2)
    if found is None and isinstance(pattern, str):
        found = [{"F": "full", "S": "shared"}.get(letter, letter) for letter in pattern]
    elif found is None:
        found = pattern or [KINDS[max(i - offset + 1, 0) % period > 0] for i in range(blocks)]
    if not isinstance(found, list) or len(found) != blocks or any(kind not in KINDS for kind in found):
        raise settings.wrong("indexer_types", found, f"'full' or 'shared' for each of {blocks} layers")
    return found


SIZES = {**COMMON, **SHARED, "feed_forward_length": "intermediate_size"}
SPARSE: dict[str, Family] = {
    "deepseek_v32": Family("deepseek32", SIZES, (sparse_latent,)),
    "glm_moe_dsa": Family("glm-dsa", SIZES, (sparse_latent,)),
}
