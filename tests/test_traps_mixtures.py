"""The known ways to get the newer mixtures wrong, as `test_traps` has them for the first families: each model follows
its formula in float64, and a sprung trap moves the logits far beyond that, from where on it can be seen.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest
from families import chosen_experts, logits, relative_error
from paper import forward as first_forward
from paper import plain_frequencies, shares
from paper_mixtures import forward
from tiny import BASE, IDS, D, E, F, Tiny, d, mistral_large
from tiny_mixtures import (
    MODELS,
    SHORT,
    SPAN,
    WIDE,
    bailingmoe2,
    deepseek,
    ernie,
    glm4moe,
    gpt_oss,
    granitemoe,
    hunyuan,
    llama4,
    minimax_m2,
    phimoe,
    ramp,
)

from localmoe.errors import FileFormatError, UnsupportedError
from localmoe.formats import FORMATS, Weight
from localmoe.kernels.reference_weights import values
from localmoe.loader.huggingface_config import FAMILIES
from localmoe.network import Network

TOLERANCE = 1e-5
SPRUNG = 1e-3
ONE_KEY = 1  # at position 0 there is one key: without sinks, scores do not matter


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
TRAPS = [
    trap("no sinks", gpt_oss, sinks=False),
    trap("SwiGLU not clamped", gpt_oss, limit=np.inf),
    trap("up without the one added", gpt_oss, shift=0.0),
    trap("SiLU's slope", gpt_oss, slope=1.0),
    trap("plain SwiGLU", gpt_oss, activation="silu"),
    trap("no window", gpt_oss, SPAN, windows=(0, 0)),
    trap("windows in the odd layers", gpt_oss, SPAN, windows=(0, SPAN)),
    trap("windows in all layers", gpt_oss, SPAN, windows=(SPAN, SPAN)),
    trap("a window that does not count the token itself", gpt_oss, SPAN, windows=(SPAN + 1, 0)),
    trap("no biases in attention", gpt_oss, biased=False),
    trap("no biases in experts", gpt_oss, experts_biased=False),
    trap("no bias in the router", gpt_oss, router_biased=False),
    trap("a softmax over all experts", gpt_oss, normalise=False),
    trap("YaRN's ramp rounded", gpt_oss, ONE_KEY, frequencies=ramp(truncated=True)),
    trap("YaRN without its amplitude", gpt_oss, amplitude=1.0),
    trap("no YaRN", gpt_oss, ONE_KEY, frequencies=plain_frequencies(d, BASE)),
    trap("rope in every layer", llama4, ONE_KEY, turned=ALL),
    trap("rope in halves instead of pairs", llama4, ONE_KEY, layout="halves"),
    trap("no chunks", llama4, SPAN, chunks=()),
    trap("chunks in every layer", llama4, SPAN, chunks=(SPAN,) * 4),
    trap("windows instead of chunks", llama4, SPAN, chunks=(), windows=(SPAN, SPAN, SPAN, 0)),
    trap("no head norms", llama4, ONE_KEY, head_norm="none"),
    trap("head norms also in the layer without rope", llama4, ONE_KEY, normed=ALL),
    trap("queries not warmed", llama4, 5, temperature=None),
    trap("queries warmed one position late", llama4, 5, temperature=(0.4, 6, 0)),
    trap("queries warmed in every layer", llama4, 5, warmed=ALL),
    trap("the share on the expert's output", llama4, share_on="output"),
    trap("softmax for sigmoid", llama4, score="softmax"),
    trap("no shared expert", llama4, shared="none"),
    trap("all of a head turned", glm4moe, ONE_KEY, frequencies=plain_frequencies(d, BASE)),
    trap("rope in pairs instead of halves", glm4moe, ONE_KEY, layout="pairs"),
    trap("no biases", glm4moe, biased=False),
    trap("no head norms", glm4moe, ONE_KEY, head_norm="none"),
    trap("head norms after rope", glm4moe, ONE_KEY, norm_before_rope=False),
    trap("softmax for sigmoid", glm4moe, score="softmax"),
    trap("shares not renormalised", glm4moe, normalise=False),
    trap("shares not scaled", glm4moe, share_scale=1.0),
    trap("shares from the biased scores", glm4moe, biased_shares=True),
    trap("no bias in the choice", glm4moe, choice_biased=False),
    trap("a group's best instead of its best two", glm4moe, group_score="max"),
    trap("other groups at 0, where every standing is negative", glm4moe, masked=0.0),
    trap("no shared expert", glm4moe, shared="none"),
    trap("all of a head turned", bailingmoe2, ONE_KEY, frequencies=plain_frequencies(d, BASE)),
    trap("no groups", bailingmoe2, groups=1, groups_used=1),
    trap("head norms after rope", bailingmoe2, ONE_KEY, norm_before_rope=False),
    trap("shares renormalised", deepseek, normalise=True),
    trap("rope in halves instead of pairs", deepseek, ONE_KEY, layout="halves"),
    trap("no shared expert", deepseek, shared="none"),
    trap("embeddings not scaled", granitemoe, embedding_scale=1.0),
    trap("branches not scaled", granitemoe, residual_scale=1.0),
    trap("the softmax scale of a head's width", granitemoe, ONE_KEY, scale=d**-0.5),
    trap("logits not scaled", granitemoe, logit_scale=1.0),
    trap("logits multiplied by what divides them", granitemoe, logit_scale=6.0),
    trap("a softmax over all experts", granitemoe, normalise=False),
    trap("no shared expert", granitemoe, shared="none"),
    trap("head norms per head", minimax_m2, ONE_KEY, head_norm="head"),
    trap("all of a head turned", minimax_m2, ONE_KEY, frequencies=plain_frequencies(d, BASE)),
    trap("softmax for sigmoid", minimax_m2, score="softmax"),
    trap("shares not renormalised", minimax_m2, normalise=False),
    trap("shares from the biased scores", minimax_m2, biased_shares=True),
    trap("no bias in the choice", minimax_m2, choice_biased=False),
    trap("rope in halves instead of pairs", ernie, ONE_KEY, layout="halves"),
    trap("no bias in the choice", ernie, choice_biased=False),
    trap("shares from the biased scores", ernie, biased_shares=True),
    trap("shares not renormalised", ernie, normalise=False),
    trap("no shared expert", ernie, shared="none"),
    trap("a softmax over all experts", phimoe, score="softmax"),
    trap("a softmax over the two, as llama.cpp has it", phimoe, score="softmax", normalise=True),
    trap("far experts count in a share", phimoe, mixed_over="all"),
    trap("the published jitter for the file's", phimoe, jitter=0.01),
    trap("RMS norms", phimoe, norm="rms"),
    trap("no biases", phimoe, biased=False),
    trap("short factors in a long context", phimoe, ONE_KEY, frequencies=plain_frequencies(d, BASE) / SHORT),
    trap("no amplitude", phimoe, ONE_KEY, amplitude=1.0),
    trap("rope in pairs instead of halves", phimoe, ONE_KEY, layout="pairs"),
    trap("head norms before rope", hunyuan, ONE_KEY, norm_before_rope=True),
    trap("no head norms", hunyuan, ONE_KEY, head_norm="none"),
    trap("shares not renormalised", hunyuan, normalise=False),
    trap("no shared expert", hunyuan, shared="none"),
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


@pytest.mark.parametrize("trap", TRAPS, ids=[t.id for t in TRAPS])
def test_a_sprung_trap_shows_where_it_must(trap: Trap) -> None:
    tiny = trap.model()
    moved = np.abs(right(tiny, **trap.wrong) - right(tiny)).max(axis=1) / np.abs(right(tiny)).max()
    assert moved[trap.start :].max() > SPRUNG
    assert moved[: trap.start].max(initial=0) < 1e-12


def set_config(**changes: Any) -> Callable[[Network], None]:
    return lambda network: setattr(network, "config", replace(network.config, **changes))


def set_router(**changes: Any) -> Callable[[Network], None]:
    return lambda network: set_config(router=replace(network.config.router, **changes))(network)


SABOTAGE: list[tuple[Callable[[], Tiny], Callable[[Network], None], dict[str, Any]]] = [
    (gpt_oss, set_config(windows=(0, SPAN)), {"windows": (0, SPAN)}),
    (llama4, set_config(chunk=0), {"chunks": ()}),
    (llama4, set_config(qk_norm=False), {"head_norm": "none"}),
    (llama4, set_config(temperature=None), {"temperature": None}),
    (glm4moe, set_router(group_score="max"), {"group_score": "max"}),
    (glm4moe, set_router(scale=1.0), {"share_scale": 1.0}),
    (deepseek, set_router(normalise=True), {"normalise": True}),
    (granitemoe, set_config(residual_scale=1.0), {"residual_scale": 1.0}),
    (granitemoe, set_config(attention_scale=d**-0.5), {"scale": d**-0.5}),
    (minimax_m2, set_router(normalise=False), {"normalise": False}),
    (ernie, set_router(normalise=False), {"normalise": False}),
    (hunyuan, set_router(normalise=False), {"normalise": False}),
    (phimoe, set_router(jitter=0.01), {"jitter": 0.01}),
]


@pytest.mark.parametrize("device", ["reference", "cpu"])
@pytest.mark.parametrize(("model", "sabotage", "wrong"), SABOTAGE, ids=[f"{m.__name__}, {w}" for m, _, w in SABOTAGE])
def test_localmoe_sabotaged_gives_the_wrong_answer_of_the_formula(
    model: Callable[[], Tiny], sabotage: Callable[[Network], None], wrong: dict[str, Any], device: str
) -> None:
    tiny = model()
    network = tiny.network()
    sabotage(network)
    found = logits(network, IDS, device)
    assert relative_error(found, right(tiny, **wrong)) <= TOLERANCE
    assert relative_error(found, right(tiny)) > SPRUNG


def test_chosen_experts_and_shares_are_those_of_the_formula(tiny: Tiny) -> None:
    sparse = [i for i in range(tiny.formula.blocks) if f"blk.{i}.ffn_gate_inp.weight" in tiny.tensors]
    for i, (scores, ids, found) in zip(sparse, chosen_experts(tiny.network(), IDS), strict=True):
        bias = tiny.tensors.get(f"blk.{i}.exp_probs_b.bias", np.zeros(E)).astype(np.float64)
        for t in range(len(IDS)):
            expected = shares(tiny.formula, scores[t].astype(np.float64), bias)
            assert dict(zip(ids[t].tolist(), found[t].tolist(), strict=True)) == pytest.approx(expected, rel=1e-5)


def test_routers_are_exact_in_the_program(tiny: Tiny) -> None:
    ops = [op for op in tiny.network().program(8).ops if op.name == "linear" and "ffn_gate_inp" in op.weights[0].name]
    assert ops
    assert all(op.attributes["exact"] for op in ops)


# What a key says, and what its absence means.


def test_gpt_oss_windows_alternate_unless_the_file_lists_them() -> None:
    assert gpt_oss().network().config.windows == (SPAN, 0)
    listed = gpt_oss().with_keys(attention__sliding_window_pattern=np.array([False, True]))
    assert relative_error(logits(listed.network(), IDS), right(listed, windows=(0, SPAN))) <= TOLERANCE
    with pytest.raises(FileFormatError, match="sliding_window_pattern"):
        gpt_oss().with_keys(attention__sliding_window_pattern=[True]).network()


def test_gpt_oss_rounds_yarns_ramp_where_the_file_says_so() -> None:
    tiny = gpt_oss().with_keys(rope__scaling__yarn_truncate=True)
    assert relative_error(logits(tiny.network(), IDS), right(tiny, frequencies=ramp(truncated=True))) <= TOLERANCE


def test_llama_4s_own_numbers_where_the_file_is_silent() -> None:
    """llama.cpp has them in its code: chunks and temperature of 8192; head norms but for Maverick's 128 experts."""
    silent = {"attention__sliding_window": None, "attention__temperature_scale": None}
    tiny = llama4().with_keys(**silent, attention__temperature_length=None)
    config = tiny.network().config
    assert (config.chunk, config.temperature.scale, config.temperature.length, config.temperature.offset) == (
        8192, 0.1, 8192, 1,
    )  # fmt: skip
    assert config.turned == (True, True, True, False)
    assert config.qk_norm


