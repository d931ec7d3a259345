"""Families with fresh random weights and settings against transformers: float32 logits, and each expert chosen.

`make oracle` runs this; it needs torch and transformers. Texts go beyond the window and the original context.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
from families import chosen_experts, chosen_positions, in_memory, logits, relative_error
from oracle_cases import CASES, VOCABULARY, Case, latent, yarn
from oracle_dense import DENSE
from oracle_mixtures import MIXTURES
from oracle_recurrent import RECURRENT
from verified import NAME as VERIFIED
from verified import claim

from localmoe.evaluation.transformers_model import ROUTERS, expert_ids
from localmoe.loader.locate import open_source
from localmoe.network import Network

pytestmark = pytest.mark.oracle

TOLERANCE = Case.tolerance
WITNESS = "transformers 5.23"
SEEDS = range(4)
STORED = re.compile("correction_bias|layer_scalar")  # buffers that are saved
TOKENS = 72  # original contexts are 16 or 32 tokens, windows 3 to 20
ALL = {**CASES, **DENSE, **MIXTURES, **RECURRENT}
RUNS = [(name, rope, seed) for name, case in ALL.items() for rope in case.ropes for seed in SEEDS]


@pytest.fixture(scope="session")
def transformers() -> Any:
    pytest.importorskip("torch", reason="the oracle needs torch: make oracle installs it")
    return pytest.importorskip("transformers", reason="the oracle needs transformers: make oracle installs it")


def random_model(transformers: Any, config: Any, seed: int) -> Any:
    """A model whose norms, biases and routers all matter, with weights that one of the saved types holds exactly."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    name = type(config).__name__.replace("TextConfig", "Config").replace("Config", "ForCausalLM")
    kind = getattr(transformers, name.replace("GPT2ForCausalLM", "GPT2LMHeadModel"))
    model = kind._from_config(config, attn_implementation="eager").eval().float()
    kept = (torch.float32, torch.bfloat16, torch.float16)[seed % 3]
    weights = [*model.named_parameters(), *((n, b) for n, b in model.named_buffers() if STORED.search(n))]
    with torch.no_grad():
        for name, weight in weights:
            noise = torch.randn(weight.shape, generator=generator)
            if weight.dim() > 1:
                weight.copy_(noise * (1.5 / weight.shape[-1] ** 0.5 if "embed" not in name else 1.0))
            else:
                weight.copy_((1 + 0.3 * noise) if re.search("norm|scalar", name) else 0.3 * noise)
            weight.copy_(weight.to(kept).float())
    return model


@dataclass(frozen=True)
class Answer:
    """Logits (T, V), per MoE layer the ids (T, k) that its router returned, per indexer the positions (T, k)."""

    logits: np.ndarray
    experts: list[np.ndarray]
    positions: list[np.ndarray]


def right_answer(model: Any, ids: list[int]) -> Answer:
    import torch

    chosen: list[np.ndarray] = []
    positions: list[np.ndarray] = []
    for module in model.modules():
        if type(module).__name__.endswith(ROUTERS):
            module.register_forward_hook(lambda module, inputs, outputs: chosen.append(expert_ids(module, outputs)))
        if type(module).__name__.endswith("Indexer"):
            module.register_forward_hook(lambda module, inputs, outputs: positions.append(outputs[0].numpy()))
    with torch.no_grad():
        result = model(torch.tensor([ids]), use_cache=False).logits[0].numpy()
    return Answer(result, chosen, positions)


def compare(
    network: Network,
    model: Any,
    ids: list[int],
    report: Callable[[str, object], None],
    tolerance: float = TOLERANCE,
) -> None:
    """Routers first: where they part, the logits have to. Then both devices."""
    right = right_answer(model, ids)
    indexers = zip(chosen_positions(network, ids), right.positions, strict=True)
    for layer, ((scores, found), theirs) in enumerate(indexers):
        for token in range(len(ids)):
            kept = {position for position in theirs[token].tolist() if position <= token}
            if other := kept ^ set(found[token].tolist()) - {-1}:
                there = {position: float(scores[token, position]) for position in sorted(other)}
                pytest.fail(f"indexer {layer}, token {token}: not chosen by both, with their scores: {there}")
    ours = chosen_experts(network, ids)
    for layer, ((scores, found, _), theirs) in enumerate(zip(ours, right.experts, strict=True)):
        for token in range(len(ids)):
            if set(found[token]) != set(theirs[token]):
                best = np.sort(scores[token])[::-1]
                gaps = -np.diff(best)[: found.shape[1]]
                pytest.fail(
                    f"MoE layer {layer}, token {token}: chose {sorted(found[token])}, transformers"
                    f" {sorted(theirs[token])}; router logits lie {gaps} apart"
                )
    errors = [relative_error(logits(network, ids, device), right.logits) for device in ("reference", "cpu")]
    assert max(errors) <= tolerance, "on the reference device and on the cpu"
    report(VERIFIED, claim(network, WITNESS, type(model).__name__.removesuffix("ForCausalLM"), max(errors)))


