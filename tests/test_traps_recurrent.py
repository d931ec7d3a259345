"""The known ways to get gated delta nets wrong, as `test_traps` has them for the first families: each model follows its
formula in float64, and a sprung trap moves the logits far beyond that, from where on it can be seen.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from families import logits, relative_error
from gguf_writing import safetensors_bytes
from paper import plain_frequencies
from paper_recurrent import forward
from tiny import BASE, IDS, D, Tiny, d
from tiny_recurrent import (
    FULL,
    KEYS,
    MODELS,
    TAPS,
    VALUES,
    WIDE,
    folder_settings,
    folder_tensors,
    fused,
    qwen3next,
    qwen35,
    qwen35moe,
)

from localmoe.errors import FileFormatError, UnsupportedError
from localmoe.formats import FORMATS, Weight
from localmoe.inspection import report
from localmoe.kernels.reference_weights import values
from localmoe.loader.huggingface_config import FAMILIES, config_keys
from localmoe.loader.locate import open_source
from localmoe.network import Network

TOLERANCE = 2e-5
SPRUNG = 1e-3
SECOND = 1  # at position 0 there is no state to decay and one key to look at


@dataclass(frozen=True)
class Trap:
    """`wrong` are fields of the model's formula; positions below `start` cannot tell."""

    model: Callable[[], Tiny]
    wrong: dict[str, Any]
    start: int = 0
    id: str = field(default="", compare=False)


def trap(id: str, model: Callable[[], Tiny], start: int = 0, **wrong: Any) -> Trap:
    return Trap(model, wrong, start, f"{model.__name__}: {id}")


def delta_traps(model: Callable[[], Tiny]) -> list[Trap]:
    return [
        trap("no gate behind attention", model, output_gate="none"),
        trap("the gate before the query", model, output_gate="first"),
        trap("all of a head turned", model, SECOND, frequencies=plain_frequencies(d, BASE)),
        trap("rope in pairs instead of halves", model, SECOND, layout="pairs"),
        trap("no head norms", model, SECOND, head_norm="none"),
        trap("no convolution", model, convolved="none"),
        trap("no silu behind the convolution", model, convolved="plain"),
        trap("taps in the other order", model, taps="first"),
        trap("queries and keys not made unit vectors", model, unit=False),
        trap("queries not divided by the root of their width", model, query_scaled=False),
        trap("the old value not taken away", model, SECOND, corrected=False),
        trap("beta without its sigmoid", model, strength="one"),
        trap("no decay", model, SECOND, decay="none"),
        trap("decay without softplus", model, SECOND, decay="exponential"),
        trap("decay without its bias", model, SECOND, biased_decay=False),
        trap("the correction read before the decay", model, SECOND, decayed="after"),
        trap("no gate behind the delta net", model, z_gate="none"),
        trap("its gate a sigmoid", model, z_gate="sigmoid"),
        trap("its gate before the norm", model, gated="before"),
        trap("no weight in its norm", model, delta_norm=False),
    ]


def mixture_traps(model: Callable[[], Tiny]) -> list[Trap]:
    return [
        trap("shares not renormalised", model, normalise=False),
        trap("no shared expert", model, shared="none"),
        trap("a shared expert without its gate", model, shared="plain"),
    ]


TRAPS = [
    *delta_traps(qwen3next),
    *mixture_traps(qwen3next),
    trap("value heads in turn instead of grouped by key heads", qwen3next, tiled=True),
    *delta_traps(qwen35),
    trap("value heads grouped by key heads", qwen35, tiled=False),
    *delta_traps(qwen35moe),
    *mixture_traps(qwen35moe),
    trap("value heads grouped by key heads", qwen35moe, tiled=False),
]


@pytest.fixture(params=MODELS.values(), ids=list(MODELS))
def tiny(request: pytest.FixtureRequest) -> Tiny:
    made: Tiny = request.param()
    return made


def right(tiny: Tiny, **wrong: Any) -> np.ndarray:
    return forward(replace(tiny.formula, **wrong), tiny.tensors, IDS)


@pytest.mark.parametrize("device", ["reference", "cpu"])
def test_every_family_follows_its_paper(tiny: Tiny, device: str) -> None:
    network, expected = tiny.network(), right(tiny)
    for chunk in (0, 1, 5):
        assert relative_error(logits(network, IDS, device, chunk=chunk), expected) <= TOLERANCE


