"""The known ways to get the newer dense families wrong, as `test_traps` has them for the first families: each model
follows its formula in float64, and a sprung trap moves the logits far beyond that, from where on it can be seen.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from families import logits, opened, relative_error
from gguf_writing import Tensor, write_gguf
from paper import plain_frequencies, yarn_magnitude
from paper_dense import forward
from tiny import BASE, FACTOR, IDS, D, H, Tiny, d
from tiny_dense import (
    CONTEXT,
    HALF,
    LONG,
    MODELS,
    SHORT,
    SPAN,
    cohere2,
    command_r,
    gemma2,
    gemma3,
    glm4,
    gpt2,
    granite,
    mistral3,
    olmo2,
    phi3,
    smollm3,
    starcoder2,
)

from localmoe.errors import FileFormatError, SettingError, UnsupportedError
from localmoe.formats import FORMATS, Weight
from localmoe.loader.huggingface import _renaming
from localmoe.loader.huggingface_config import FAMILIES, config_keys
from localmoe.loader.metadata import Metadata
from localmoe.model import Model

TOLERANCE = 1e-5
SPRUNG = 1e-3
ONE_KEY = 1  # at position 0 there is one key: scores do not matter


@dataclass(frozen=True)
class Trap:
    """`wrong` are fields of the model's formula; positions below `start` cannot tell."""

    model: Callable[[], Tiny]
    wrong: dict[str, Any]
    start: int = 0
    id: str = field(default="", compare=False)


def trap(id: str, model: Callable[[], Tiny], start: int = 0, **wrong: Any) -> Trap:
    return Trap(model, wrong, start, f"{model.__name__}: {id}")


ALL = (True,) * 4
WHOLE = plain_frequencies(d, BASE)

