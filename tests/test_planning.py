"""Plans from settings alone: published figures, and the same tensors as a folder that has its weights."""

from __future__ import annotations

import gzip
import json
import os
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf_writing import safetensors_bytes
from test_folder_formats import DEEPSEEK, FLOAT8, LLAMA, SYMMETRIC, shapes, two_folders
from test_mistral import LARGE

import localmoe.quantisation.rearranging
from localmoe.errors import FileFormatError, LocalMoeError, UnsupportedError
from localmoe.inspection import report
from localmoe.loader.locate import open_source
from localmoe.loader.planning import is_plan, open_plan
from localmoe.network import Network


def figures(path: Path) -> dict[str, str]:
    return {name: value for _, rows in report(path) for name, value in rows}


def planned(path: Path) -> Network:
    assert is_plan(path)
    return Network(open_plan(path))


def listing(network: Network) -> dict[str, tuple[Any, ...]]:
    return {n: (w.shape, w.format.name, w.nbytes, len(w.slabs)) for n, w in network.tensors.items()}


# What their publishers say; model cards and papers. A second figure: active for one token.
PUBLISHED = {
    "hf/deepseek-r1_config": ("671.03 B", "37.55 B"),  # "671B total, 37B activated"
    "hf/qwen3-30B-A3B_config": ("30.53 B", "3.35 B"),  # "30.5B in total and 3.3B activated"
    "hf/qwen3-8B_config": ("8.19 B", "8.19 B"),  # "8.2B"
    "mlc-presets/Mixtral-8x7B-v0.1": ("46.70 B", "12.88 B"),  # "46.7B total, 12.9B per token"
    "mlc-presets/deepseek_v2_lite": ("15.71 B", "2.66 B"),  # "15.7B total, 2.4B activated" without embeddings
    "mlc-presets/deepseek": ("16.38 B", "2.83 B"),  # "16.4B, 2.8B activated"
    "mlc-presets/qwen2moe": ("14.32 B", "2.69 B"),  # "14.3B in total and 2.7B activated"
    "transformers-defaults/GptOssConfig": ("116.83 B", "5.71 B"),  # "117B with 5.1B active" without embeddings
    "mlc-presets/llama2_70b": ("68.98 B", "68.98 B"), "mlc-presets/llama3_1_8b": ("8.03 B", "8.03 B"),
    "mlc-presets/llama3_1_70b": ("70.55 B", "70.55 B"), "mlc-presets/llama3_2_1b": ("1.24 B", "1.24 B"),
    "mlc-presets/mistral_7b_v03": ("7.25 B", "7.25 B"), "mlc-presets/phi-3_5": ("3.82 B", "3.82 B"),
    "mlc-presets/gemma2_2b": ("2.61 B", "2.61 B"), "mlc-presets/gemma2_9b": ("9.24 B", "9.24 B"),
    "mlc-presets/gemma3_1b_it": ("999.89 M", "999.89 M"), "mlc-presets/aya-23": ("8.03 B", "8.03 B"),
    "mlc-presets/olmo2_32b": ("32.23 B", "32.23 B"), "mlc-presets/qwen2_7b": ("7.62 B", "7.62 B"),
    "mlc-presets/qwen2.5_3b": ("3.09 B", "3.09 B"), "mlc-presets/qwen3_0.6b": ("596.05 M", "596.05 M"),
    "mlc-presets/smollm2_135m": ("134.52 M", "134.52 M"), "mlc-presets/gpt2_medium": ("354.82 M", "354.82 M"),
    "mlc-presets/tinyllama_1b_chat_v1.0": ("1.10 B", "1.10 B"), "mlc-presets/codellama_34b": ("33.74 B", "33.74 B"),
}  # fmt: skip
MLC = ("context_window_size", "prefill_chunk_size", "attention_sink_size")  # of MLC's own presets, not of the models


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models_have_their_published_parameters(name: str, conformance: Path, tmp_path: Path) -> None:
    config = json.loads((conformance / "configs" / f"{name}.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k not in MLC}))
    found = figures(tmp_path / "config.json")
    assert (found["total"], found["active per token"]) == PUBLISHED[name]


@pytest.mark.parametrize(
    ("name", "type", "size"),
    [("qwen3-30B-A3B", "q4_K_M", "18.55 GB"), ("qwen3-8B", "q8_0", "8.70 GB"), ("deepseek-r1", "q4_K_M", "404.49 GB")],
)
def test_a_plan_says_what_quantising_would_give(name: str, type: str, size: str, conformance: Path) -> None:
    """Published GGUF files of these have 18.56, 8.71 and 404.43 GB, headers with them (from memory of their pages)."""
    rows = dict(report(conformance / "configs" / "hf" / f"{name}_config.json", quantize=type))
    assert dict(rows["model"])["size"] == size


def test_to_plan_a_quantised_model_nothing_is_computed(conformance: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """R1's 8-bit floats have scales beside them: what is made of them in a file is known without their products."""
    monkeypatch.setattr(localmoe.quantisation.rearranging, "values", None)
    tracemalloc.start()
    try:
        report(conformance / "configs" / "hf" / "deepseek-r1_config.json", quantize="q4_K_M")
        assert tracemalloc.get_traced_memory()[1] < 200e6
    finally:
        tracemalloc.stop()


def test_mistral_large_3s_params_json_gives_its_published_figures(tmp_path: Path) -> None:
    """Its model card: 675B in all, of which 41B active; 673B and 39B without the vision encoder (and embeddings)."""
    (tmp_path / "params.json").write_text(json.dumps(LARGE))
    found = figures(tmp_path / "params.json")
    assert (found["total"], found["active per token"]) == ("673.42 B", "39.95 B")
    assert found["experts"] == "4 of 128 in 58 layers"
    assert figures(tmp_path)["total"] == found["total"]


def test_gemma_3s_published_config_says_little_and_the_rest_is_known(tmp_path: Path) -> None:
    text = {
        "hidden_size": 2560, "intermediate_size": 10240, "model_type": "gemma3_text", "num_hidden_layers": 34,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"}, "sliding_window": 1024,
    }  # fmt: skip
    config = {"model_type": "gemma3", "text_config": text, "vision_config": {"hidden_size": 1152}, "boi_token_index": 2}
    (tmp_path / "config.json").write_text(json.dumps(config))
    found = figures(tmp_path / "config.json")
    assert (found["total"], found["blocks"], found["vocabulary"]) == ("3.88 B", "34", "262,208")


@pytest.mark.parametrize(
    ("config", "quantization"),
    [
        (LLAMA, None), (DEEPSEEK, None), (DEEPSEEK, FLOAT8["DeepSeek's blocks"][1:]),
        (LLAMA, FLOAT8["compressed-tensors, rows"][1:]), (LLAMA, SYMMETRIC["gptq, 32"]),
        (LLAMA, SYMMETRIC["packed, 32"]),
    ],
)  # fmt: skip
def test_a_plan_has_the_tensors_of_the_folder_with_its_weights(
    config: dict[str, Any], quantization: Any, tmp_path: Path
) -> None:
    """Names, shapes, formats and bytes: from config.json, and from the names in an index beside it."""
    config = config | {"torch_dtype": "float32"}
    scheme, settings = quantization or FLOAT8["one a matrix"][1:]
    small, large, _ = two_folders(tmp_path, config, scheme, settings)
    real, folder = (small, "small") if quantization else (large, "large")
    names = real.source.path / "model.safetensors"
    kinds = json.loads(names.read_bytes()[8 : 8 + int.from_bytes(names.read_bytes()[:8], "little")])
    plan = tmp_path / "plan"
    plan.mkdir()
    (plan / "config.json").write_bytes((tmp_path / folder / "config.json").read_bytes())
    expected = listing(real)
    assert listing(planned(plan)) == expected
    (plan / "model.safetensors.index.json").write_text(json.dumps({"weight_map": dict.fromkeys(kinds, "a")}))
    assert listing(planned(plan)) == expected
    with pytest.raises(FileFormatError, match=r"no \.safetensors file"):
        open_source(plan)


def test_an_index_that_lacks_a_tensor_or_has_one_too_many_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))

    def with_names(names: list[str]) -> Network:
        index = {"weight_map": dict.fromkeys(names, "model-00001-of-00001.safetensors")}
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
        return planned(tmp_path)

    names = list(shapes(LLAMA))
    assert with_names([*names, "vision_tower.x.weight"]).left_out == "1 tensor of vision or audio parts"
    with pytest.raises(FileFormatError, match=r"blk\.1\.ffn_up\.weight.*is missing"):
        with_names([n for n in names if n != "model.layers.1.mlp.up_proj.weight"])
    with pytest.raises(UnsupportedError, match=r"self_attn\.g_proj\.weight"):
        with_names([*names, "model.layers.0.self_attn.g_proj.weight"])


@pytest.mark.parametrize(
    "changes",
    [
        {"num_hidden_layers": 2**31 - 1}, {"n_routed_experts": 2**31 - 1}, {"num_attention_heads": 2**31 - 1},
        {"hidden_size": 2**31 - 1, "vocab_size": 2**31 - 1}, {"torch_dtype": "int8"}, {"intermediate_size": None},
        {"quantization_config": {"quant_method": "fp8", "weight_block_size": [0, 1]}}, {"v_head_dim": 0},
    ],
)  # fmt: skip
def test_hostile_settings_are_planned_or_refused_in_one_line_and_in_little_memory(
    changes: dict[str, Any], tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(DEEPSEEK | changes))
    tracemalloc.start()
    try:
        planned(tmp_path / "config.json")
    except LocalMoeError as error:
        assert "\n" not in str(error)  # noqa: PT017
    finally:
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert peak < 20_000_000


def test_a_plan_of_671_billion_parameters_takes_little_memory(conformance: Path) -> None:
    tracemalloc.start()
    network = planned(conformance / "configs" / "hf" / "deepseek-r1_config.json")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert sum(w.nbytes for w in network.tensors.values()) > 670e9
    assert peak < 30_000_000


# DeepSeek-R1's 91,991 tensors, by the names, shapes and dtypes of its own files.


@pytest.fixture(scope="module")
def r1(conformance: Path) -> dict[str, dict[str, Any]]:
    path = conformance / "configs" / "params" / "deepseek-r1_params_map.json.gz"
    found: dict[str, dict[str, Any]] = json.loads(gzip.decompress(path.read_bytes()))
    return found


def test_an_index_with_all_names_of_r1_is_mapped_without_one_left_over(
    r1: dict[str, dict[str, Any]], conformance: Path, tmp_path: Path
) -> None:
    assert len(r1) == 91_991
    (tmp_path / "config.json").write_bytes((conformance / "configs" / "hf" / "deepseek-r1_config.json").read_bytes())
    index = {"weight_map": {name: entry["file"] for name, entry in r1.items()}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    network = planned(tmp_path)
    assert "multi-token prediction" in network.left_out
    found = figures(tmp_path)
    assert (found["total"], found["active per token"]) == ("671.03 B", "37.55 B")


@pytest.mark.skipif(os.name == "nt", reason="truncate makes no sparse file there")
def test_every_shape_and_dtype_of_r1s_files_is_what_the_family_asks_for(
    r1: dict[str, dict[str, Any]], conformance: Path, tmp_path: Path
) -> None:
    """Its 163 files as they are, all zeros: headers as published, the data a hole in the file."""
    (tmp_path / "config.json").write_bytes((conformance / "configs" / "hf" / "deepseek-r1_config.json").read_bytes())
    sizes = {"F8_E4M3": 1, "BF16": 2, "F32": 4}
    by_file: dict[str, dict[str, Any]] = {}
    ends: dict[str, int] = {}
    for name, entry in r1.items():
        start = ends.get(entry["file"], 0)
        ends[entry["file"]] = start + int(np.prod(entry["shape"])) * sizes[entry["dtype"]]
        place = {"dtype": entry["dtype"], "shape": entry["shape"], "data_offsets": [start, ends[entry["file"]]]}
        by_file.setdefault(entry["file"], {})[name] = place
    for file, header in by_file.items():
        head = safetensors_bytes({}, **header)
        with (tmp_path / file).open("wb") as out:
            out.write(head)
            out.truncate(len(head) + ends[file])
    weights = {name: entry["file"] for name, entry in r1.items()}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weights}))
    network = Network(open_source(tmp_path))
    assert sum(w.elements for w in network.tensors.values()) == 671_026_419_200
    predictors = sum(name.startswith("model.layers.61.") for name in r1)
    assert predictors > 1500 and "multi-token prediction" in network.left_out
    plan = listing(planned(tmp_path / "config.json"))
    real = listing(network)
    assert plan.keys() == real.keys()
    assert {n: w for n, w in real.items() if w != plan[n]} == {}