def test_llama_4s_dense_layers_are_wider_than_its_experts_and_come_first() -> None:
    config = llama4().network().config
    assert [config.sparse(i) for i in range(4)] == [False, True, False, True]
    assert (config.feed_forward_length, config.expert_feed_forward_length) == (WIDE, F)
    with pytest.raises(FileFormatError, match="ffn_gate"):
        llama4().with_keys(feed_forward_length=F, expert_feed_forward_length=WIDE).network()


@pytest.mark.parametrize("model", [glm4moe, bailingmoe2])
def test_a_prediction_layer_is_not_run(model: Callable[[], Tiny]) -> None:
    """block_count counts it; its tensors are those of a block, and some with nextn in their names."""
    tiny = model()
    extra = {name.replace("blk.1.", "blk.2."): array for name, array in tiny.tensors.items() if "blk.1." in name}
    extra["blk.2.nextn.eh_proj.weight"] = np.ones((D, 2 * D), np.float32)
    longer = tiny.with_tensors({**tiny.tensors, **extra}).with_keys(block_count=3, nextn_predict_layers=1)
    assert relative_error(logits(longer.network(), IDS), right(tiny)) <= TOLERANCE
    assert relative_error(right(longer, blocks=3), right(tiny)) > SPRUNG


def test_glm_without_head_norms_or_biases_does_without() -> None:
    """Air has no head norms."""
    tiny = glm4moe()
    fewer = {n: a for n, a in tiny.tensors.items() if not n.endswith(("q_norm.weight", "k_norm.weight", "attn_q.bias"))}
    tiny = tiny.with_tensors(fewer).following(head_norm="none")
    assert relative_error(logits(tiny.network(), IDS), right(tiny)) <= TOLERANCE


