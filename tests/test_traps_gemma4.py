"""The known ways to get Gemma 4 wrong, as `test_traps` has them for the first families."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest
from families import chosen_experts, logits, relative_error
from paper import plain_frequencies, shares
from paper_gemma4 import forward
from tiny import BASE, IDS, D, E, F, Tiny
from tiny_gemma4 import KEYS, LOCAL, MODELS, NARROW, SPAN, TURNING, WHOLE, WINDOWS, gemma4, gemma4_moe

from localmoe.errors import FileFormatError, UnsupportedError
from localmoe.loader.huggingface_config import config_keys
from localmoe.loader.metadata import Metadata

TOLERANCE = 1e-5
SPRUNG = 1e-3
ONE_KEY = 1


@dataclass(frozen=True)
class Trap:
    """`wrong` are fields of the model's formula; positions below `start` cannot tell."""

    model: Callable[[], Tiny]
    wrong: dict[str, Any]
    start: int = 0
    id: str = field(default="", compare=False)


def trap(id: str, model: Callable[[], Tiny], start: int = 0, **wrong: Any) -> Trap:
    return Trap(model, wrong, start, f"{model.__name__}: {id}")


OTHERS = (0, 1, 2, 0, 0, 2)
# A factor on a whole branch is no trap: the norm behind it takes it away again.
TRAPS = [
    trap("keys of the first layer with a window instead of the last", gemma4, sources=OTHERS),
    trap("no layer inputs", gemma4, layer_inputs=False),
    trap("layer inputs by id alone", gemma4, by_embedding=0.0),
    trap("layer inputs by embedding alone", gemma4, by_id=0.0),
    trap("layers not scaled", gemma4, layers_scaled=False),
    trap("values not normed", gemma4, values_normed=False),
    trap("embeddings not scaled", gemma4, embedding_scale=1.0),
    trap("the softmax scale of a head's width", gemma4, ONE_KEY, scale=WHOLE**-0.5),
    trap("no windows", gemma4, SPAN, windows=(SPAN * 99,) * 2 + (0,) + (SPAN * 99,) * 2 + (0,)),
    trap("all of a whole head turned", gemma4, ONE_KEY, frequencies=plain_frequencies(WHOLE, BASE)),
    trap(
        "frequencies of the turned part alone",
        gemma4,
        ONE_KEY,
        frequencies=np.concatenate([plain_frequencies(2 * TURNING, BASE), np.zeros(WHOLE // 2 - TURNING)]),
    ),
    trap("one rope base for all", gemma4, ONE_KEY, local_frequencies=plain_frequencies(NARROW, BASE)),
    trap("logits not capped", gemma4, logit_softcap=0.0),
    trap("keys that were normed as values", gemma4_moe, keys_as_values="normed"),
    trap("no dense part beside the experts", gemma4_moe, dense=False),
    trap("the router sees what the dense part sees", gemma4_moe, router_sees="normed"),
    trap("the router's input not scaled", gemma4_moe, router_scaled=False),
    trap("the router's input not normed", gemma4_moe, router_normed=False),
    trap("experts without factors", gemma4_moe, factors=False),
]


@pytest.fixture(params=MODELS.values(), ids=list(MODELS))
def tiny(request: pytest.FixtureRequest) -> Tiny:
    made: Tiny = request.param()
    return made


def right(tiny: Tiny, **wrong: Any) -> np.ndarray:
    return forward(replace(tiny.formula, **wrong), tiny.tensors, IDS)


@pytest.mark.parametrize("device", ["reference", "cpu"])
def test_both_kinds_follow_the_formula(tiny: Tiny, device: str) -> None:
    for chunk in (0, 4, 1):
        assert relative_error(logits(tiny.network(), IDS, device, chunk), right(tiny)) <= TOLERANCE


@pytest.mark.parametrize("trap", TRAPS, ids=[t.id for t in TRAPS])
def test_a_sprung_trap_shows_where_it_must(trap: Trap) -> None:
    tiny = trap.model()
    moved = np.abs(right(tiny, **trap.wrong) - right(tiny)).max(axis=1) / np.abs(right(tiny)).max()
    assert moved[trap.start :].max() > SPRUNG
    assert moved[: trap.start].max(initial=0) < 1e-12


SABOTAGE: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"sources": OTHERS}, {"sources": OTHERS}),
    ({"logit_softcap": 0.0}, {"logit_softcap": 0.0}),
]


