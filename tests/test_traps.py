"""The known ways to be wrong, family by family: each one sprung moves the logits far beyond what the tests allow.

`paper.py` holds the right formulas in float64, with a field for every trap. A family must agree with its formula to
1e-5, and a sprung trap must move it a hundred times as far, from the position on where it can first be seen. Together
they say that the first test goes red when localmoe falls into the trap; some are also sprung in localmoe itself.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from families import chosen_experts, in_memory, logits, relative_error
from gguf_writing import Tensor, safetensors_bytes, write_gguf
from paper import forward, llama3_divisors, plain_frequencies, shares, yarn_frequencies, yarn_magnitude
from tiny import (
    BASE,
    FACTOR,
    IDS,
    MODELS,
    MSCALE,
    NOPE,
    TURN,
    D,
    E,
    F,
    H,
    K,
    L,
    Tiny,
    V,
    d,
    deepseek_lite,
    deepseek_v2,
    deepseek_v3,
    llama,
    mistral,
    mistral_large,
    mixtral,
    olmoe,
    qwen2,
    qwen2moe,
    qwen3,
    qwen3moe,
    split_heads,
)

from localmoe.arch.deepseek2 import read_router
from localmoe.arch.rope import Rope
from localmoe.errors import FileFormatError, UnsupportedError
from localmoe.kernels.reference_router import choose
from localmoe.loader.huggingface_config import config_keys
from localmoe.loader.locate import open_source
from localmoe.loader.metadata import Metadata
from localmoe.network import Network

TOLERANCE = 1e-5  # 2e-6 is seen
SPRUNG = 1e-3


@dataclass(frozen=True)
class Trap:
    """`wrong` are fields of the model's formula; positions below `start` cannot tell."""

    model: Callable[[], Tiny]
    wrong: dict[str, Any]
    start: int = 0
    id: str = field(default="", compare=False)


def trap(id: str, model: Callable[[], Tiny], start: int = 0, **wrong: Any) -> Trap:
    return Trap(model, wrong, start, f"{model.__name__}: {id}")


