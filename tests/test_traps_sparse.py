"""The known ways to get a sparse indexer wrong, as `test_traps` has them for the first families: each model follows its
formula in float64, and a sprung trap moves the logits far beyond that, once there are more positions than are chosen.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest
from families import logits, relative_error
from paper import plain_frequencies
from paper_sparse import forward
from tiny import BASE, IDS, TURN, D, Tiny, split_heads
from tiny_sparse import CHOSEN, INDEXER, MODELS, deepseek32, glm_dsa, sparse

from localmoe.errors import FileFormatError, UnsupportedError
from localmoe.loader.huggingface_config import config_keys
from localmoe.network import Network

TOLERANCE = 1e-5
SPRUNG = 1e-3


@dataclass(frozen=True)
class Trap:
    """`wrong` are fields of the model's formula; positions below `start` cannot tell."""

    model: Callable[[], Tiny]
    wrong: dict[str, Any]
    start: int = CHOSEN
    id: str = field(default="", compare=False)


def trap(id: str, model: Callable[[], Tiny], start: int = CHOSEN, **wrong: Any) -> Trap:
    return Trap(model, wrong, start, f"{model.__name__}: {id}")


TRAPS = [
    trap("dense attention", deepseek32, chosen=len(IDS)),
    trap("one position fewer", deepseek32, CHOSEN - 1, chosen=CHOSEN - 1),
    trap("the indexer's rope in pairs, as GLM's", deepseek32, indexer_layout="pairs"),
    trap("the indexer's rope not stretched", deepseek32, indexer_frequencies=plain_frequencies(TURN, BASE)),
    trap("keys not normed", deepseek32, normed_keys=False),
    trap("keys without bias", deepseek32, biased_keys=False),
    trap("products not cut at zero", deepseek32, cut_at_zero=False),
    trap("heads not weighted", deepseek32, weighted=False),
    trap("dense attention", glm_dsa, chosen=len(IDS)),
    trap("the indexer's rope in halves, as DeepSeek's", glm_dsa, indexer_layout="halves"),
    trap("a choice shared too far", glm_dsa, indexed=(True, False, False, False)),
]


@pytest.fixture(params=MODELS.values(), ids=list(MODELS))
def tiny(request: pytest.FixtureRequest) -> Tiny:
    made: Tiny = request.param()
    return made


def right(tiny: Tiny, **wrong: Any) -> np.ndarray:
    return forward(replace(tiny.formula, **wrong), tiny.tensors, IDS)


@pytest.mark.parametrize("device", ["reference", "cpu"])
def test_every_family_follows_its_paper(tiny: Tiny, device: str) -> None:
    for form in (tiny, split_heads(tiny)):
        for chunk in (0, 5, 1):
            assert relative_error(logits(form.network(), IDS, device, chunk), right(tiny)) <= TOLERANCE


@pytest.mark.parametrize("trap", TRAPS, ids=[t.id for t in TRAPS])
def test_a_sprung_trap_shows_where_it_must(trap: Trap) -> None:
    tiny = trap.model()
    moved = np.abs(right(tiny, **trap.wrong) - right(tiny)).max(axis=1) / np.abs(right(tiny)).max()
    assert moved[trap.start :].max() > SPRUNG
    assert moved[: trap.start].max(initial=0) < 1e-12


def set_config(**changes: Any) -> Callable[[Network], None]:
    return lambda network: setattr(network, "config", replace(network.config, **changes))


@pytest.mark.parametrize(
    ("sabotage", "wrong"),
    [
        (set_config(indexer_top_k=CHOSEN - 1), {"chosen": CHOSEN - 1}),
        (set_config(indexer_top_k=64), {"chosen": len(IDS)}),
    ],
)
@pytest.mark.parametrize("device", ["reference", "cpu"])
def test_localmoe_sabotaged_gives_the_wrong_answer_of_the_formula(
    sabotage: Callable[[Network], None], wrong: dict[str, Any], device: str
) -> None:
    network = deepseek32().network()
    sabotage(network)
    found = logits(network, IDS, device)
    assert relative_error(found, right(deepseek32(), **wrong)) <= TOLERANCE
    assert relative_error(found, right(deepseek32())) > SPRUNG


# What a key says, and what its absence means.


def test_without_the_key_a_layer_has_an_indexer_where_it_has_the_tensors() -> None:
    tiny = glm_dsa().with_keys(attention__indexer__types=None)
    assert relative_error(logits(tiny.network(), IDS), right(tiny)) <= TOLERANCE


