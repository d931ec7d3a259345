"""The figures of `localmoe inspect` on files whose every tensor is counted by hand."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_models import deepseek2, qwen3moe

import localmoe.inspection
import localmoe.kernels.reference_weights
from localmoe.errors import SettingError
from localmoe.experts.budget import PYTHON_NBYTES, Needed
from localmoe.formats import KV_FORMATS
from localmoe.inspection import needed, program_table, report
from localmoe.kernels.cpu.device import CpuDevice
from localmoe.kernels.cpu.lower import Lowering
from localmoe.loader.locate import open_source
from localmoe.memory import readable_size
from localmoe.network import Network

# qwen3moe of tiny_models, elements: embedding and output 260 × 64 each; a block has q and output 64 × 64, k and v
# 32 × 64, norms 64, 64, 16 and 16, a router 6 × 64, and 6 experts of 3 × 32 × 64; one last norm of 64.
EMBEDDING, ATTENTION, EXPERT = 260 * 64, 2 * 64 * 64 + 2 * 32 * 64, 3 * 32 * 64
SMALL = 64 + 2 * (64 + 64 + 16 + 16 + 6 * 64)  # what stays float32
Q8_0 = 34 / 32  # bytes of an element


def sections(path: Path, context: int | None = None, kv_format: str = "f16") -> dict[str, dict[str, str]]:
    return {title: dict(rows) for title, rows in report(path, context, kv_format)}


@pytest.fixture(scope="module")
def grouped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return qwen3moe(tmp_path_factory.mktemp("models") / "grouped.gguf", format="Q8_0")


@pytest.fixture(scope="module")
def latent(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return deepseek2(tmp_path_factory.mktemp("models") / "latent.gguf")


def test_parameters_are_counted_in_all_and_for_one_token(grouped: Path) -> None:
    total = 2 * EMBEDDING + SMALL + 2 * (ATTENTION + 6 * EXPERT)
    assert sections(grouped)["parameters"] == {
        "total": f"{total:,}",
        "active per token": f"{total - 2 * 4 * EXPERT:,}",
        "experts": "2 of 6 in 2 layers",
    }


def test_formats_are_listed_by_size(grouped: Path) -> None:
    assert sections(grouped)["formats"] == {
        "Q8_0": "16 tensors, 140 kB, 96.8 %",  # (132,736 - 1,152) · 34/32 = 139,808
        "F32": "11 tensors, 4.61 kB, 3.2 %",  # 1,152 · 4
    }


def test_bytes_of_dense_weights_of_experts_and_of_one_token(grouped: Path) -> None:
    memory = sections(grouped)["memory"]
    dense = (2 * EMBEDDING + 2 * ATTENTION) * Q8_0 + 4 * SMALL
    assert dense == 66080
    assert memory["dense weights"] == "66.1 kB"
    assert 2 * 6 * EXPERT * Q8_0 == 78336
    assert memory["expert weights"] == "78.3 kB"
    assert (
        dense - EMBEDDING * Q8_0 + 64 * Q8_0 + 2 * 2 * EXPERT * Q8_0 == 74580
    )  # one row of the embedding, 2 experts a block
    assert memory["read for one token"] == "74.6 kB"


def test_the_cache_of_grouped_heads_keeps_keys_and_values_of_each_kv_head(grouped: Path) -> None:
    memory = sections(grouped)["memory"]
    assert memory["KV cache per token (f16)"] == f"{2 * 2 * 2 * (16 + 16)} B"
    assert memory["KV cache at 300 tokens"] == "76.8 kB"
    assert sections(grouped, 1000)["memory"]["KV cache at 1,000 tokens"] == "256 kB"


def test_latent_attention_keeps_one_latent_and_one_rope_key(latent: Path) -> None:
    # 32 + 8 elements, padded to 48, or to two blocks
    assert sections(latent)["memory"]["KV cache per token (f16)"] == f"{2 * 2 * 48} B"
    assert sections(latent, None, "q8_0")["memory"]["KV cache per token (q8_0)"] == f"{2 * 2 * 34} B"


def test_a_kv_format_that_is_none_is_refused(grouped: Path) -> None:
    with pytest.raises(SettingError, match="'q5_0' is not known; these are: f32, f16, q8_0, q4_0"):
        report(grouped, None, "q5_0")


def test_shared_experts_are_active_and_routed_ones_as_far_as_chosen(latent: Path) -> None:
    attention = 64 + 4 * 40 * 64 + 40 * 64 + 32 + 2 * 4 * 32 * 32 + 64 * 128 + 64
    feed = 3 * 96 * 64 + 8 * 64 + 3 * 32 * 64  # the dense block, the router, the shared expert
    total = 2 * EMBEDDING + 64 + 2 * attention + feed + 8 * EXPERT
    assert sections(latent)["parameters"] == {
        "total": f"{total:,}",
        "active per token": f"{total - 5 * EXPERT:,}",
        "experts": "3 of 8 in 1 layer",
    }


def test_the_model_is_named_with_its_sizes(grouped: Path) -> None:
    model = sections(grouped)["model"]
    assert (model["architecture"], model["blocks"], model["hidden width"]) == ("qwen3moe", "2", "64")
    assert (model["vocabulary"], model["trained context"], model["name"]) == ("260", "300", "not given")


@pytest.mark.parametrize(
    ("free", "whole", "verdict"),
    [
        (10**6, 10**7, "yes: 254 kB of 1 MB free"),
        (10**5, 10**6, "only when other programs end: 254 kB needed, 100 kB free"),
        (10**5, 2 * 10**5, "no: 254 kB needed, 200 kB in all; weights are read from disk again and again"),
    ],
)
def test_it_says_whether_weights_and_all_beside_them_fit(
    grouped: Path, monkeypatch: pytest.MonkeyPatch, free: int, whole: int, verdict: str
) -> None:
    monkeypatch.setattr(localmoe.inspection, "available_nbytes", lambda: free)
    monkeypatch.setattr(localmoe.inspection, "total_nbytes", lambda: whole)
    monkeypatch.setattr(localmoe.inspection, "needed", lambda *asked: Needed(76_800, 30_000, 2_000, 1_000))
    assert sections(grouped)["memory"]["fits this machine"] == verdict  # 144,416 of weights and 109,800 beside them


@pytest.mark.parametrize("kv_format", KV_FORMATS)
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("family", ["grouped", "latent"])
def test_the_cpu_needs_what_it_says_before_it_lowers(
    family: str, threads: int, kv_format: str, request: pytest.FixtureRequest
) -> None:
    network = Network(open_source(request.getfixturevalue(family)))
    programs = [network.program(1), network.program(40)]
    device = CpuDevice(300, kv_format, threads)
    lowerings = [Lowering(device, program) for program in programs]
    for lowering in lowerings:
        lowering.run()
    cache = sum(array.nbytes for layer in programs[0].cache for array in device.cache(layer) if array is not None)
    tables = {id(t): t for p in programs for op in p.ops if op.name == "rope" for t in [op.attributes["table"]]}
    working = sum(device.rope_table(table).nbytes for table in tables.values())
    working += sum(lowering.arena.size + sum(kept.nbytes for kept in lowering.kept) for lowering in lowerings)
    assert tables
    assert CpuDevice.needed_nbytes(programs, 300, kv_format, threads) == (cache, working)
    assert cache == 300 * programs[0].cache_nbytes(KV_FORMATS[kv_format])


def test_rows_of_the_cache_count_as_the_device_pads_them(grouped: Path, latent: Path) -> None:
    assert needed(Network(open_source(grouped)), 300).cache == 300 * 2 * 2 * 2 * (16 + 16)
    assert needed(Network(open_source(latent)), 300).cache == 300 * 2 * 2 * 48  # 32 + 8, padded to whole vectors
    assert needed(Network(open_source(grouped)), 300, "q8_0").cache == 300 * 2 * 2 * (34 + 34)
    assert needed(Network(open_source(latent)), 300, "q8_0").cache == 300 * 2 * 2 * 34


def test_all_that_is_needed_is_listed_with_its_sum(grouped: Path) -> None:
    found = needed(Network(open_source(grouped)), 300)
    assert (found.vocabulary, found.python) == (275 * (260 + 1), PYTHON_NBYTES)  # tokens and a merge
    assert found.nbytes == 76_800 + found.working + found.vocabulary + PYTHON_NBYTES
    assert sections(grouped, 300)["memory"]["needed beside the weights"] == (
        f"{readable_size(found.nbytes)} at 300 tokens: KV cache 76.8 kB, "
        f"working memory {readable_size(found.working)}, vocabulary 71.8 kB, Python and libraries 49 MB"
    )


def test_nothing_is_read_or_allocated_to_know_what_is_needed(grouped: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(localmoe.kernels.reference_weights, "dequantise", None)
    assert needed(Network(open_source(grouped)), 10**9).cache == 256 * 10**9


def test_a_short_context_needs_no_buffers_for_a_whole_chunk(grouped: Path) -> None:
    network = Network(open_source(grouped))
    assert needed(network, 16).working < needed(network, 512).working / 4


def test_the_program_table_adds_up(grouped: Path) -> None:
    header, rows = program_table(grouped)
    assert [row[0] for row in rows] == list(map(str, range(len(rows))))
    assert sum(int(row[header.index("bytes")]) for row in rows) == 74580
    assert sum(int(row[header.index("FLOPs")]) for row in rows) == 2 * (
        EMBEDDING + 2 * (ATTENTION + 6 * 64 + 2 * EXPERT)
    )
    experts = next(row for row in rows if row[1] == "experts")
    assert experts[2:4] == ("1×64 1×2 1×2", "1×64")
    assert experts[4].startswith("blk.0.ffn_gate_exps.weight:Q8_0[6, 32, 64] ")