@pytest.mark.parametrize(("changes", "wrong"), SABOTAGE)
@pytest.mark.parametrize("device", ["reference", "cpu"])
def test_localmoe_sabotaged_gives_the_wrong_answer_of_the_formula(
    changes: dict[str, Any], wrong: dict[str, Any], device: str
) -> None:
    network = gemma4().network()
    network.config = replace(network.config, **changes)
    found = logits(network, IDS, device)
    assert relative_error(found, right(gemma4(), **wrong)) <= TOLERANCE
    assert relative_error(found, right(gemma4())) > SPRUNG


def test_chosen_experts_and_shares_are_those_of_the_formula() -> None:
    tiny = gemma4_moe()
    for i, (scores, ids, found) in enumerate(chosen_experts(tiny.network(), IDS)):
        factors = tiny.tensors[f"blk.{i}.ffn_down_exps.scale"]
        for t in range(len(IDS)):
            expected = shares(tiny.formula, scores[t].astype(np.float64), np.zeros(E))
            expected = {e: share * factors[e] for e, share in expected.items()}
            assert dict(zip(ids[t].tolist(), found[t].tolist(), strict=True)) == pytest.approx(expected, rel=1e-5)


# What a key says, and what its absence means.


def test_unused_keys_and_values_of_layers_that_read_anothers_are_passed_over() -> None:
    """As released files have them."""
    tiny = gemma4()
    extra = {
        "blk.3.attn_k.weight": np.ones((NARROW, D), np.float32), "blk.5.attn_v.weight": np.ones((WHOLE, D), np.float32),
        "blk.3.attn_k_norm.weight": np.ones(NARROW, np.float32),
    }  # fmt: skip
    more = tiny.with_tensors({**tiny.tensors, **extra})
    assert relative_error(logits(more.network(), IDS), right(tiny)) <= TOLERANCE


def test_experts_in_two_matrices_are_those_in_one() -> None:
    tiny = gemma4_moe()
    parted = {}
    for name, array in tiny.tensors.items():
        if "gate_up" in name:
            parted[name.replace("gate_up", "gate")], parted[name.replace("gate_up", "up")] = np.split(array, 2, axis=1)
        else:
            parted[name] = array
    parted = {name: np.ascontiguousarray(array) for name, array in parted.items()}
    assert relative_error(logits(tiny.with_tensors(parted).network(), IDS), right(tiny)) <= TOLERANCE