def test_a_layer_that_shares_a_choice_may_have_the_tensors() -> None:
    everywhere = sparse("glm-dsa", (0, 1, 2, 3), indexer_layout="pairs")
    tiny = everywhere.with_keys(**{"attention.indexer.types": np.array((True, False, False, True))})
    expected = right(tiny, indexed=(True, False, False, True))
    assert relative_error(logits(tiny.network(), IDS), expected) <= TOLERANCE


def test_a_prediction_layer_is_not_run(tiny: Tiny) -> None:
    extra = {name.replace("blk.3.", "blk.4."): array for name, array in tiny.tensors.items() if "blk.3." in name}
    extra["blk.4.nextn.eh_proj.weight"] = np.ones((D, 2 * D), np.float32)
    longer = tiny.with_tensors({**tiny.tensors, **extra}).with_keys(block_count=5, nextn_predict_layers=1)
    assert relative_error(logits(longer.network(), IDS), right(tiny)) <= TOLERANCE


@pytest.mark.parametrize(
    ("model", "key", "value"),
    [
        (deepseek32, "expert_gating_func", 1),
        (glm_dsa, "expert_gating_func", 1),
        (deepseek32, "attention.indexer.types", [1, 0, 0, 1]),
        (deepseek32, "attention.indexer.block_size", 64),
        (deepseek32, "attention.temperature_scale", 0.5),
    ],
)
def test_what_is_not_implemented_is_refused_by_key_and_value(model: Callable[[], Tiny], key: str, value: Any) -> None:
    tiny = model().with_keys(**{key: value})
    with pytest.raises(UnsupportedError) as refused:
        tiny.network()
    assert f"{tiny.architecture}.{key}" in str(refused.value)
    assert str(value) in str(refused.value)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"attention.indexer.key_length": TURN - 2}, "keys of at least"),
        ({"attention.indexer.top_k": 0}, "that chooses 0"),
        ({"attention.indexer.key_length": INDEXER + 2}, "indexer.attn_q_b"),
        ({"attention.indexer.types": np.array((False, True, True, True))}, "first layer has no indexer"),
        ({"attention.q_lora_rank": None}, "q_lora_rank"),
    ],
)
def test_indexers_that_cannot_be_are_refused(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(FileFormatError, match=says):
        sparse("glm-dsa", (0, 1, 2, 3)).with_keys(**changes).network()


SIZES = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 5, "num_attention_heads": 4, "vocab_size": 50,
    "max_position_embeddings": 4096, "rms_norm_eps": 1e-6, "q_lora_rank": 32, "kv_lora_rank": 16,
    "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16, "n_routed_experts": 8, "num_experts_per_tok": 2,
    "n_shared_experts": 1, "moe_intermediate_size": 24, "index_n_heads": 4, "index_head_dim": 16,
}  # fmt: skip


def keys_of(kind: str, **values: Any) -> dict[str, Any]:
    architecture, found, _ = config_keys({"model_type": kind, **SIZES, **values}, "config.json")
    return {name.removeprefix(f"{architecture}."): value for name, value in found.items()}


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({}, "11111"),
        ({"index_topk_freq": 3}, "11001"),
        ({"index_topk_freq": 2, "index_skip_topk_offset": 1}, "10101"),
        ({"index_topk_pattern": "FSSFS"}, "10010"),
        ({"indexer_types": ["full", "shared", "full", "full", "shared"], "index_topk_freq": 4}, "10110"),
    ],
)
def test_glm_configs_of_every_spelling_say_which_layers_choose(values: dict[str, Any], expected: str) -> None:
    found = keys_of("glm_moe_dsa", **values)["attention.indexer.types"]
    assert "".join(str(int(own)) for own in found) == expected


def test_deepseek_configs_say_what_the_indexer_is() -> None:
    found = keys_of("deepseek_v32", mlp_layer_types=["dense"] * 2 + ["sparse"] * 3, index_topk=7)
    assert found["leading_dense_block_count"] == 2
    assert [found[f"attention.indexer.{name}"] for name in ("head_count", "key_length", "top_k")] == [4, 16, 7]
    assert keys_of("deepseek_v32")["attention.indexer.top_k"] == 2048
    assert keys_of("deepseek_v32")["leading_dense_block_count"] == 3


@pytest.mark.parametrize(
    "wrong",
    [
        {"mlp_layer_types": ["sparse", "dense", "sparse", "sparse", "sparse"]},
        {"indexer_types": ["full"]},
        {"indexer_rope_interleave": False},
        {"layer_types": ["full_attention"] * 5},
        {"scoring_func": "softmax"},
        {"q_lora_rank": None},
    ],
)
def test_config_values_that_are_not_implemented_are_refused_by_name(wrong: dict[str, Any]) -> None:
    with pytest.raises((UnsupportedError, FileFormatError), match=next(iter(wrong))):
        keys_of("glm_moe_dsa", **wrong)