def test_an_index_of_fused_experts_sinks_and_mxfp4_names_what_the_family_asks_for(
    conformance: Path, tmp_path: Path
) -> None:
    """gpt-oss: gate and up in one tensor, blocks and scales apart, sinks without a suffix."""
    config = json.loads((conformance / "configs" / "transformers-defaults" / "GptOssConfig.json").read_text())
    config |= {
        "num_hidden_layers": 1,
        "layer_types": ["sliding_attention"],
        "quantization_config": {"quant_method": "mxfp4"},
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    at = "model.layers.0"
    names = [f"{at}.{n}.weight" for n in ("input_layernorm", "post_attention_layernorm", "mlp.router")]
    names += [f"{at}.self_attn.{p}_proj.{kind}" for p in "qkvo" for kind in ("weight", "bias")]
    names += [f"{at}.mlp.experts.{p}_proj_{kind}" for p in ("gate_up", "down") for kind in ("blocks", "scales", "bias")]
    names += [f"{at}.self_attn.sinks", f"{at}.mlp.router.bias", "model.embed_tokens.weight", "model.norm.weight"]
    index = {"weight_map": dict.fromkeys([*names, "lm_head.weight"], "a.safetensors")}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    found = planned(tmp_path)
    assert found.tensors["blk.0.ffn_up_exps.weight"].format.name == "MXFP4"
    assert found.tensors["blk.0.attn_q.weight"].format.name == "BF16"
    assert found.left_out == ""