TRAPS = [
    trap("embeddings not scaled", gemma3, embedding_scale=1.0),
    trap("1 added to norms that have it", gemma3, raised=1.0),
    trap("no norms after the branches", gemma3, after_normed=False),
    trap("a window too long by one", gemma3, SPAN, windows=(SPAN + 1,) * 5 + (0,)),
    trap("a window in every layer", gemma3, ONE_KEY, windows=(SPAN,) * 6),
    trap("one rope base for all layers", gemma3, ONE_KEY, local_frequencies=None),
    trap("no head norms", gemma3, ONE_KEY, head_norm="none"),
    trap("rope in pairs instead of halves", gemma3, ONE_KEY, layout="pairs"),
    trap("the softmax scale of a head's width", gemma3, ONE_KEY, scale=d**-0.5),
    trap("silu for gelu", gemma3, activation="silu"),
    trap("logits not capped", gemma3, logit_softcap=0.0),
    trap("scores not capped", gemma2, ONE_KEY, softcap=0.0),
    trap("logits not capped", gemma2, logit_softcap=0.0),
    trap("no windows", gemma2, SPAN, windows=(0, 0)),
    trap("windows in odd layers", gemma2, SPAN, windows=(0, SPAN)),
    trap("embeddings not scaled", gemma2, embedding_scale=1.0),
    trap("1 added to norms that have it", gemma2, raised=1.0),
    trap("no norms after the branches", gemma2, after_normed=False),
    trap("silu for gelu", gemma2, activation="silu"),
    trap("short factors in a long context", phi3, ONE_KEY, frequencies=HALF / SHORT),
    trap("factors multiplied", phi3, ONE_KEY, frequencies=HALF * LONG),
    trap("no amplitude", phi3, ONE_KEY, amplitude=1.0),
    trap("all of a head turned", phi3, ONE_KEY, frequencies=WHOLE / np.resize(LONG, d // 2)),
    trap("gate and up swapped", phi3, gate_first=False),
    trap("no window", phi3, 12, window=0),
    trap("rope in pairs instead of halves", phi3, ONE_KEY, layout="pairs"),
    trap("head norms per head", olmo2, ONE_KEY, head_norm="head"),
    trap("no norms after the branches", olmo2, after_normed=False),
    trap("embeddings not scaled", granite, embedding_scale=1.0),
    trap("branches not scaled", granite, residual_scale=1.0),
    trap("the softmax scale of a head's width", granite, ONE_KEY, scale=d**-0.5),
    trap("logits not scaled", granite, logit_scale=1.0),
    trap("logits multiplied by what divides them", granite, logit_scale=6.0),
    trap("rope in halves instead of pairs", granite, ONE_KEY, layout="halves"),
    trap("rope in halves instead of pairs", glm4, ONE_KEY, layout="halves"),
    trap("all of a head turned", glm4, ONE_KEY, frequencies=WHOLE),
    trap("no biases", glm4, biased=False),
    trap("gate and up swapped", glm4, gate_first=False),
    trap("no norms after the branches", glm4, after_normed=False),
    trap("rope in every layer", smollm3, ONE_KEY, turned=ALL),
    trap("no rope in the first of four layers", smollm3, ONE_KEY, turned=(False, True, True, True)),
    trap("rope in halves instead of pairs", smollm3, ONE_KEY, layout="halves"),
    trap("queries not warmed", mistral3, 6, temperature=None),
    trap("queries warmed one position early", mistral3, 5, temperature=(0.4, 6, 1)),
    trap("yarn's amplitude", mistral3, ONE_KEY, amplitude=yarn_magnitude(FACTOR)),
    trap("rope in halves instead of pairs", mistral3, ONE_KEY, layout="halves"),
    trap("rms norms for layer norms", command_r, norm="rms"),
    trap("one branch after the other", command_r, parallel=False),
    trap("no norms of q and k", command_r, ONE_KEY, head_norm="none"),
    trap("one weight for all heads' norms", command_r, ONE_KEY, head_norm="rows"),
    trap("logits not scaled", command_r, logit_scale=1.0),
    trap("logits divided by what multiplies them", command_r, logit_scale=4.0),
    trap("rope in halves instead of pairs", command_r, ONE_KEY, layout="halves"),
    trap("rope in every layer", cohere2, ONE_KEY, turned=ALL),
    trap("no windows", cohere2, SPAN, windows=()),
    trap("a window in every layer", cohere2, SPAN, windows=(SPAN,) * 4),
    trap("rms norms for layer norms", cohere2, norm="rms"),
    trap("one branch after the other", cohere2, parallel=False),
    trap("logits not scaled", cohere2, logit_scale=1.0),
    trap("no biases", starcoder2, biased=False),
    trap("rms norms for layer norms", starcoder2, norm="rms"),
    trap("silu for gelu", starcoder2, activation="silu"),
    trap("no window", starcoder2, SPAN, window=0),
    trap("rope in pairs instead of halves", starcoder2, ONE_KEY, layout="pairs"),
    trap("no positions", gpt2, positions=False),
    trap("rope beside positions", gpt2, ONE_KEY, turned=(True, True), frequencies=plain_frequencies(D // H, BASE)),
    trap("no biases", gpt2, biased=False),
    trap("rms norms for layer norms", gpt2, norm="rms"),
    trap("silu for gelu", gpt2, activation="silu"),
]


@pytest.fixture(params=MODELS.values(), ids=list(MODELS))
def tiny(request: pytest.FixtureRequest) -> Tiny:
    made: Tiny = request.param()
    return made


def right(tiny: Tiny, **wrong: Any) -> np.ndarray:
    return forward(replace(tiny.formula, **wrong), tiny.tensors, IDS)


@pytest.mark.parametrize("device", ["reference", "cpu"])
def test_every_family_follows_its_paper(tiny: Tiny, device: str) -> None:
    assert relative_error(logits(tiny.network(), IDS, device), right(tiny)) <= TOLERANCE
    assert relative_error(logits(tiny.network(), IDS, device, chunk=1), right(tiny)) <= TOLERANCE
    assert relative_error(logits(tiny.network(), IDS, device, chunk=11), right(tiny)) <= TOLERANCE


@pytest.mark.parametrize("trap", TRAPS, ids=[t.id for t in TRAPS])
def test_a_sprung_trap_shows_where_it_must(trap: Trap) -> None:
    tiny = trap.model()
    moved = np.abs(right(tiny, **trap.wrong) - right(tiny)).max(axis=1) / np.abs(right(tiny)).max()
    assert moved[trap.start :].max() > SPRUNG
    assert moved[: trap.start].max(initial=0) < 1e-12


SABOTAGE: list[tuple[Callable[[], Tiny], dict[str, Any], dict[str, Any]]] = [
    (gemma3, {"windows": (SPAN,) * 6}, {"windows": (SPAN,) * 6}),
    (gemma3, {"attention_scale": d**-0.5}, {"scale": d**-0.5}),
    (gemma2, {"windows": (0, SPAN)}, {"windows": (0, SPAN)}),
    (gemma2, {"attention_softcap": 0.0}, {"softcap": 0.0}),
    (gemma2, {"logit_softcap": 0.0}, {"logit_softcap": 0.0}),
    (phi3, {"sliding_window": 0}, {"window": 0}),
    (granite, {"residual_scale": 1.0}, {"residual_scale": 1.0}),
    (granite, {"attention_scale": d**-0.5}, {"scale": d**-0.5}),
    (smollm3, {"turned": ALL}, {"turned": ALL}),
    (mistral3, {"temperature": None}, {"temperature": None}),
    (command_r, {"logit_scale": 1.0}, {"logit_scale": 1.0}),
    (cohere2, {"logit_scale": 1.0}, {"logit_scale": 1.0}),
    (starcoder2, {"sliding_window": 0}, {"window": 0}),
]


@pytest.mark.parametrize("device", ["reference", "cpu"])
@pytest.mark.parametrize(("model", "changes", "wrong"), SABOTAGE, ids=[f"{m.__name__}, {w}" for m, _, w in SABOTAGE])
def test_localmoe_sabotaged_gives_the_wrong_answer_of_the_formula(
    model: Callable[[], Tiny], changes: dict[str, Any], wrong: dict[str, Any], device: str
) -> None:
    tiny = model()
    network = tiny.network()
    network.config = replace(network.config, **changes)
    found = logits(network, IDS, device)
    assert relative_error(found, right(tiny, **wrong)) <= TOLERANCE
    assert relative_error(found, right(tiny)) > SPRUNG


# LongRoPE.


@pytest.mark.parametrize("device", ["reference", "cpu"])
def test_phi_takes_the_long_factors_when_the_context_is_longer_than_the_original_one(device: str) -> None:
    """However short the text: keys that stand in the cache were turned by one set of frequencies."""
    ids = np.asarray(IDS[:9], np.int32)
    for context, factors in ((CONTEXT, SHORT), (CONTEXT + 1, LONG)):
        tiny = phi3().following(frequencies=HALF / factors)
        with opened(device, context) as opened_device:
            plan = opened_device.compile(tiny.network().program(len(ids), all_rows=True))
            found = plan.run(ids, 0)
        assert relative_error(found, right(tiny)[: len(ids)]) <= TOLERANCE


def test_phi_without_factors_turns_by_plain_rope() -> None:
    tiny = phi3().with_keys(rope__scaling__attn_factor=None, rope__scaling__original_context_length=None)
    plain = tiny.with_tensors({name: array for name, array in tiny.tensors.items() if "rope_factors" not in name})
    assert relative_error(logits(plain.network(), IDS), right(plain, frequencies=HALF, amplitude=1.0)) <= TOLERANCE


# What a key says, and what its absence means.


def test_gemma_2s_own_numbers_where_the_file_is_silent() -> None:
    """llama.cpp has them in its code."""
    silent = {"attn_logit_softcapping": None, "final_logit_softcapping": None, "attention__sliding_window": None}
    config = gemma2().with_keys(**silent, attention__scale=None).network().config
    assert (config.attention_softcap, config.logit_softcap, config.windows) == (50.0, 30.0, (4096, 0))
    assert config.attention_scale == d**-0.5


@pytest.mark.parametrize(("model", "blocks"), [(gemma2, 46), (gemma3, 62)])
def test_gemmas_27b_scales_by_the_quotient_of_its_sizes(model: Callable[[], Tiny], blocks: int) -> None:
    """GGUF has no key for query_pre_attn_scalar; its files are known by their number of layers."""
    tiny = model().with_keys(block_count=blocks, attention__scale=None)
    values = {f"{tiny.architecture}.{name}": value for name, value in tiny.keys.items()}
    meta = Metadata({"general.architecture": tiny.architecture, **values}, "tiny.gguf")
    assert model().network().module.Config.read(meta).attention_scale == (D / H) ** -0.5


def test_gemma_3s_five_layers_of_six_have_windows_and_their_base_is_10000() -> None:
    network = gemma3().with_keys(rope__freq_base_swa=None).network()
    assert network.config.windows == (SPAN,) * 5 + (0,)
    assert network.config.local_rope.base == 10000.0
    listed = gemma3().with_keys(attention__sliding_window_pattern=[False, True] * 3)
    assert relative_error(logits(listed.network(), IDS), right(listed, windows=(0, SPAN) * 3)) <= TOLERANCE


def test_gemma_3_scales_rope_in_the_layers_without_window_alone() -> None:
    tiny = gemma3().with_keys(rope__scaling__type="linear", rope__scaling__factor=8.0)
    assert relative_error(logits(tiny.network(), IDS), right(tiny, frequencies=WHOLE / 8)) <= TOLERANCE
    both = {"frequencies": WHOLE / 8, "local_frequencies": tiny.formula.local_frequencies / 8}
    assert relative_error(right(tiny, **both), right(tiny, frequencies=WHOLE / 8)) > SPRUNG


def test_ministrals_temperature_counts_from_yarns_original_context_where_the_file_is_silent() -> None:
    tiny = mistral3().with_keys(attention__temperature_length=None).following(temperature=(0.4, CONTEXT, 0))
    assert relative_error(logits(tiny.network(), IDS), right(tiny)) <= TOLERANCE


def test_command_r_without_norms_of_q_and_k_does_without() -> None:
    tiny = command_r()
    fewer = {name: array for name, array in tiny.tensors.items() if "_q_norm" not in name and "_k_norm" not in name}
    tiny = tiny.with_tensors(fewer).following(head_norm="none")
    assert relative_error(logits(tiny.network(), IDS), right(tiny)) <= TOLERANCE


def test_gpt_2_has_no_context_beyond_its_positions(tmp_path: Path) -> None:
    source = gpt2().source()
    records = [Tensor(n, w.shape, data=w.slabs[0].tobytes()) for n, w in source.tensors.items()]
    file = write_gguf(tmp_path / "gpt2.gguf", dict(source.metadata), records)
    assert Model(file, device="reference", context=64).context == 64
    with pytest.raises(SettingError, match="64 positions"):
        Model(file, device="reference", context=65)


# Folders.


def stored(name: str, values: np.ndarray, format: str = "F32") -> Weight:
    if format == "BF16":
        data = (values.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
    else:
        data = values.astype(np.float16 if format == "F16" else np.float32)
    return Weight.whole(name, values.shape, FORMATS[format], np.ascontiguousarray(data).view(np.uint8).reshape(-1))


@pytest.mark.parametrize("format", ["F32", "F16", "BF16"])
def test_gemmas_norms_get_their_1_from_folders(format: str) -> None:
    weight, matrix = np.array([0.5, -1.0, 0.0078125]), np.ones((2, 2))
    makers = {
        "blk.0.post_ffw_norm.weight": lambda: stored("norm", weight, format),
        "blk.0.ffn_up.weight": lambda: stored("up", matrix, format),
    }
    FAMILIES["gemma3_text"].rewrite(makers, {})
    raised, same = makers["blk.0.post_ffw_norm.weight"](), makers["blk.0.ffn_up.weight"]()
    assert raised.format.name == "F32"
    assert raised.slabs[0].view(np.float32).tolist() == [1.5, 0.0, 1.0078125]
    assert same.format.name == format


@pytest.mark.parametrize("format", ["F32", "F16", "BF16"])
def test_gpt_2s_matrices_are_turned_and_its_masks_left_out(format: str) -> None:
    matrix = np.arange(6.0).reshape(2, 3)
    makers = {
        "blk.1.attn_qkv.weight": lambda: stored("qkv", matrix, format),
        "h.1.attn.bias": lambda: stored("mask", np.ones(4)),
        "transformer.h.0.attn.masked_bias": lambda: stored("mask", np.ones(1)),
    }
    FAMILIES["gpt2"].rewrite(makers, {})
    assert list(makers) == ["blk.1.attn_qkv.weight"]
    turned, expected = makers["blk.1.attn_qkv.weight"](), stored("qkv", np.ascontiguousarray(matrix.T), format)
    assert turned.shape == (3, 2)
    assert turned.slabs[0].tobytes() == expected.slabs[0].tobytes()


SIZES = {
    "vocab_size": 64, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 6, "num_attention_heads": 4,
    "max_position_embeddings": 131072, "rms_norm_eps": 1e-6,
}  # fmt: skip


def keys_of(kind: str, **values: Any) -> dict[str, Any]:
    architecture, found, _ = config_keys({"model_type": kind, **SIZES, **values}, "config.json")
    return {name.removeprefix(f"{architecture}."): value for name, value in found.items()}


def test_gemma_3_configs_of_both_spellings_say_the_same() -> None:
    old = {"rope_theta": 1e6, "rope_local_base_freq": 10000.0, "rope_scaling": {"rope_type": "linear", "factor": 8.0}}
    full = {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6}
    local = {"rope_type": "default", "rope_theta": 10000.0}
    new = {"rope_parameters": {"full_attention": full, "sliding_attention": local}}
    common = {"sliding_window": 512, "query_pre_attn_scalar": 168, "head_dim": 128}
    found = keys_of("gemma3_text", **old, **common)
    assert found == keys_of("gemma3_text", **new, **common)
    assert found["attention.sliding_window_pattern"] == [True] * 5 + [False]
    assert (found["rope.freq_base"], found["rope.freq_base_swa"], found["rope.scaling.factor"]) == (1e6, 1e4, 8.0)
    assert found["attention.scale"] == 168**-0.5


def test_a_soft_cap_of_null_is_none_and_a_missing_one_is_gemma_2s() -> None:
    found = keys_of("gemma2", attn_logit_softcapping=None)
    assert (found["attn_logit_softcapping"], found["final_logit_softcapping"]) == (0.0, 30.0)
    assert found["attention.key_length"] == 256


def test_phi_configs_give_longropes_amplitude() -> None:
    factors = {"type": "su", "short_factor": [1.0] * 8, "long_factor": [2.0] * 8}
    found = keys_of("phi3", rope_scaling=factors, original_max_position_embeddings=4096)
    assert found["rope.scaling.attn_factor"] == pytest.approx((1 + np.log(32) / np.log(4096)) ** 0.5)
    assert (found["rope.factors_short"], found["rope.factors_long"]) == ([1.0] * 8, [2.0] * 8)
    with pytest.raises(FileFormatError, match="long_factor"):
        keys_of("phi3", rope_scaling={**factors, "long_factor": [2.0] * 7})
    named = {**factors, "short_mscale": 1.24, "long_mscale": 1.24, "original_max_position_embeddings": 4096}
    found = keys_of("phimoe", rope_scaling=named, num_local_experts=4, num_experts_per_tok=2)
    assert (found["rope.scaling.attn_factor"], found["rope.scaling.original_context_length"]) == (1.24, 4096)
    with pytest.raises(UnsupportedError, match="long_mscale is "):
        keys_of("phimoe", rope_scaling={**named, "long_mscale": 1.5}, num_local_experts=4, num_experts_per_tok=2)


@pytest.mark.parametrize(
    ("architecture", "name", "expected"),
    [
        ("gemma2", "lm_head.weight", "output.weight"),
        ("gemma3", "model.layers.1.post_attention_layernorm.weight", "blk.1.post_attention_norm.weight"),
        ("gemma3", "model.layers.1.pre_feedforward_layernorm.weight", "blk.1.ffn_norm.weight"),
        ("glm4", "model.layers.1.post_self_attn_layernorm.weight", "blk.1.post_attention_norm.weight"),
        ("glm4", "model.layers.1.post_attention_layernorm.weight", "blk.1.ffn_norm.weight"),
        ("olmo2", "model.layers.1.post_attention_layernorm.weight", "blk.1.post_attention_norm.weight"),
        ("phi3", "model.layers.1.mlp.gate_up_proj.weight", "blk.1.ffn_up.weight"),
        ("gpt2", "h.1.ln_1.bias", "blk.1.attn_norm.bias"),
        ("gpt2", "transformer.h.1.attn.c_attn.weight", "blk.1.attn_qkv.weight"),
        ("gpt2", "wpe.weight", "position_embd.weight"),
    ],
)
def test_hugging_faces_names_are_ggufs(architecture: str, name: str, expected: str) -> None:
    """post_attention_layernorm is a norm before the feed-forward in some, and one after the attention in others."""
    assert _renaming(architecture, 2)(name) == expected


def test_a_number_of_layers_is_refused_before_it_is_counted_out() -> None:
    with pytest.raises(FileFormatError, match="block_count"):
        gemma3().with_keys(block_count=2**31 - 1).network()


# What is not implemented is refused by key and value.


@pytest.mark.parametrize(
    ("model", "key", "value"),
    [
        (gemma3, "attn_logit_softcapping", 50.0),
        (gemma3, "attention.value_length", 16),
        (gemma2, "rope.freq_base_swa", 1e6),
        (phi3, "rope.scaling.type", "yarn"),
        (olmo2, "attention.clamp_kqv", 8.0),
        (granite, "rope.scaling.finetuned", False),
        (granite, "expert_count", 8),
        (glm4, "rope.dimension_sections", [16, 24, 24, 0]),
        (smollm3, "attention.sliding_window", 4096),
        (mistral3, "expert_count", 8),
        (command_r, "attention.sliding_window", 4096),
        (cohere2, "use_parallel_residual", True),
        (starcoder2, "attention.scale", 0.5),
        (gpt2, "attention.head_count_kv", 2),
        (gpt2, "rope.freq_base", 10000.0),
    ],
)
def test_what_is_not_implemented_is_refused_by_key_and_value(model: Callable[[], Tiny], key: str, value: Any) -> None:
    tiny = model().with_keys(**{key: value})
    with pytest.raises(UnsupportedError) as refused:
        tiny.network()
    assert f"{tiny.architecture}.{key}" in str(refused.value)
    assert str(value) in str(refused.value)


@pytest.mark.parametrize(
    ("kind", "values"),
    [
        ("gemma3_text", {"attn_logit_softcapping": 50.0}),
        ("gemma3_text", {"use_bidirectional_attention": True}),
        ("gemma2", {"hidden_activation": "silu"}),
        ("gemma2", {"layer_types": ["chunked_attention"] * 6}),
        ("phi3", {"rope_scaling": {"type": "yarn", "short_factor": [1.0] * 8, "long_factor": [2.0] * 8}}),
        ("granite", {"mlp_bias": True}),
        ("smollm3", {"use_sliding_window": True, "sliding_window": 8}),
    ],
)
def test_config_values_that_are_not_implemented_are_refused(kind: str, values: dict[str, Any]) -> None:
    with pytest.raises(UnsupportedError) as refused:
        keys_of(kind, **values)
    name = next(iter(values))
    assert name in str(refused.value) or "rope_type" in str(refused.value)


@pytest.mark.parametrize(("kind", "more"), [("granite", {}), ("granitemoe", {"num_local_experts": 4})])
def test_granites_logits_are_not_divided_by_0(kind: str, more: dict[str, Any]) -> None:
    with pytest.raises(FileFormatError, match="logits_scaling"):
        keys_of(kind, **more, num_experts_per_tok=2, logits_scaling=0.0)