def test_glms_router_is_a_sigmoid_where_the_file_is_silent() -> None:
    tiny = glm4moe().with_keys(expert_gating_func=None)
    assert relative_error(logits(tiny.network(), IDS), right(tiny)) <= TOLERANCE


@pytest.mark.parametrize("device", ["reference", "cpu"])
def test_mistral_4_is_mistral_large_3_by_another_name(device: str) -> None:
    """llama.cpp's converter and graph of both are DeepSeek's: also a tenth of the log multiplier."""
    tiny = replace(mistral_large(), architecture="mistral4")
    expected = first_forward(tiny.formula, tiny.tensors, IDS)
    assert relative_error(logits(tiny.network(), IDS, device), expected) <= TOLERANCE
    silent = tiny.with_keys(attention__temperature_length=None)
    temperature = silent.network().config.temperature
    assert temperature.length == silent.keys["rope.scaling.original_context_length"]


def test_ernies_experts_are_in_every_second_layer_from_the_first_sparse_one_on() -> None:
    config = ernie().network().config
    assert [config.sparse(i) for i in range(4)] == [False, True, False, True]
    assert [replace(config, leading_dense_block_count=2).sparse(i) for i in range(4)] == [False, False, False, True]


def test_phimoe_takes_the_short_factors_in_a_context_that_is_no_longer_than_the_original() -> None:
    tiny = phimoe().with_keys(rope__scaling__original_context_length=64)
    assert (
        relative_error(logits(tiny.network(), IDS), right(tiny, frequencies=plain_frequencies(d, BASE) / SHORT))
        <= TOLERANCE
    )


