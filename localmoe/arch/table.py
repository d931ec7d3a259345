"""Which module runs which architecture: a plain dict, filled by name so that only the family in use is imported."""

from __future__ import annotations

from importlib import import_module
from types import ModuleType

from localmoe.errors import UnsupportedError

# general.architecture -> module of this package; a test holds it equal to the modules' MODEL_TYPES.
FAMILIES = {
    "llama": "llama",
    "qwen2": "qwen2",
    "qwen2moe": "qwen2moe",
    "qwen3": "qwen3",
    "qwen3moe": "qwen3moe",
    "qwen3next": "qwen3next",
    "qwen35": "qwen35",
    "qwen35moe": "qwen35moe",
    "olmoe": "olmoe",
    "deepseek2": "deepseek2",
    "gpt-oss": "gpt_oss",
    "llama4": "llama4",
    "glm4moe": "glm4moe",
    "mistral4": "deepseek2",
    "deepseek32": "deepseek32",
    "glm-dsa": "deepseek32",
    "deepseek": "deepseek",
    "granitemoe": "granitemoe",
    "minimax-m2": "minimax_m2",
    "bailingmoe2": "bailingmoe2",
    "phimoe": "phimoe",
    "ernie4_5-moe": "ernie4_5_moe",
    "hunyuan-moe": "hunyuan_moe",
    "gemma2": "gemma2",
    "gemma3": "gemma3",
    "gemma4": "gemma4",
    "phi3": "phi3",
    "olmo2": "olmo2",
    "granite": "granite",
    "glm4": "glm4",
    "smollm3": "smollm3",
    "mistral3": "mistral3",
    "command-r": "command_r",
    "cohere2": "cohere2",
    "starcoder2": "starcoder2",
    "gpt2": "gpt2",
}


def family(architecture: str, origin: str) -> ModuleType:
    """The module with MODEL_TYPES, Config, load and forward. Raises UnsupportedError for any other architecture."""
    if architecture not in FAMILIES:
        raise UnsupportedError(
            f"{origin}: architecture {architecture!r} is not supported; these are: {', '.join(sorted(FAMILIES))}"
        )
    return import_module(f"localmoe.arch.{FAMILIES[architecture]}")