@pytest.mark.parametrize("trap", TRAPS, ids=[t.id for t in TRAPS])
def test_a_sprung_trap_shows_where_it_must(trap: Trap) -> None:
    tiny = trap.model()
    moved = np.abs(right(tiny, **trap.wrong) - right(tiny)).max(axis=1) / np.abs(right(tiny)).max()
    assert moved[trap.start :].max() > SPRUNG
    assert moved[: trap.start].max(initial=0) < 1e-12


def test_routers_and_gates_are_exact_in_the_program(tiny: Tiny) -> None:
    ops = [op for op in tiny.network().program(8).ops if op.name == "linear"]
    gates = [op for op in ops if any(part in op.weights[0].name for part in ("gate_inp", "ssm_ba", "ssm_beta"))]
    assert gates
    assert all(op.attributes["exact"] for op in gates)


# What a key or a tensor says, and what its absence means.


def test_qwen3_nexts_matrices_may_be_one_by_key_heads() -> None:
    """Compared where a row's bits depend on no other row: numpy's products differ by shape on some processors."""
    tiny = qwen3next()
    assert np.array_equal(logits(fused(tiny).network(), IDS, "cpu"), logits(tiny.network(), IDS, "cpu"))


def test_three_layers_of_four_are_recurrent_unless_the_file_says_otherwise(tiny: Tiny) -> None:
    silent = replace(tiny, keys={k: v for k, v in tiny.keys.items() if k != "attention.recurrent_layers"})
    with pytest.raises(FileFormatError, match=r"blk\.1\.attn_qkv"):  # layer 1 has attention in this file
        silent.network()
    second = silent.with_keys(full_attention_interval=2)
    assert second.network().config.recurrent == tuple(not full for full in FULL)
    assert relative_error(logits(second.network(), IDS), right(tiny)) <= TOLERANCE


def test_a_prediction_layer_is_not_run(tiny: Tiny) -> None:
    """block_count counts it; its tensors are those of a block with attention, and some with nextn in their names."""
    extra = {name.replace("blk.1.", "blk.3."): array for name, array in tiny.tensors.items() if "blk.1." in name}
    extra["blk.3.nextn.eh_proj.weight"] = np.ones((D, 2 * D), np.float32)
    longer = tiny.with_tensors({**tiny.tensors, **extra}).with_keys(
        block_count=4, nextn_predict_layers=1, attention__recurrent_layers=[True, False, True, False]
    )
    assert relative_error(logits(longer.network(), IDS), right(tiny)) <= TOLERANCE


@pytest.mark.parametrize(
    "keys",
    [
        {"ssm__conv_kernel": 1},
        {"ssm__conv_kernel": 0},
        {"ssm__time_step_rank": 0},
        {"ssm__group_count": 0},
        {"ssm__group_count": 4},
        {"ssm__inner_size": 7},
        {"ssm__state_size": WIDE + 1},
        {"attention__recurrent_layers": [True, False]},
    ],
)
def test_sizes_that_do_not_fit_are_one_error(tiny: Tiny, keys: dict[str, Any]) -> None:
    with pytest.raises(FileFormatError):
        tiny.with_keys(**keys).network()


# Tensors as safetensors folders store them.


def rewritten(kind: str, stored: dict[str, np.ndarray], keys: dict[str, Any]) -> dict[str, np.ndarray]:
    """What a family makes of a folder's tensors, as float32."""
    raw = {n: np.ascontiguousarray(a).view(np.uint8).reshape(-1) for n, a in stored.items()}
    source = {n: Weight.whole(n, a.shape, FORMATS["F32"], raw[n]) for n, a in stored.items()}
    makers = {name: lambda weight=weight: weight for name, weight in source.items()}
    rewrite = FAMILIES[kind].rewrite
    assert rewrite
    rewrite(makers, keys)
    return {name: values(make()) for name, make in makers.items()}


