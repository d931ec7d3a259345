"""`localmoe plan`: sizes, hits and speed of models that are not loaded, on figures that can be worked out by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_mistral import LARGE
from tiny_models import qwen3moe

import localmoe.outlook
from localmoe.cli import main
from localmoe.errors import SettingError
from localmoe.experts.choice import choose
from localmoe.experts.hits import assumed_shares, even_shares, expected
from localmoe.experts.sizes import Routed, Sizes
from localmoe.experts.usage import Usage
from localmoe.inspection import open_network
from localmoe.kernels.cpu.limits import Rates
from localmoe.outlook import REACHED, Outlook, learned_shares, numbers, outlook, sections

GB, GIB = 10**9, 1 << 30
KIMI = Routed(256, 8, 1_000_000)
RATES = Rates(32e9, 200e9, 900e9)

# Published settings that the shared data does not have (model cards).
QWEN3_235B = {
    "model_type": "qwen3_moe", "hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 94,
    "num_attention_heads": 64, "num_key_value_heads": 4, "head_dim": 128, "vocab_size": 151936, "rms_norm_eps": 1e-6,
    "num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 1536, "norm_topk_prob": True,
    "max_position_embeddings": 40960, "rope_theta": 1e6, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
    "hidden_act": "silu", "decoder_sparse_step": 1, "mlp_only_layers": [], "attention_bias": False,
}  # fmt: skip
MAVERICK = {"num_local_experts": 128, "interleave_moe_layer_step": 2, "layer_types": None, "moe_layers": None}


def published(name: str, conformance: Path, folder: Path) -> Path:
    """Settings of a published model in a folder of their own."""
    path = folder / ("params.json" if name == "Mistral Large 3" else "config.json")
    configs = conformance / "configs"
    settings: dict[str, Any] = {
        "DeepSeek R1": lambda: json.loads((configs / "hf/deepseek-r1_config.json").read_text()),
        "Mistral Large 3": lambda: LARGE,
        "gpt-oss-120b": lambda: (
            json.loads((configs / "transformers-defaults/GptOssConfig.json").read_text())
            | {"quantization_config": {"quant_method": "mxfp4"}}
        ),
        "Qwen3 235B": lambda: QWEN3_235B,
        "Llama 4 Maverick": lambda: (
            json.loads((configs / "transformers-defaults/Llama4TextConfig.json").read_text()) | MAVERICK
        ),
    }[name]()
    path.write_text(json.dumps(settings))
    return path


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine of known rates, and no disk that could be probed."""
    monkeypatch.setattr(localmoe.outlook, "machine_rates", lambda: RATES)
    monkeypatch.setattr(localmoe.outlook, "probed", lambda network: None)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return qwen3moe(tmp_path_factory.mktemp("models") / "tiny.gguf", format="Q8_0")


measured_rates = localmoe.outlook.machine_rates


def test_this_machine_has_rates() -> None:
    found = measured_rates()
    assert min(found.read, found.float_ops, found.integer_ops) > 1e8


def rows(found: Outlook) -> dict[str, str]:
    return {what: value for _, entries in sections(found) for what, value in entries}


def test_sizes_are_those_of_the_file(tiny: Path) -> None:
    """See test_inspection.py for the elements: dense 66,080 with an embedding of 260 rows of 64, 12 experts."""
    network = open_network(tiny)
    sizes, embedding, expert = (
        Sizes.of(network.tensors, network.program(1)),
        260 * 64 * 34 // 32,
        3 * 32 * 64 * 34 // 32,
    )
    assert sizes == Sizes(66_080 - embedding, embedding, (Routed(6, 2, expert),) * 2)
    assert sizes.weights == 66_080 + 12 * expert
    assert sizes.least == 66_080 + 2 * expert
    assert sizes.useful == 66_080 + 4 * expert