def test_layers_without_scale_are_not_scaled_and_a_missing_pattern_is_five_to_one() -> None:
    tiny = gemma4_moe()
    unscaled = tiny.with_tensors({n: a for n, a in tiny.tensors.items() if "layer_output_scale" not in n})
    assert relative_error(logits(unscaled.network(), IDS), right(tiny, layers_scaled=False)) <= TOLERANCE
    config = gemma4_moe().network().module.Config
    keys = {f"gemma4.{n}": v for n, v in {**KEYS, **tiny.keys}.items() if n != "attention.sliding_window_pattern"}
    found = config.read(Metadata({"general.architecture": "gemma4", **keys}, "tiny.gguf"))
    assert found.windows == (SPAN,) * 5 + (0,)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("attention.scale", 0.5),
        ("attention.value_length", 8),
        ("attention.value_length_swa", 8),
        ("expert_gating_func", 2),
        ("expert_weights_norm", False),
        ("attn_logit_softcapping", 50.0),
        ("expert_group_count", 3),
    ],
)
def test_what_is_not_implemented_is_refused_by_key_and_value(key: str, value: Any) -> None:
    with pytest.raises(UnsupportedError) as refused:
        gemma4_moe().with_keys(**{key: value}).network()
    assert f"gemma4.{key}" in str(refused.value)
    assert str(value) in str(refused.value)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"attention.shared_kv_layers": 4}, "shared_kv_layers"),
        ({"attention.shared_kv_layers": 9}, "shared_kv_layers"),
        ({"rope.dimension_count_swa": NARROW + 2}, "layers with a window"),
        ({"rope.freq_base_swa": 0.5}, "layers with a window"),
        ({"feed_forward_length": np.array([F] * 4 + [2 * F])}, "feed_forward_length"),
        ({"feed_forward_length": np.array([F] * 5 + [-1])}, "feed_forward_length"),
        ({"attention.head_count_kv": None}, "head_count_kv"),
        ({"attention.sliding_window_pattern": np.array([True] * 5)}, "sliding_window_pattern"),
        ({"embedding_length_per_layer_input": 13}, "per_layer_token_embd"),
    ],
)
def test_keys_that_contradict_each_other_are_refused(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(FileFormatError, match=says):
        gemma4().with_keys(**changes).network()


SIZES = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 6, "num_attention_heads": 4, "vocab_size": 50,
    "max_position_embeddings": 4096, "rms_norm_eps": 1e-6, "head_dim": 16, "num_key_value_heads": 2,
    "hidden_size_per_layer_input": 0,
}  # fmt: skip


def keys_of(**values: Any) -> dict[str, Any]:
    _, found, _ = config_keys({"model_type": "gemma4_text", **SIZES, **values}, "config.json")
    return {name.removeprefix("gemma4."): value for name, value in found.items()}


def test_configs_of_both_spellings_say_the_same_of_layers_without_window() -> None:
    named = keys_of(global_head_dim=32, num_global_key_value_heads=1, attention_k_eq_v=True)
    listed = keys_of(per_layer_config={"5": {"head_dim": 32, "num_key_value_heads": 1}})
    assert named == listed
    assert named["attention.head_count_kv"] == [2] * 5 + [1]
    assert (named["attention.key_length"], named["attention.key_length_swa"]) == (32, 16)
    assert keys_of(global_head_dim=32, num_global_key_value_heads=1)["attention.head_count_kv"] == [2] * 6
    assert named["rope.factors"] == [1.0] * 4 + [1e30] * 12


def test_the_last_layer_sees_everything_whatever_layer_types_says() -> None:
    found = keys_of(layer_types=["full_attention"] + ["sliding_attention"] * 5)
    assert found["attention.sliding_window_pattern"] == [False] + [True] * 4 + [False]


def test_layers_that_share_keys_may_be_twice_as_wide() -> None:
    found = keys_of(num_kv_shared_layers=2, use_double_wide_mlp=True, num_hidden_layers=8)
    assert found["feed_forward_length"] == [96] * 6 + [192] * 2


@pytest.mark.parametrize(
    "wrong",
    [
        {"use_bidirectional_attention": "all"},
        {"attention_bias": True},
        {"hidden_activation": "silu"},
        {"per_layer_config": {"4": {"head_dim": 32}}},
        {"per_layer_config": {"5": {"sliding_window": 32}}},
        {"rope_parameters": {"full_attention": {"rope_type": "yarn", "rope_theta": 1e6}}, "": "rope_type"},
        {"rope_parameters": {"full_attention": 3}},
        {"vocab_size_per_layer_input": 49, "hidden_size_per_layer_input": 8},
    ],
)
def test_config_values_that_are_not_implemented_are_refused_by_name(wrong: dict[str, Any]) -> None:
    name = wrong.pop("", next(iter(wrong)))
    with pytest.raises((UnsupportedError, FileFormatError), match=name if "sliding" not in str(wrong) else "sliding_w"):
        keys_of(**wrong)


def test_windows_here_are_those_of_the_tiny_models() -> None:
    assert gemma4().network().config.windows == WINDOWS
    assert gemma4().network().config.local_rope.base == LOCAL