WIDTH_SCALE = (NOPE + TURN) ** -0.5
YARN, TENTH = yarn_magnitude(FACTOR, MSCALE), yarn_magnitude(FACTOR, 0.1 * MSCALE)
ONE_KEY = 1  # at position 0 there is one key, so that scores do not matter
TRAPS = [
    trap("rope in halves instead of pairs", llama, ONE_KEY, layout="halves"),
    trap("the softmax scale of embedding length / heads", llama, ONE_KEY, scale=(D / H) ** -0.5),
    trap("no rope", llama, ONE_KEY, frequencies=np.zeros(d // 2)),
    trap("no window", mistral, 5, window=0),
    trap("a window that does not count the token itself", mistral, 5, window=6),
    trap("shares not renormalised", mixtral, normalise=False),
    trap("sigmoid for softmax", mixtral, score="sigmoid"),
    trap("no biases", qwen2, biased=False),
    trap("rope in pairs instead of halves", qwen2, ONE_KEY, layout="pairs"),
    trap("shared expert without its gate", qwen2moe, shared="plain"),
    trap("no shared expert", qwen2moe, shared="none"),
    trap("shares renormalised", qwen2moe, normalise=True),
    trap("no biases", qwen2moe, biased=False),
    trap("no head norms", qwen3, ONE_KEY, head_norm="none"),
    trap("head norms over the full width", qwen3, ONE_KEY, head_norm="full"),
    trap("head norms after rope", qwen3, ONE_KEY, norm_before_rope=False),
    trap("shares not renormalised", qwen3moe, normalise=False),
    trap("head norms over the full width", qwen3moe, ONE_KEY, head_norm="full"),
    trap("shares renormalised", olmoe, normalise=True),
    trap("norms per head", olmoe, ONE_KEY, head_norm="head"),
    trap("norms after rope", olmoe, ONE_KEY, norm_before_rope=False),
    trap("shares renormalised", deepseek_lite, normalise=True),
    trap("no shared expert", deepseek_lite, shared="none"),
    trap("a group's best two instead of its best", deepseek_v2, group_score="top2"),
    trap("no groups", deepseek_v2, groups=1, groups_used=1),
    trap("shares not scaled", deepseek_v2, share_scale=1.0),
    trap("a group's best instead of its best two", deepseek_v3, group_score="max"),
    trap("other groups at 0, where every standing is negative", deepseek_v3, masked=0.0),
    trap("shares from the biased scores", deepseek_v3, biased_shares=True),
    trap("shares not renormalised", deepseek_v3, normalise=False),
    trap("shares not scaled", deepseek_v3, share_scale=1.0),
    trap("softmax for sigmoid", deepseek_v3, score="softmax"),
    trap("the softmax scale of the latent", deepseek_v3, ONE_KEY, scale=(L + TURN) ** -0.5 * YARN**2),
    trap("no YaRN in the softmax scale", deepseek_v3, ONE_KEY, scale=WIDTH_SCALE),
    trap("YaRN in the softmax scale once", deepseek_v3, ONE_KEY, scale=WIDTH_SCALE * YARN),
    trap("the log multiplier not divided by 0.1", deepseek_v3, ONE_KEY, scale=WIDTH_SCALE * TENTH**2),
    trap("YaRN's amplitude on cos and sin", deepseek_v3, ONE_KEY, amplitude=yarn_magnitude(FACTOR)),
    trap("frequencies not stretched", deepseek_v3, ONE_KEY, frequencies=plain_frequencies(TURN, BASE)),
    trap("all frequencies stretched", deepseek_v3, ONE_KEY, frequencies=plain_frequencies(TURN, BASE) / FACTOR),
    trap("rope in halves instead of pairs", deepseek_v3, ONE_KEY, layout="halves"),
    trap("the latent not normed", deepseek_v3, latent_normed=False),
    trap("the rope key normed", deepseek_v3, ONE_KEY, rope_normed=True),
    trap("transformers' epsilon in a GGUF file's latent norms", deepseek_v3, latent_epsilon=1e-6),
    trap("shares not renormalised", mistral_large, normalise=False),
    trap("sigmoid for softmax", mistral_large, score="sigmoid"),
    trap("queries not warmed", mistral_large, 6, temperature=None),
    trap("Llama 4's offset of one position", mistral_large, 5, temperature=(0.4, 6, 1)),
    trap("YaRN's amplitude on cos and sin", mistral_large, ONE_KEY, amplitude=yarn_magnitude(FACTOR)),
    trap("no YaRN in the softmax scale", mistral_large, ONE_KEY, scale=WIDTH_SCALE),
]  # fmt: skip


@pytest.fixture(params=MODELS.values(), ids=list(MODELS))
def tiny(request: pytest.FixtureRequest) -> Tiny:
    made: Tiny = request.param()
    return made


@pytest.mark.parametrize("device", ["reference", "cpu"])
def test_every_family_follows_its_paper(tiny: Tiny, device: str) -> None:
    right = forward(tiny.formula, tiny.tensors, IDS)
    assert relative_error(logits(tiny.network(), IDS, device), right) <= TOLERANCE
    assert relative_error(logits(tiny.network(), IDS, device, chunk=1), right) <= TOLERANCE


@pytest.mark.parametrize("trap", TRAPS, ids=[t.id for t in TRAPS])
def test_a_sprung_trap_shows_where_it_must(trap: Trap) -> None:
    tiny = trap.model()
    right = forward(tiny.formula, tiny.tensors, IDS)
    wrong = forward(replace(tiny.formula, **trap.wrong), tiny.tensors, IDS)
    moved = np.abs(wrong - right).max(axis=1) / np.abs(right).max()
    assert moved[trap.start :].max() > SPRUNG
    assert moved[: trap.start].max(initial=0) < 1e-12


def set_router(network: Network, **router: Any) -> None:
    network.config = replace(network.config, router=replace(network.config.router, **router))


def set_config(**changes: Any) -> Callable[[Network], None]:
    return lambda network: setattr(network, "config", replace(network.config, **changes))


def set_rope(**changes: Any) -> Callable[[Network], None]:
    """Changes of the rope table."""
    return lambda n: setattr(n, "weights", n.weights._replace(rope=replace(n.weights.rope, **changes)))


SABOTAGE: list[tuple[Callable[[], Tiny], Callable[[Network], None], dict[str, Any]]] = [
    (llama, set_rope(layout="halves"), {"layout": "halves"}),
    (mistral, set_config(sliding_window=0), {"window": 0}),
    (qwen2moe, lambda n: set_router(n, normalise=True), {"normalise": True}),
    (qwen3moe, lambda n: set_router(n, normalise=False), {"normalise": False}),
    (olmoe, lambda n: set_router(n, normalise=True), {"normalise": True}),
    (deepseek_v2, lambda n: set_router(n, group_score="top2"), {"group_score": "top2"}),
    (deepseek_v3, lambda n: set_router(n, group_score="max"), {"group_score": "max"}),
    (deepseek_v3, lambda n: set_router(n, scale=1.0), {"share_scale": 1.0}),
    (deepseek_v3, set_config(scale=(L + TURN) ** -0.5), {"scale": (L + TURN) ** -0.5}),
    (deepseek_v3, set_config(lora_rms_epsilon=1e-6), {"latent_epsilon": 1e-6}),
    (deepseek_v3, set_rope(layout="halves"), {"layout": "halves"}),
    (mistral_large, set_rope(amplitude=1.5), {"amplitude": 1.5}),
    (mistral_large, set_config(temperature=None), {"temperature": None}),
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
    assert relative_error(found, forward(replace(tiny.formula, **wrong), tiny.tensors, IDS)) <= TOLERANCE
    assert relative_error(found, forward(tiny.formula, tiny.tensors, IDS)) > SPRUNG


# Routers that can be solved on paper.


def test_masked_groups_stay_out_when_all_biased_scores_are_negative() -> None:
    router = deepseek_v3().network().config.router
    router = replace(router, used=2, groups=2, groups_used=1, normalise=False, scale=1.0)
    scores = np.array([[0.5, 0.2, 0.9, 0.1]])  # less 2: group 0 stands at -3.3, group 1 at -3.0
    ids, found = choose(router, np.log(scores / (1 - scores)), np.full(4, -2, np.float32))
    assert ids.tolist() == [[2, 3]]  # with 0 for the others, 0 and 1 would win
    assert found == pytest.approx(np.array([[0.9, 0.1]]))  # unbiased, and so not below 0


def test_a_bias_moves_the_choice_and_leaves_the_share() -> None:
    router = replace(deepseek_v3().network().config.router, used=2, groups=1, groups_used=1, scale=2.5)
    scores = np.array([[0.8, 0.6, 0.2]])
    ids, found = choose(router, np.log(scores / (1 - scores)), np.array([0, 0, 0.7], np.float32))
    assert ids.tolist() == [[2, 0]]  # 0.9 and 0.8: best first by standing, not by share
    assert found == pytest.approx(np.array([[0.5, 2.0]]))  # 2.5 · 0.2 / (0.2 + 0.8) and 2.5 · 0.8 / (0.2 + 0.8)


def test_group_scores_are_the_best_for_v2_and_the_best_two_for_v3() -> None:
    probabilities = np.array([[0.40, 0.02, 0.30, 0.28]])  # best: group 0; best two: group 1
    for model, expected in ((deepseek_v2, [[0]]), (deepseek_v3, [[2]])):
        router = replace(model().network().config.router, score="softmax", used=1, groups=2, groups_used=1)
        assert choose(router, np.log(probabilities), None)[0].tolist() == expected


@pytest.mark.parametrize(
    "model", [mixtral, qwen2moe, qwen3moe, olmoe, deepseek_lite, deepseek_v2, deepseek_v3, mistral_large]
)
def test_chosen_experts_and_shares_are_those_of_the_formula(model: Callable[[], Tiny]) -> None:
    tiny = model()
    sparse = [i for i in range(2) if f"blk.{i}.ffn_gate_inp.weight" in tiny.tensors]
    for i, (scores, ids, found) in zip(sparse, chosen_experts(tiny.network(), IDS), strict=True):
        bias = tiny.tensors.get(f"blk.{i}.exp_probs_b.bias", np.zeros(E))
        for t in range(len(IDS)):
            right = shares(tiny.formula, scores[t].astype(np.float64), bias.astype(np.float64))
            assert dict(zip(ids[t].tolist(), found[t].tolist(), strict=True)) == pytest.approx(right, rel=1e-5)


@pytest.mark.parametrize("model", [mixtral, qwen2moe, qwen3moe, olmoe, deepseek_v3, mistral_large])
def test_routers_are_exact_in_the_program(model: Callable[[], Tiny]) -> None:
    ops = [
        op for op in model().network().program(8).ops if op.name == "linear" and "ffn_gate_inp" in op.weights[0].name
    ]
    assert ops
    assert all(op.attributes["exact"] for op in ops)


def test_a_quantised_router_still_sees_float32_inputs() -> None:
    """Decoding on the cpu quantises the input of a Q8_0 product; for a router it must not, and it would show."""
    source = qwen3moe().source(lambda name: "Q8_0" if "ffn_gate_inp" in name else "F32")
    right = logits(Network(source), IDS, "reference")
    assert relative_error(logits(Network(source), IDS, "cpu", chunk=1), right) <= TOLERANCE

    class Careless(Network):
        def program(self, tokens: int, *, all_rows: bool = False) -> Any:
            program = super().program(tokens, all_rows=all_rows)
            for op in program.ops:
                if op.name == "linear":
                    op.attributes["exact"] = False  # type: ignore[index]
            return program

    assert relative_error(logits(Careless(source), IDS, "cpu", chunk=1), right) > SPRUNG


def test_experts_are_chosen_alike_when_all_but_the_router_is_quantised() -> None:
    """The first layer's router sees what a Q8_0 attention gave: its logits move by rounding, its weights by nothing."""
    tiny = qwen3moe()
    source = tiny.source(lambda name: "F32" if "ffn_gate_inp" in name or "norm" in name else "Q8_0")
    (scores, ids, _), *_ = chosen_experts(Network(source), IDS)
    (right, right_ids, _), *_ = chosen_experts(tiny.network(), IDS)
    assert relative_error(scores, right) < 0.05
    for t in range(len(IDS)):
        gap = -np.diff(np.sort(right[t])[::-1][2:4])[0]
        assert set(ids[t]) == set(right_ids[t]) or gap < 2 * np.abs(scores[t] - right[t]).max()


# What a key says, and what its absence means.


@pytest.mark.parametrize(
    ("model", "default"), [(qwen2moe, False), (qwen3moe, True), (olmoe, False), (deepseek_lite, False)]
)
def test_the_key_for_renormalising_is_obeyed_and_has_the_familys_default(
    model: Callable[[], Tiny], default: bool
) -> None:
    assert model().network().config.router.normalise is default
    for asked in (True, False):
        tiny = model().with_keys(expert_weights_norm=asked).following(normalise=asked)
        assert relative_error(logits(tiny.network(), IDS), forward(tiny.formula, tiny.tensors, IDS)) <= TOLERANCE


@pytest.mark.parametrize(
    ("blocks", "vocabulary", "gating", "expected"),
    [
        (27, 102400, None, "softmax"),
        (61, 129280, 2, "sigmoid"),
        (61, 131072, 1, "softmax"),
        (47, 154880, None, "sigmoid"),
        (48, 154880, None, "sigmoid"),
        (48, 154880, 1, "softmax"),
        (47, 102400, None, "softmax"),
    ],
)
def test_a_missing_gating_key_means_softmax_but_for_glm_4_7_flash(
    blocks: int, vocabulary: int, gating: int | None, expected: str
) -> None:
    keys = deepseek_v3().with_keys(block_count=blocks, vocab_size=vocabulary, expert_gating_func=gating).keys
    values = {"general.architecture": "deepseek2"} | {f"deepseek2.{name}": value for name, value in keys.items()}
    router = read_router(Metadata(values, "tiny.gguf"))
    assert router.score == expected
    assert router.group_score == ("top2" if expected == "sigmoid" else "max")


def test_mistral_large_3s_own_numbers() -> None:
    """Its params.json: yarn by 36 with apply_scale false, llama 4 scaling 0.1 by 8192; a query head is 192 wide."""
    keys = {
        "rope.dimension_count": 64, "rope.scaling.factor": 36.0, "rope.scaling.original_context_length": 8192,
        "rope.scaling.yarn_log_multiplier": 0.1, "attention.temperature_scale": 0.1,
        "attention.temperature_length": 8192, "attention.key_length_mla": 192, "attention.value_length_mla": 128,
        "attention.key_length": 576, "attention.value_length": 512, "attention.head_count_kv": 1,
        "attention.kv_lora_rank": 512,
    }  # fmt: skip
    values = {f"deepseek2.{name}": value for name, value in {**mistral_large().keys, **keys}.items()}
    module = mistral_large().network().module
    config = module.Config.read(Metadata({"general.architecture": "deepseek2", **values}, "tiny.gguf"))
    assert config.scale * 192**0.5 == pytest.approx(1.845, abs=5e-4)
    assert config.rope.table("pairs").amplitude == 1.0
    assert (config.temperature.scale, config.temperature.length) == (0.1, 8192)
    assert (config.nope_length, config.rope_length, config.value_length) == (128, 64, 128)


@pytest.mark.parametrize("model", [deepseek_lite, deepseek_v2, deepseek_v3, mistral_large])
def test_heads_split_into_k_b_and_v_b_are_those_of_kv_b(model: Callable[[], Tiny]) -> None:
    whole, split = model(), split_heads(model())
    for device in ("reference", "cpu"):
        assert relative_error(logits(split.network(), IDS, device), logits(whole.network(), IDS, device)) <= TOLERANCE
    assert split.network().config.scale == whole.network().config.scale


def test_the_cache_keeps_the_latent_and_one_rope_key_for_all_heads() -> None:
    assert deepseek_v3().network().program(1).cache_elements() == 2 * (L + TURN)


@pytest.mark.parametrize("model", [deepseek_lite, qwen3moe])
def test_the_head_width_is_the_files_and_not_a_quotient(model: Callable[[], Tiny]) -> None:
    tiny = model()
    assert D // H not in (NOPE + TURN, d)
    with pytest.raises(FileFormatError, match="attn_"):
        tiny.with_keys(attention__key_length=D // H, attention__value_length=D // H, rope__dimension_count=8).network()


def test_the_latent_norms_take_their_own_epsilon_where_there_is_one() -> None:
    """Hugging Face folders say 1e-6, which transformers' constructors default to whatever rms_norm_eps is."""
    tiny = deepseek_v3().with_keys(attention__lora_norm_rms_epsilon=1e-6).following(latent_epsilon=1e-6)
    assert relative_error(logits(tiny.network(), IDS), forward(tiny.formula, tiny.tensors, IDS)) <= TOLERANCE


def test_a_prediction_layer_is_not_run() -> None:
    """block_count counts it; its tensors are those of a block, and some with nextn in their names."""
    tiny = deepseek_v3()
    extra = {name.replace("blk.1.", "blk.2."): array for name, array in tiny.tensors.items() if "blk.1." in name}
    extra |= {
        "blk.2.nextn.eh_proj.weight": np.ones((D, 2 * D), np.float32),
        "blk.2.nextn.hnorm.weight": np.ones(D, np.float32),
    }
    longer = tiny.with_tensors({**tiny.tensors, **extra}).with_keys(block_count=3, nextn_predict_layers=1)
    right = forward(tiny.formula, tiny.tensors, IDS)
    assert relative_error(logits(longer.network(), IDS), right) <= TOLERANCE
    assert relative_error(forward(replace(tiny.formula, blocks=3), longer.tensors, IDS), right) > SPRUNG


@pytest.mark.parametrize("model", [llama, qwen2, qwen3, mixtral, deepseek_v3])
def test_without_an_output_tensor_the_embedding_is_the_output(model: Callable[[], Tiny]) -> None:
    tiny = model()
    tied = tiny.with_tensors({name: array for name, array in tiny.tensors.items() if name != "output.weight"})
    assert relative_error(logits(tied.network(), IDS), forward(tied.formula, tied.tensors, IDS)) <= TOLERANCE
    assert relative_error(forward(tied.formula, tied.tensors, IDS), forward(tiny.formula, tiny.tensors, IDS)) > SPRUNG


@pytest.mark.parametrize("form", ["gate and up fused", "one tensor per expert"])
def test_experts_are_the_same_in_every_form_of_file(form: str) -> None:
    tiny = mixtral()
    made = {name: array for name, array in tiny.tensors.items() if "_exps" not in name}
    for i in range(2):
        stacks = {part: tiny.tensors[f"blk.{i}.ffn_{part}_exps.weight"] for part in ("gate", "up", "down")}
        if form == "one tensor per expert":
            made |= {f"blk.{i}.ffn_{part}.{e}.weight": s[e] for part, s in stacks.items() for e in range(E)}
        else:
            made[f"blk.{i}.ffn_gate_up_exps.weight"] = np.concatenate([stacks["gate"], stacks["up"]], axis=1)
            made[f"blk.{i}.ffn_down_exps.weight"] = stacks["down"]
    for device in ("reference", "cpu"):
        assert np.array_equal(
            logits(tiny.with_tensors(made).network(), IDS, device), logits(tiny.network(), IDS, device)
        )


# Rope in files.


def test_rope_freqs_in_a_gguf_file_are_llama_3s_formula_of_a_config() -> None:
    divisors = llama3_divisors(d, BASE, 8.0, 64, 1.0, 4.0)
    assert {1.0, 8.0} < set(divisors.tolist())  # some of every kind
    tiny = llama()
    by_tensor = tiny.with_tensors({**tiny.tensors, "rope_freqs.weight": divisors.astype(np.float32)})
    by_keys = tiny.with_keys(
        rope__scaling__type="llama3", rope__scaling__factor=8.0, rope__scaling__original_context_length=64,
        rope__scaling__low_freq_factor=1.0, rope__scaling__high_freq_factor=4.0,
    )  # fmt: skip
    right = forward(replace(tiny.formula, frequencies=tiny.formula.frequencies / divisors), tiny.tensors, IDS)
    for made in (by_tensor, by_keys):
        assert relative_error(logits(made.network(), IDS), right) <= TOLERANCE
    assert relative_error(forward(tiny.formula, tiny.tensors, IDS), right) > SPRUNG


def test_linear_scaling_divides_positions_also_in_the_key_of_2023() -> None:
    tiny = llama()
    right = forward(replace(tiny.formula, frequencies=tiny.formula.frequencies / 4), tiny.tensors, IDS)
    for keys in ({"rope__scaling__type": "linear", "rope__scaling__factor": 4.0}, {"rope__scale_linear": 4.0}):
        assert relative_error(logits(tiny.with_keys(**keys).network(), IDS), right) <= TOLERANCE
    assert relative_error(forward(tiny.formula, tiny.tensors, IDS), right) > SPRUNG


def test_yarn_outside_deepseek_scales_cos_and_sin_and_not_the_softmax() -> None:
    """And the log multiplier is the number itself: 1.0 makes the amplitude a ratio that is 1."""
    tiny = qwen2().with_keys(
        rope__scaling__type="yarn", rope__scaling__factor=FACTOR, rope__scaling__original_context_length=8
    )
    amplitude = yarn_magnitude(FACTOR)
    for made, expected in ((tiny, amplitude), (tiny.with_keys(rope__scaling__yarn_log_multiplier=1.0), 1.0)):
        network = made.network()
        assert network.weights.rope.amplitude == pytest.approx(expected)
        attention = [op for op in network.program(1).ops if op.name == "attention"]
        assert {op.attributes["scale"] for op in attention} == {d**-0.5}


@pytest.mark.parametrize(("factor", "original"), [(40.0, 4096), (36.0, 8192)], ids=["DeepSeek-V3", "Mistral Large 3"])
def test_yarns_ramp_begins_and_ends_at_whole_dimensions(factor: float, original: int) -> None:
    keys = {"rope__scaling__type": "yarn", "rope__scaling__factor": factor, "rope__dimension_count": 64}
    tiny = qwen2().with_keys(**keys, rope__scaling__original_context_length=original)
    values = {f"qwen2.{name}": value for name, value in tiny.keys.items()}

    def frequencies(**more: Any) -> np.ndarray:
        metadata = Metadata({"general.architecture": "qwen2", **values, **more}, "tiny.gguf")
        return Rope.read(metadata, d).table("halves").inverse_frequencies

    right = yarn_frequencies(64, BASE, factor, original)
    assert frequencies() == pytest.approx(right, rel=1e-6)
    assert np.abs(frequencies(**{"qwen2.rope.scaling.yarn_truncate": False}) / right - 1).max() > 1e-2


def permuted(weight: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp's converter for this family: a head's rows i and i + d/2 become neighbours."""
    rows = weight.reshape(heads, d, D)
    return np.ascontiguousarray(np.stack([rows[:, : d // 2], rows[:, d // 2 :]], axis=2).reshape(heads * d, D))


HF_NAMES = {
    "token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head",
    "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm", "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}  # fmt: skip


def test_a_gguf_file_with_permuted_heads_is_its_safetensors_folder(tmp_path: Path) -> None:
    tiny = llama().following(layout="halves")  # as Meta's weights lie in Hugging Face's files
    right = forward(tiny.formula, tiny.tensors, IDS)

    stored = {}
    for name, array in tiny.tensors.items():
        *block, part, _ = name.split(".")
        place = f"model.layers.{block[1]}." if block else ""
        stored[f"{place}{HF_NAMES[part]}.weight"] = ("F32", array.shape, array.tobytes())
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(safetensors_bytes(stored))
    config = {
        "model_type": "llama", "num_hidden_layers": 2, "hidden_size": D, "intermediate_size": F, "vocab_size": V,
        "max_position_embeddings": 64, "num_attention_heads": H, "num_key_value_heads": K, "head_dim": d,
        "rms_norm_eps": 1e-5, "rope_theta": BASE, "tie_word_embeddings": False,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    assert relative_error(logits(Network(open_source(folder)), IDS), right) <= TOLERANCE

    def gguf(name: str, heads: dict[str, int]) -> Network:
        turned = {n: permuted(a, heads[n[6:12]]) if n[6:12] in heads else a for n, a in tiny.tensors.items()}
        metadata = {"general.architecture": "llama", **{f"llama.{key}": value for key, value in tiny.keys.items()}}
        records = [Tensor(n, a.shape, data=a.tobytes()) for n, a in turned.items()]
        return Network(open_source(write_gguf(tmp_path / name, metadata, records)))

    assert relative_error(logits(gguf("permuted.gguf", {"attn_q": H, "attn_k": K}), IDS), right) <= TOLERANCE
    assert relative_error(logits(gguf("plain.gguf", {}), IDS), right) > SPRUNG


# Hugging Face's keys.

DEEPSEEK = {
    "vocab_size": 64, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 64, "rms_norm_eps": 1e-2, "n_routed_experts": 8, "num_experts_per_tok": 2, "n_group": 4,
    "topk_group": 2, "moe_intermediate_size": 32, "n_shared_experts": 1, "first_k_dense_replace": 1,
    "kv_lora_rank": 32, "q_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16,
    "routed_scaling_factor": 2.5,
}  # fmt: skip


def test_deepseek_configs_say_which_router_and_the_latent_norms_keep_their_own_epsilon() -> None:
    third = config_keys({"model_type": "deepseek_v3", **DEEPSEEK}, "config.json")[1]
    second = config_keys(
        {"model_type": "deepseek_v2", **DEEPSEEK, "topk_method": "group_limited_greedy"}, "config.json"
    )[1]
    greedy = config_keys({"model_type": "deepseek_v2", **DEEPSEEK, "topk_method": "greedy"}, "config.json")[1]
    router = {"expert_gating_func": (2, 1), "expert_group_score": ("top2", "max"), "expert_group_count": (4, 4)}
    for key, (of_third, of_second) in router.items():
        assert (third[f"deepseek2.{key}"], second[f"deepseek2.{key}"]) == (of_third, of_second)
    assert third["deepseek2.expert_weights_norm"] is True
    assert not second.get("deepseek2.expert_weights_norm")
    assert "deepseek2.expert_group_count" not in greedy
    assert third["deepseek2.attention.lora_norm_rms_epsilon"] == 1e-6


def test_qwen3_moe_and_olmoe_configs_without_norm_topk_prob_do_not_renormalise() -> None:
    """transformers' default; a GGUF file of Qwen3-MoE without the key does."""
    common = {key: DEEPSEEK[key] for key in list(DEEPSEEK)[:7]} | {"num_experts": 8, "num_experts_per_tok": 2}
    for kind, more in (("qwen3_moe", {"moe_intermediate_size": 32}), ("olmoe", {})):
        values, architecture = {"model_type": kind, **common, **more}, kind.replace("_", "")
        assert config_keys(values, "config.json")[1][f"{architecture}.expert_weights_norm"] is False
        asked = config_keys({**values, "norm_topk_prob": True}, "config.json")[1]
        assert asked[f"{architecture}.expert_weights_norm"] is True


# What is not implemented is refused by key and value.


@pytest.mark.parametrize(
    ("model", "key", "value"),
    [
        (mixtral, "expert_weights_norm", False),
        (mixtral, "expert_gating_func", 2),
        (mixtral, "expert_weights_scale", 2.5),
        (mixtral, "expert_shared_count", 1),
        (llama, "attention.value_length", 16),
        (llama, "rope.scaling.type", "longrope"),
        (llama, "rope.scaling.yarn_ext_factor", 0.5),
        (llama, "attn_logit_softcapping", 50.0),
        (llama, "attention.scale", 0.5),
        (llama, "embedding_scale", 12.0),
        (qwen2, "attention.sliding_window", 128),
        (qwen2moe, "expert_gating_func", 2),
        (qwen3, "attention.sliding_window", 128),
        (qwen3moe, "expert_weights_scale", 2.5),
        (qwen3moe, "expert_group_count", 4),
        (olmoe, "attention.clamp_kqv", 8.0),
        (deepseek_v3, "expert_gating_func", 4),
        (deepseek_v3, "attention.head_count_kv", 2),
        (deepseek_v3, "attention.indexer.top_k", 2048),
        (deepseek_v3, "swiglu_clamp_exp", 10.0),
    ],
)
def test_what_is_not_implemented_is_refused_by_key_and_value(model: Callable[[], Tiny], key: str, value: Any) -> None:
    tiny = model().with_keys(**{key: value})
    with pytest.raises(UnsupportedError) as refused:
        tiny.network()
    assert f"{tiny.architecture}.{key}" in str(refused.value)
    assert str(value) in str(refused.value)


@pytest.mark.parametrize("name", ["attn_q.bias", "attn_sinks.weight", "ffn_gate_inp.bias", "attn_rel_b.weight"])
def test_a_tensor_without_a_place_is_refused_by_name(name: str) -> None:
    tiny = qwen3moe()
    extra = {f"blk.0.{name}": np.ones(4, np.float32)}
    with pytest.raises(UnsupportedError, match=name):
        Network(in_memory(tiny.source().metadata, {**tiny.tensors, **extra}))