def test_phimoes_router_has_the_published_jitter_where_the_file_is_silent() -> None:
    tiny = phimoe().with_keys(expert_router_jitter=None)
    assert relative_error(logits(tiny.network(), IDS), right(tiny, jitter=0.01)) <= TOLERANCE


# Experts as safetensors folders store them.


def rewritten(rewrite: Any, stored: dict[str, np.ndarray], keys: dict[str, Any]) -> dict[str, np.ndarray]:
    """What a family makes of a folder's tensors (F32, or bytes), as float32."""
    source = {
        n: Weight.whole(n, a.shape, FORMATS["F32" if a.itemsize == 4 else "I8"], raw(a)) for n, a in stored.items()
    }
    makers = {name: lambda weight=weight: weight for name, weight in source.items()}
    rewrite(makers, keys)
    return {name: values(make()) for name, make in makers.items()}


def raw(array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(array).view(np.uint8).reshape(-1)


@pytest.mark.parametrize("kind", ["gpt_oss", "llama4_text"])
def test_transposed_experts_are_those_of_a_gguf_file(kind: str) -> None:
    """transformers' gpt-oss has gate and up in alternate columns, its Llama 4 one after the other."""
    gate, up, down = (random_array(shape) for shape in ((E, F, D), (E, F, D), (E, D, F)))
    interleaved = np.stack([gate, up], axis=2).reshape(E, 2 * F, D)
    fused = interleaved if kind == "gpt_oss" else np.concatenate([gate, up], axis=1)
    stored = {"ffn_gate_up_exps.weight": fused.swapaxes(1, 2), "ffn_down_exps.weight": down.swapaxes(1, 2)}
    found = rewritten(FAMILIES[kind].rewrite, stored, {})
    for part, expected in (("gate", gate), ("up", up), ("down", down)):
        assert np.array_equal(found[f"ffn_{part}_exps.weight"], expected)
    swapped = rewritten(FAMILIES["llama4_text" if kind == "gpt_oss" else "gpt_oss"].rewrite, stored, {})
    assert not np.array_equal(swapped["ffn_gate_exps.weight"], gate)


def random_array(shape: tuple[int, ...]) -> np.ndarray:
    return np.random.default_rng(shape[1]).standard_normal(shape).astype(np.float32)


def test_openais_mxfp4_is_ggmls_with_other_nibbles_and_interleaved_rows() -> None:
    """OCP Microscaling Formats 1.0: a value is one of 16, times a power of two; byte i holds values 2 i and 2 i + 1."""
    rng = np.random.default_rng(3)
    nibbles = {n: rng.integers(0, 256, (E, rows, 2, 16), np.uint8) for n, rows in (("gate_up", 2 * F), ("down", D))}
    powers = {n: rng.integers(120, 134, array.shape[:3], np.uint8) for n, array in nibbles.items()}
    stored = {f"ffn_{n}_exps.blocks": a for n, a in nibbles.items()} | {
        f"ffn_{n}_exps.scales": a for n, a in powers.items()
    }
    found = rewritten(FAMILIES["gpt_oss"].rewrite, stored, {})
    table = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    table = np.concatenate([table, -table])
    right = {}
    for n, array in nibbles.items():
        pairs = np.stack([table[array & 15], table[array >> 4]], axis=-1).reshape(*array.shape[:3], 32)
        right[n] = (pairs * 2.0 ** (powers[n][..., None].astype(float) - 127)).reshape(E, array.shape[1], 64)
    assert np.array_equal(found["ffn_gate_exps.weight"], right["gate_up"][:, 0::2])
    assert np.array_equal(found["ffn_up_exps.weight"], right["gate_up"][:, 1::2])
    assert np.array_equal(found["ffn_down_exps.weight"], right["down"])


def test_a_shared_expert_in_one_matrix_is_two_views_of_it() -> None:
    fused = random_array((2 * F, D))
    keys = {"expert_shared_feed_forward_length": F}
    found = rewritten(FAMILIES["granitemoeshared"].rewrite, {"ffn_gate_up_shexp.weight": fused}, keys)
    assert np.array_equal(found["ffn_gate_shexp.weight"], fused[:F])
    assert np.array_equal(found["ffn_up_shexp.weight"], fused[F:])


@pytest.mark.parametrize(
    ("kind", "stored", "says"),
    [
        ("gpt_oss", {"ffn_gate_up_exps.weight": np.ones((4, 4), np.float32)}, "three axes"),
        ("gpt_oss", {"ffn_gate_up_exps.bias": np.ones(4, np.float32)}, "two axes"),
        ("gpt_oss", {"ffn_down_exps.blocks": np.ones((2, 4, 1, 16), np.uint8)}, "has no 'ffn_down_exps.scales'"),
        ("granitemoeshared", {"ffn_gate_up_shexp.weight": np.ones((5, 4), np.float32)}, "expected 64 rows"),
    ],
)
def test_experts_of_another_shape_are_refused(kind: str, stored: dict[str, np.ndarray], says: str) -> None:
    with pytest.raises(FileFormatError, match=says):
        rewritten(FAMILIES[kind].rewrite, stored, {"expert_shared_feed_forward_length": F})


# What is not implemented is refused by key and value.


@pytest.mark.parametrize(
    ("model", "key", "value"),
    [
        (gpt_oss, "expert_gating_func", 2),
        (gpt_oss, "expert_weights_norm", False),
        (gpt_oss, "expert_weights_scale", 2.5),
        (gpt_oss, "attention.value_length", 16),
        (gpt_oss, "swiglu_clamp_exp", 10.0),
        (llama4, "expert_used_count", 2),
        (llama4, "expert_gating_func", 1),
        (llama4, "expert_weights_norm", True),
        (llama4, "attention.sliding_window", 0),
        (llama4, "expert_group_count", 4),
        (glm4moe, "expert_gating_func", 1),
        (glm4moe, "attention.sliding_window", 128),
        (bailingmoe2, "expert_gating_func", 1),
        (deepseek, "expert_gating_func", 2),
        (deepseek, "expert_group_count", 4),
        (granitemoe, "expert_weights_norm", False),
        (granitemoe, "expert_gating_func", 2),
        (minimax_m2, "expert_gating_func", 1),
        (minimax_m2, "expert_weights_scale", 2.5),
        (minimax_m2, "expert_group_count", 4),
        (ernie, "expert_weights_norm", False),
        (ernie, "expert_gating_func", 2),
        (hunyuan, "expert_weights_norm", False),
        (hunyuan, "expert_gating_func", 2),
        (phimoe, "expert_gating_func", 2),
        (phimoe, "expert_used_count", 3),
        (phimoe, "rope.scaling.type", "yarn"),
    ],
)
def test_what_is_not_implemented_is_refused_by_key_and_value(model: Callable[[], Tiny], key: str, value: Any) -> None:
    tiny = model().with_keys(**{key: value})
    with pytest.raises(UnsupportedError) as refused:
        tiny.network()
    assert f"{tiny.architecture}.{key}" in str(refused.value)
    assert str(value) in str(refused.value)