def test_an_embedding_that_is_the_output_too_stays_in_memory(tmp_path: Path, conformance: Path) -> None:
    network = open_network(conformance / "configs/mlc-presets/smollm2_135m.json")
    sizes = Sizes.of(network.tensors, network.program(1))
    assert (sizes.looked_up, sizes.layers) == (0, ())
    assert sizes.dense == sizes.weights == sum(w.nbytes for w in network.tensors.values())


def test_the_smallest_slots_hold_one_layers_choice_of_each_size_of_expert() -> None:
    layers = (Routed(64, 8, 100), Routed(64, 8, 100), Routed(64, 6, 100), Routed(64, 8, 130))
    assert Sizes(1000, 0, layers).least == 1000 + 8 * 100 + 8 * 130
    assert Sizes(1000, 0, ()).least == 1000


@pytest.mark.parametrize(("part", "hits"), [(0.06, 0.40), (0.12, 0.62), (0.24, 0.85), (1.0, 1.0)])
def test_assumed_hits_are_those_that_were_measured(part: float, hits: float) -> None:
    found = expected([KIMI] * 3, [assumed_shares(KIMI)] * 3, int(part * 256) * 3 * KIMI.nbytes)
    assert found.hit_rate == pytest.approx(hits, abs=0.025)
    assert found.missed_nbytes == pytest.approx((1 - found.hit_rate) * 24 * KIMI.nbytes)


def test_hits_are_the_sum_of_the_shares_that_are_kept() -> None:
    layers = [Routed(4, 1, 100), Routed(4, 2, 100)]
    shares = [np.array([0.1, 0.6, 0.1, 0.2]), np.array([0.25, 0.25, 0.25, 0.25])]
    found = expected(layers, shares, 350)  # 0.6 of one choice, then 0.5 twice: of the second layer, two are chosen
    assert (found.held, found.held_nbytes) == (3, 300)
    assert found.hit_rate == pytest.approx((0.6 + 0.5 + 0.5) / 3)
    assert found.missed_nbytes == pytest.approx(100 * (0.4 + 1.0))


def test_even_routing_finds_as_much_as_is_kept() -> None:
    assert expected([KIMI], [even_shares(KIMI)], 64 * KIMI.nbytes).hit_rate == pytest.approx(0.25)


def test_below_one_tokens_working_set_nothing_is_found_again() -> None:
    found = expected([KIMI] * 2, [assumed_shares(KIMI)] * 2, 16 * KIMI.nbytes - 1)
    assert (found.hit_rate, found.missed_nbytes) == (0.0, pytest.approx(16 * KIMI.nbytes))


def test_a_model_that_uses_much_of_itself_is_assumed_to_use_it_evenly() -> None:
    """Mixtral's 2 of 8: a quarter kept is a third found, not the 87 % of a model with 8 of 256."""
    mixtral = Routed(8, 2, 100)
    assert 0.25 < expected([mixtral], [assumed_shares(mixtral)], 200).hit_rate < 0.4


SIZES = Sizes(1 * GB, 0, (Routed(100, 2, 10_000_000),) * 9)  # 10 GB, 1.18 for a token
DENSE = Sizes(10 * GB, 0, ())