@pytest.mark.parametrize("kind", ["qwen3_next", "qwen3_5_text", "qwen3_5_moe_text"])
def test_norms_rates_and_taps_of_a_folder_become_those_of_a_file(kind: str) -> None:
    random = np.random.default_rng(1)
    stored = {
        "blk.0.attn_norm.weight": random.standard_normal(D).astype(np.float32),
        "blk.0.ssm_norm.weight": random.standard_normal(8).astype(np.float32),
        "blk.0.ssm_a": random.standard_normal(VALUES).astype(np.float32),
        "blk.0.ssm_conv1d.weight": random.standard_normal((KEYS, 1, TAPS)).astype(np.float32),
    }
    found = rewritten(kind, stored, {})
    assert np.array_equal(found["blk.0.attn_norm.weight"], stored["blk.0.attn_norm.weight"] + 1)
    assert np.array_equal(found["blk.0.ssm_norm.weight"], stored["blk.0.ssm_norm.weight"])
    assert np.array_equal(found["blk.0.ssm_a"], -np.exp(stored["blk.0.ssm_a"]))
    assert np.array_equal(found["blk.0.ssm_conv1d.weight"], stored["blk.0.ssm_conv1d.weight"][:, 0])
    for name, shape in (("blk.0.ssm_a", (2, 2)), ("blk.0.ssm_conv1d.weight", (6, TAPS))):
        with pytest.raises(FileFormatError, match="expected"):
            rewritten(kind, {name: np.ones(shape, np.float32)}, {})


def written(path: Path, settings: dict[str, Any], stored: dict[str, np.ndarray]) -> Network:
    (path / "config.json").write_text(json.dumps(settings))
    data = {name: ("F32", array.shape, array.astype(np.float32).tobytes()) for name, array in stored.items()}
    (path / "model.safetensors").write_bytes(safetensors_bytes(data))
    return Network(open_source(path))


PREDICTION = {
    "mtp.fc.weight": np.ones((D, 2 * D)), "mtp.norm.weight": np.ones(D), "mtp.layers.0.self_attn.q_proj.weight":
    np.ones((4, D)), "mtp.layers.0.mlp.experts.0.up_proj.weight": np.ones((4, D)),
}  # fmt: skip
VISION = {
    "model.visual.patch_embed.proj.weight": np.ones((4, 3, 2, 2, 2)),
    "model.visual.merger.norm.weight": np.ones(4),
}


def test_a_folder_follows_the_paper(tiny: Tiny, tmp_path: Path) -> None:
    """Value heads of a folder follow their key head; a layer that predicts further tokens is skipped."""
    stored = folder_tensors(fused(tiny) if tiny.architecture == "qwen3next" else tiny)
    network = written(tmp_path, folder_settings(tiny), stored | PREDICTION)
    assert relative_error(logits(network, IDS), right(tiny, tiled=False)) <= TOLERANCE
    rows = {name: value for _, section in report(tmp_path) for name, value in section}
    assert rows["left out"] == "4 tensors of multi-token prediction"


@pytest.mark.parametrize("model", [qwen35, qwen35moe])
def test_a_text_model_beside_a_vision_model_is_read_alone(model: Callable[[], Tiny], tmp_path: Path) -> None:
    tiny = model()
    inner = folder_settings(tiny)
    outer = {
        "model_type": str(inner["model_type"]).removesuffix("_text"), "text_config": inner, "image_token_id": 3,
        "vision_config": {"depth": 2}, "tie_word_embeddings": False, "architectures": ["ForConditionalGeneration"],
    }  # fmt: skip
    network = written(tmp_path, outer, folder_tensors(tiny, "model.language_model.") | VISION | PREDICTION)
    assert relative_error(logits(network, IDS), right(tiny, tiled=False)) <= TOLERANCE
    rows = {name: value for _, section in report(tmp_path) for name, value in section}
    assert rows["left out"] == "2 tensors of vision or audio parts, 4 tensors of multi-token prediction"