@pytest.mark.parametrize(("name", "rope", "seed"), RUNS, ids=[f"{n}-{rope}-{seed}" for n, rope, seed in RUNS])
def test_fresh_models_agree_with_transformers(
    name: str, rope: str, seed: int, transformers: Any, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    import torch

    case, r = ALL[name], Random(f"{name} {rope} {seed}")
    config = getattr(transformers, f"{case.kind}Config")(**case.settings(r, rope))
    model = random_model(transformers, config, seed)
    ids = [r.randrange(VOCABULARY) for _ in range(TOKENS)]
    kept = (torch.float32, torch.bfloat16, torch.float16)[seed % 3]
    copy.deepcopy(model).to(kept).save_pretrained(tmp_path)  # a copy, as rope's frequencies would be rounded too
    compare(Network(open_source(tmp_path)), model, ids, record_property, case.tolerance)


def mistral_large(model: Any, split: bool) -> Network:
    """transformers' mistral4 under the keys and tensor names of Mistral Large 3's GGUF form (llama.cpp's converter)."""
    import gguf

    c, rope = model.config, model.config.rope_parameters
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.DEEPSEEK2, c.num_hidden_layers)
    tensors: dict[str, np.ndarray] = {}
    for name, weight in model.state_dict().items():
        array = weight.numpy()
        block = f"blk.{name.split('.')[2]}." if ".layers." in name else ""
        if name.endswith("experts.gate_up_proj"):
            tensors[f"{block}ffn_gate_exps.weight"], tensors[f"{block}ffn_up_exps.weight"] = np.split(array, 2, axis=1)
        elif name.endswith("experts.down_proj"):
            tensors[f"{block}ffn_down_exps.weight"] = array
        elif name.endswith("kv_b_proj.weight") and split:
            heads = array.reshape(c.num_attention_heads, c.qk_nope_head_dim + c.v_head_dim, c.kv_lora_rank)
            tensors[f"{block}attn_k_b.weight"] = heads[:, : c.qk_nope_head_dim].transpose(0, 2, 1)
            tensors[f"{block}attn_v_b.weight"] = heads[:, c.qk_nope_head_dim :]
        else:
            tensors[names.get_name(name, (".weight",))] = array
    key, rank, turned = c.qk_nope_head_dim + c.qk_rope_head_dim, c.kv_lora_rank, c.qk_rope_head_dim
    keys = {
        "block_count": c.num_hidden_layers, "context_length": 4096, "embedding_length": c.hidden_size,
        "feed_forward_length": c.intermediate_size, "vocab_size": c.vocab_size, "expert_count": c.n_routed_experts,
        "leading_dense_block_count": c.first_k_dense_replace, "expert_used_count": c.num_experts_per_tok,
        "expert_shared_count": c.n_shared_experts, "expert_feed_forward_length": c.moe_intermediate_size,
        "expert_weights_scale": 1.0, "expert_weights_norm": True, "expert_gating_func": 1, "expert_group_count": 1,
        "expert_group_used_count": 1, "attention.head_count": c.num_attention_heads,
        "attention.head_count_kv": 1 if split else c.num_attention_heads,
        "attention.key_length": rank + turned if split else key,
        "attention.value_length": rank if split else c.v_head_dim,
        "attention.key_length_mla": key, "attention.value_length_mla": c.v_head_dim,
        "attention.q_lora_rank": c.q_lora_rank, "attention.kv_lora_rank": rank,
        "attention.layer_norm_rms_epsilon": c.rms_norm_eps, "rope.dimension_count": turned,
        "rope.freq_base": rope["rope_theta"], "rope.scaling.type": "yarn", "rope.scaling.factor": rope["factor"],
        "rope.scaling.original_context_length": rope["original_max_position_embeddings"],
        "rope.scaling.yarn_beta_fast": rope["beta_fast"], "rope.scaling.yarn_beta_slow": rope["beta_slow"],
        "rope.scaling.yarn_log_multiplier": 0.1 * rope["mscale_all_dim"],
        "attention.temperature_scale": rope["llama_4_scaling_beta"],
        "attention.temperature_length": rope["original_max_position_embeddings"],
    }  # fmt: skip
    metadata = {"general.architecture": "deepseek2"} | {f"deepseek2.{name}": value for name, value in keys.items()}
    return Network(in_memory(metadata, {n: np.ascontiguousarray(a, np.float32) for n, a in tensors.items()}))


@pytest.mark.parametrize("split", [False, True], ids=["kv_b", "k_b and v_b"])
@pytest.mark.parametrize("seed", SEEDS)
def test_mistral_large_3_agrees_with_the_attention_and_router_of_mistral4(
    seed: int, split: bool, transformers: Any, record_property: Callable[[str, object], None]
) -> None:
    """Softmax router, renormalised; yarn with both mscales 1; queries that warm with the position on every layer."""
    r = Random(seed)
    settings = latent(r, "plain", True) | {"n_routed_experts": 10, "num_experts_per_tok": 4, "n_shared_experts": 1}
    partial = settings["qk_rope_head_dim"] / (settings["qk_nope_head_dim"] + settings["qk_rope_head_dim"])
    config = transformers.Mistral4Config(
        **settings
        | {
            "rms_norm_eps": 1e-6, "routed_scaling_factor": 1.0, "tie_word_embeddings": False,
            "rope_parameters": yarn(r, mscale=1.0, mscale_all_dim=1.0, beta_fast=32.0, beta_slow=1.0)
            | {"rope_theta": 10000.0, "llama_4_scaling_beta": 0.1, "partial_rotary_factor": partial},
        }
    )  # fmt: skip
    model = random_model(transformers, config, 3 * seed)
    ids = [r.randrange(VOCABULARY) for _ in range(TOKENS)]
    compare(mistral_large(model, split), model, ids, record_property)