@pytest.mark.parametrize(
    ("sizes", "memory", "promised", "disk", "why"),
    [
        (SIZES, 20 * GB, False, 1.5e9, "mmap: 10.00 GB of weights, 20.00 GB free"),
        (SIZES, 20 * GB, True, 1.5e9, "mmap: 10.00 GB of weights, 20.00 GB allowed"),
        (SIZES, 11 * GB, False, 1.5e9, "slots: 10.00 GB of weights, 11.00 GB free; disk 1.50 GB/s"),
        (SIZES, 4 * GB, False, None, "slots: 10.00 GB of weights, 4.00 GB free"),
        (SIZES, 1 * GB, True, 1.5e9, "slots: 10.00 GB of weights, 1.00 GB allowed; disk 1.50 GB/s"),
        (
            SIZES, 1 * GB, False, None,
            "mmap: 10.00 GB of weights, 1.00 GB free, 1.52 GB would do for slots: tokens read all again",
        ),
        (DENSE, 11 * GB, False, 1.5e9, "mmap: 10.00 GB of weights, 11.00 GB free; disk 1.50 GB/s"),
        (
            DENSE, 8 * GB, False, 1.5e9,
            "mmap: 10.00 GB of weights, 8.00 GB free, and no experts among them: every token reads all again; disk "
            "1.50 GB/s",
        ),
    ],
)  # fmt: skip
def test_auto_says_what_it_chose_and_why(
    sizes: Sizes, memory: int, promised: bool, disk: float | None, why: str
) -> None:
    choice = choose(sizes, GB // 2, memory, promised=promised, nbytes_per_second=disk)
    assert choice.why == why
    assert why.startswith(choice.mode + ":")


def test_a_token_takes_the_time_of_its_reads_and_of_its_arithmetic(tiny: Path) -> None:
    network = open_network(tiny)
    sizes = Sizes.of(network.tensors, network.program(1))
    beside = outlook(network).beside.resident
    half = outlook(network, memory=sizes.stays + beside + sizes.experts // 2, disk=1000)
    assert half.worst is not None
    assert half.speed is not None
    assert half.worst_speed is not None
    assert half.worst.hit_rate == pytest.approx(0.5)
    computing = half.bound.seconds / REACHED
    assert 1 / half.worst_speed.tokens_per_second == pytest.approx(sizes.token_experts / 2 / 1000 + computing)
    assert half.speed.limit == "disk"
    assert half.speed.tokens_per_second > half.worst_speed.tokens_per_second
    assert (half.choice.mode, half.room) == ("slots", sizes.experts // 2)


def test_what_fits_is_limited_by_memory(tiny: Path) -> None:
    found = outlook(open_network(tiny), memory=GIB)
    assert found.speed is not None
    assert (found.missed_nbytes, found.speed.limit, found.disk) == (0, "memory bandwidth", None)
    assert found.speed.tokens_per_second == pytest.approx(REACHED / found.bound.seconds)
    assert rows(found)["generating"].endswith("tokens/s, limited by memory bandwidth")


def test_known_use_takes_the_place_of_what_is_assumed(tiny: Path) -> None:
    network = open_network(tiny)
    sizes = Sizes.of(network.tensors, network.program(1))
    memory = sizes.useful + outlook(network).beside.resident
    known = outlook(network, memory=memory, disk=GB, shares=[np.array([0.0, 0.5, 0.0, 0.5, 0.0, 0.0])] * 2)
    assert known.expected is not None
    assert known.expected.hit_rate == 1
    assert numbers(known)["hit_rate_from"] == "its use so far"
    assert numbers(outlook(network, memory=memory))["hit_rate_from"] == "assumed, as measured of Kimi-Linear"


def test_what_sessions_learned_is_read_and_layers_that_none_used_are_assumed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOCALMOE_CACHE", str(tmp_path))
    network = open_network(qwen3moe(tmp_path / "tiny.gguf", format="Q8_0"))
    assert learned_shares(network) is None
    uses = np.zeros((2, 6), np.int64)
    uses[1, 3] = 7
    Usage(network.source, 2, 6).learn(uses)
    first, second = learned_shares(network) or ([], [])
    assert list(second) == [0, 0, 0, 1, 0, 0]
    assert list(first) == list(assumed_shares(Routed(6, 2, 100)))


def test_without_a_speed_of_the_disk_none_is_invented(tiny: Path) -> None:
    network = open_network(tiny)
    sizes = Sizes.of(network.tensors, network.program(1))
    found = outlook(network, memory=sizes.least + outlook(network).beside.resident)
    assert found.speed is None
    assert rows(found)["disk"] == "not known: --disk-speed 1.2GB/s says"
    assert "generating" not in rows(found)


def test_the_smallest_budget_works_and_one_byte_less_is_refused_with_the_numbers(tiny: Path) -> None:
    network = open_network(tiny)
    smallest = outlook(network, memory=GIB).smallest
    assert outlook(network, memory=smallest, disk=GB).refusal is None
    refusal = outlook(network, memory=smallest - 1, disk=GB).refusal
    assert refusal is not None
    assert refusal.startswith("needs at least ")
    assert "of dense weights" in refusal


def test_a_context_whose_cache_alone_is_too_large_is_refused(tiny: Path) -> None:
    found = outlook(open_network(tiny), memory=GIB, context=10**8)
    assert found.refusal is not None
    assert "beside its weights (KV cache 25.60 GB" in found.refusal
    assert "speed" not in dict(sections(found))


# (GB of experts that one token reads at 4.5 bits, from issue 5, where gpt-oss has its own 4.25; experts in all)
COLD = {
    "DeepSeek R1": (11.5, 58 * 256),
    "Mistral Large 3": (11.5, 58 * 128),
    "gpt-oss-120b": (1.9 * 4.5 / 4.25, 36 * 128),
    "Llama 4 Maverick": (1.7, 24 * 128),
    "Qwen3 235B": (8.0, 94 * 128),
}


@pytest.mark.parametrize("name", COLD)
def test_published_models_are_planned_from_their_settings(name: str, conformance: Path, tmp_path: Path) -> None:
    network = open_network(published(name, conformance, tmp_path))
    half = Sizes.of(network.tensors, network.program(1)).weights // 2
    found = outlook(network, memory=half, disk=1.2e9)
    floor, experts = COLD[name]
    routed = sum(
        w.elements * op.inputs[1].shape[1] // w.shape[0]
        for op in network.program(1).ops if op.name == "experts" for w in op.matrices
    )  # fmt: skip
    assert routed * 4.5 / 8 / GB == pytest.approx(floor, rel=0.06)
    assert sum(layer.count for layer in found.sizes.layers) == experts
    assert found.refusal is None
    assert found.expected is not None
    assert found.worst is not None
    assert 0 < found.worst.hit_rate < found.expected.hit_rate <= 1
    assert "tokens/s, limited by" in rows(found)["generating"]
    assert outlook(network, memory=GIB).refusal


def test_the_command_shows_rows_or_numbers(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["plan", str(tiny), "--memory", "1GiB", "--disk-speed", "1.2 GB/s", "--context", "20", "--kv", "q8_0"])
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    assert "1.07 GB" in shown
    assert "mmap: 144 kB of weights, 1.07 GB allowed" in shown
    with pytest.raises(SystemExit):
        main(["plan", str(tiny), "--memory", "1GiB", "--disk-speed", "1.2GB/s", "--json"])
    told = json.loads(capsys.readouterr().out)
    assert (told["memory_nbytes"], told["disk_nbytes_per_second"], told["loading"]) == (GIB, 1_200_000_000, "mmap")
    assert (told["hit_rate"], told["refusal"]) == (1, None)


def test_a_budget_that_is_too_small_ends_with_2_and_the_smallest_that_works(
    tiny: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["plan", str(tiny), "--memory", "1MB"])
    assert ended.value.code == 2
    told = capsys.readouterr()
    assert "tiny.gguf: needs " in told.err
    assert told.err.count("\n") == 1
    assert "smallest budget" in told.out


@pytest.mark.parametrize("words", [("--memory", "lots"), ("--disk-speed", "fast"), ("--memory", "0")])
def test_what_is_no_size_is_refused_before_the_model_is_looked_at(
    words: tuple[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["plan", "nothing.gguf", *words])
    assert ended.value.code == 2
    assert "such as 8GiB" in capsys.readouterr().err


def test_a_kv_format_that_is_none_is_refused(tiny: Path) -> None:
    with pytest.raises(SettingError):
        outlook(open_network(tiny), kv_format="q3_0")