def test_settings_as_large_models_have_them_become_keys() -> None:
    """The sizes of transformers' own defaults (Qwen3-Next 80B, Qwen3.5 35B), with the further fields that public
    converters and servers read from their files."""
    both = {
        "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 1, "eos_token_id": 2, "head_dim": 256,
        "full_attention_interval": 4, "hidden_act": "silu", "hidden_size": 2048, "initializer_range": 0.02,
        "linear_conv_kernel_dim": 4, "linear_key_head_dim": 128, "linear_num_key_heads": 16,
        "linear_num_value_heads": 32, "linear_value_head_dim": 128, "max_position_embeddings": 262144,
        "mlp_only_layers": [], "moe_intermediate_size": 512, "num_attention_heads": 16, "num_key_value_heads": 2,
        "output_router_logits": False, "rms_norm_eps": 1e-6, "router_aux_loss_coef": 0.001, "use_cache": True,
        "shared_expert_intermediate_size": 512, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
    }  # fmt: skip
    next_80b = both | {
        "model_type": "qwen3_next", "decoder_sparse_step": 1, "intermediate_size": 5120, "norm_topk_prob": True,
        "num_experts": 512, "num_experts_per_tok": 10, "num_hidden_layers": 48, "partial_rotary_factor": 0.25,
        "rope_scaling": None, "rope_theta": 10000000, "use_sliding_window": False, "vocab_size": 151936,
    }  # fmt: skip
    rope = {"rope_type": "default", "rope_theta": 10000000, "partial_rotary_factor": 0.25, "mrope_interleaved": True}
    text_35b = both | {
        "model_type": "qwen3_5_moe_text", "attn_output_gate": True, "num_experts": 256, "num_experts_per_tok": 8,
        "num_hidden_layers": 40, "mamba_ssm_dtype": "float32", "mtp_num_hidden_layers": 1, "vocab_size": 248320,
        "mtp_use_dedicated_embeddings": False, "rope_parameters": rope | {"mrope_section": [11, 11, 10]},
        "layer_types": ["linear_attention", "linear_attention", "linear_attention", "full_attention"] * 10,
    }  # fmt: skip
    for settings, architecture, blocks in ((next_80b, "qwen3next", 48), (text_35b, "qwen35moe", 40)):
        found, keys, tied = config_keys(settings, "config.json")
        plain = {name.removeprefix(f"{found}."): value for name, value in keys.items()}
        assert (found, tied) == (architecture, False)
        assert plain["attention.recurrent_layers"] == [True, True, True, False] * (blocks // 4)
        assert (plain["rope.dimension_count"], plain["rope.freq_base"], plain["ssm.inner_size"]) == (64, 1e7, 4096)
        assert plain["attention.key_length"] == 256


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"layer_types": ["linear_attention", "sliding_attention", "full_attention"]}, "layer_types"),
        ({"attention_bias": True}, "attention_bias is 'True'"),
        ({"linear_gate": "swish"}, "linear_gate"),
        ({"hidden_act": "gelu"}, "hidden_act"),
    ],
)
def test_settings_that_are_not_implemented_are_refused(
    tiny: Tiny, change: dict[str, Any], says: str, tmp_path: Path
) -> None:
    with pytest.raises(UnsupportedError, match=says):
        written(tmp_path, folder_settings(tiny) | change, folder_tensors(tiny))


@pytest.mark.parametrize("change", [{"attn_output_gate": False}, {"output_gate_type": "sigmoid"}])
def test_qwen35s_gates_are_those_that_it_always_has(change: dict[str, Any], tmp_path: Path) -> None:
    tiny = qwen35()
    with pytest.raises(UnsupportedError, match=next(iter(change))):
        written(tmp_path, folder_settings(tiny) | change, folder_tensors(tiny))


# What is not implemented is refused by key and value.


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("attention.value_length", 16),
        ("attention.sliding_window", 128),
        ("expert_gating_func", 2),
        ("expert_weights_scale", 2.5),
        ("expert_group_count", 4),
    ],
)
def test_what_is_not_implemented_is_refused_by_key_and_value(key: str, value: Any) -> None:
    tiny = qwen3next().with_keys(**{key: value})
    with pytest.raises(UnsupportedError) as refused:
        tiny.network()
    assert f"{tiny.architecture}.{key}" in str(refused.value)
    assert str(value) in str(refused.value)


# localmoe itself, sabotaged, answers as the formula does with the trap sprung.


def set_config(**changes: Any) -> Callable[[Network], None]:
    return lambda network: setattr(network, "config", replace(network.config, **changes))


@pytest.mark.parametrize("device", ["reference", "cpu"])
def test_localmoe_sabotaged_gives_the_wrong_answer_of_the_formula(device: str) -> None:
    tiny, network = qwen3next(), qwen3next().network()
    set_config(router=replace(network.config.router, normalise=False))(network)
    found = logits(network, IDS, device)
    assert relative_error(found, right(tiny, normalise=False)) <= TOLERANCE
    assert relative_error(found, right(tiny)) > SPRUNG
