"""`localmoe verify`: both sides of a comparison, what it says and how it ends; transformers itself where it is."""

from __future__ import annotations

import copy
import json
import shutil
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
from oracle_cases import CASES
from oracle_mixtures import gpt_oss, save_as_mxfp4
from tiny_models import deepseek2, qwen3moe

from localmoe.cli import main
from localmoe.errors import FileFormatError, SettingError, UnsupportedError
from localmoe.evaluation import findings
from localmoe.evaluation.own_pass import own_pass
from localmoe.evaluation.transformers_model import Pass
from localmoe.evaluation.verification import (
    Greedy,
    Layer,
    Verification,
    compared_routing,
    greedy_beside,
    passage_ids,
    relative_error,
)
from localmoe.kernels.program import Op
from localmoe.model import Model
from localmoe.repl.render import Screen

IDS = np.array([i * 37 % 256 for i in range(100)], np.int32)


def call(*words: object) -> int:
    with pytest.raises(SystemExit) as caught:
        main(["verify", *map(str, words)])
    code = caught.value.code
    return code if isinstance(code, int) else 0


@pytest.fixture(params=[qwen3moe, deepseek2], ids=["gqa", "mla"])
def path(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    written: Path = request.param(tmp_path / "tiny.gguf")
    return written


@pytest.mark.parametrize("device", ["cpu", "reference"])
def test_watching_computes_what_running_does(path: Path, device: str) -> None:
    model = Model(path, device=device, context=128, kv_format="f32", threads=2)
    whole = model.forward(IDS.tolist(), 0, all_logits=True)
    names: list[str] = []
    assert np.array_equal(model.watch(IDS.tolist(), lambda op, inputs, outputs: names.append(op.name)), whole)
    assert names == [op.name for op in model.network.program(model.score_chunk, all_rows=True).ops]
    assert model.cached == IDS.tolist()
    model.close()


def test_both_devices_show_the_same_arrays(path: Path) -> None:
    """Slices of a buffer among them, which begin behind its start."""
    shown: list[list[Any]] = []
    for device in ("cpu", "reference"):
        arrays: list[Any] = []

        def see(op: Op, inputs: list[Any], outputs: list[Any], arrays: list[Any] = arrays) -> None:
            arrays += [array.copy() for array in (*inputs, *outputs)]

        model = Model(path, device=device, context=128, kv_format="f32", threads=2)
        model.watch(IDS[:20].tolist(), see)
        program = model.network.program(2, all_rows=True)
        model.close()
        shown.append(arrays)
    assert len(shown[0]) == sum(len(op.inputs) + len(op.outputs) for op in program.ops)
    for mine, right in zip(*shown, strict=True):
        assert mine.shape == right.shape
        assert relative_error(mine, right) < 1e-4


def test_both_devices_see_the_same_stream_and_choices(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Model, "score_chunk", 64)  # two pieces
    found = []
    for device in ("cpu", "reference"):
        model = Model(path, device=device, context=128, kv_format="f32", threads=2)
        found.append(own_pass(model, IDS))
        layers = model.network.config.block_count
        model.close()
    cpu, twin = found
    assert len(cpu.layers) == len(twin.layers) == layers
    assert cpu.experts.keys() == twin.experts.keys() != set()
    for mine, right in zip(cpu.layers, twin.layers, strict=True):
        assert mine.shape[0] == IDS.size
        assert relative_error(mine, right) < 1e-5
    for number in cpu.experts:
        assert np.array_equal(np.sort(cpu.experts[number]), np.sort(twin.experts[number]))
        assert relative_error(cpu.standing[number], twin.standing[number]) < 1e-5


def test_a_layer_s_stream_is_what_the_next_one_reads(path: Path) -> None:
    model = Model(path, device="reference", context=128, kv_format="f32")
    norms: dict[str, Any] = {}

    def see(op: Op, inputs: list[Any], outputs: list[Any]) -> None:
        if op.weights and op.weights[0].name in ("blk.1.attn_norm.weight", "output_norm.weight"):
            norms[op.weights[0].name] = inputs[0].copy()

    model.watch(IDS.tolist(), see)
    found = own_pass(model, IDS)
    assert np.array_equal(found.layers[0], norms["blk.1.attn_norm.weight"])
    assert np.array_equal(found.layers[-1], norms["output_norm.weight"])
    model.close()


def test_choices_are_compared_as_sets_and_the_gap_is_the_closest_pair_s() -> None:
    standing = np.array([[0.4, 0.3, 0.2, 0.1], [0.4, 0.3, 0.299, 0.1]], np.float32)
    ours, theirs = np.array([[0, 1], [0, 1]]), np.array([[1, 0], [0, 2]])
    alike, apart, gap = compared_routing(standing, ours, theirs)
    assert (alike, apart) == (0.75, 1)
    assert gap == pytest.approx(0.001, rel=1e-3)


def test_an_error_is_relative_and_what_is_no_number_is_infinite() -> None:
    assert relative_error([3.0, 4.0], [3.0, 3.0]) == pytest.approx(1 / 18**0.5)
    assert relative_error([np.nan, 1.0], [1.0, 1.0]) == float("inf")


class Counting:
    """Both sides of a greedy text: after token n comes n + step, but after `odd` comes `other`."""

    def __init__(self, odd: int = -1, other: int = -1) -> None:
        self.odd, self.other, self.runs = odd, other, 0

    def _logits(self, ids: list[int]) -> Any:
        logits = np.zeros((len(ids), 64), np.float32)
        for row, id in enumerate(ids):
            logits[row, self.other if id == self.odd else id + 1] = 2
        return logits

    def forward(self, ids: list[int], position: int, *, prompt: bool = False) -> Any:
        return self._logits(ids[-1:])

    def run(self, ids: list[int]) -> Pass:
        self.runs += 1
        return Pass(self._logits(ids), [np.zeros((len(ids), 4), np.float32)])


def test_texts_that_agree_take_one_run() -> None:
    oracle: Any = Counting()
    first, greedy = greedy_beside(Counting(), oracle, [3, 4], 5)  # type: ignore[arg-type]
    assert greedy == Greedy([5, 6, 7, 8, 9], [5, 6, 7, 8, 9], 5, 0.0)
    assert oracle.runs == 1
    assert (len(first.logits), len(first.layers[0])) == (2, 2)


def test_texts_that_part_are_both_told_to_their_end() -> None:
    oracle: Any = Counting(odd=6, other=20)
    _, greedy = greedy_beside(Counting(), oracle, [3, 4], 5)  # type: ignore[arg-type]
    assert greedy == Greedy([5, 6, 7, 8, 9], [5, 6, 20, 21, 22], 2, 2.0)
    assert oracle.runs == 2


def test_no_greedy_text_takes_one_run_all_the_same() -> None:
    oracle: Any = Counting()
    _, greedy = greedy_beside(Counting(), oracle, [3, 4], 0)  # type: ignore[arg-type]
    assert (greedy.ours, greedy.theirs, oracle.runs) == ([], [], 1)


def found(errors: list[float], error: float = 1e-7, **more: Any) -> Verification:
    layers = [Layer(n, e, 0.999, 12, 1.25e-7) for n, e in enumerate(errors)]
    greedy = Greedy([1, 2], [1, 3], 1, 0.5)
    return Verification(128, layers, 2e-7, error, 1e-9, 1.0, greedy, 1e-4, ["BF16", "F32"], **more)


def test_a_verdict_names_the_first_layer_beyond_the_tolerance() -> None:
    assert found([1e-7, 2e-7]).passed
    assert not found([1e-7, 2e-7], error=2e-4).passed
    assert "in the logits" in findings.verdict(found([1e-7], error=2e-4))
    damaged = found([1e-7, 3e-3, 1e-2, float("inf")])
    assert not damaged.passed
    assert findings.verdict(damaged) == "differs from layer 1 on: error 3.0e-03, tolerance 1.0e-04 (BF16, F32)"
    assert [row[0] for row in findings.layer_rows(damaged)] == ["0", "1 !", "2 !", "3 !"]
    assert damaged.record()["first_layer_beyond"] == 1


def test_the_table_fits_80_columns(capsys: pytest.CaptureFixture[str]) -> None:
    result = found([1e-7] * 100)
    Screen().rows(findings.layer_rows(result), findings.HEADER)
    Screen().rows([*findings.logit_rows(result), *findings.greedy_rows(result, lambda ids: "some words " * len(ids))])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["layer", "error", "same", "experts", "tokens", "apart", "gap"]
    assert lines[100].split() == ["99", "1.0e-07", "99.90", "%", "12", "of", "128", "1.2e-07"]
    assert len(lines) == 1 + 100 + 7
    assert max(map(len, lines)) <= 80


@pytest.mark.parametrize("missing", ["torch", "transformers"])
def test_without_transformers_the_extra_is_named(
    missing: str, path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if missing == "transformers":
        monkeypatch.setitem(sys.modules, "torch", sys)
    monkeypatch.setitem(sys.modules, missing, None)
    assert call(path, tmp_path) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert f"{missing} is not installed: pip install 'localmoe[oracle]'" in err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["tiny.gguf"], "name the Hugging Face folder"),
        (["tiny.gguf", "nowhere"], "nowhere: no such folder"),
        (["tiny.gguf", "tiny.gguf"], "tiny.gguf: no such folder"),
        (["tiny.gguf", ".", "--text", "nothing.txt"], "nothing.txt: no such file"),
    ],
)
def test_what_cannot_be_compared_is_one_line(
    words: list[str], said: str, path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(path.parent)
    assert call(*words) == 2
    err = capsys.readouterr().err
    assert said in err
    assert err.count("\n") == 1


# From here on with transformers.


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Tiny folders of a dense family, of a mixture with an expert a tensor and with fused ones, and of DeepSeek's."""
    pytest.importorskip("torch", reason="the oracle needs torch: make oracle installs it")
    transformers = pytest.importorskip("transformers", reason="the oracle needs transformers")
    from safetensors.torch import save_file
    from test_oracle import random_model

    def make(name: str) -> Path:
        folder = tmp_path_factory.mktemp(name)
        case = CASES[name.removesuffix(" fused")]
        settings = case.settings(Random(2), "plain") | {"tie_word_embeddings": name == "llama", "num_hidden_layers": 3}
        model = random_model(transformers, getattr(transformers, f"{case.kind}Config")(**settings), 0)
        copy.deepcopy(model).save_pretrained(folder)
        if name.endswith("fused"):
            save_file({k: w.clone() for k, w in model.state_dict().items()}, folder / "model.safetensors")
        return folder

    return make


FAMILIES = ["llama", "qwen3moe", "qwen3moe fused", "deepseek-v3"]


def tensors_of(folder: Path) -> dict[str, dict[str, Any]]:
    data = (folder / "model.safetensors").read_bytes()
    header: dict[str, dict[str, Any]] = json.loads(data[8 : 8 + struct.unpack("<Q", data[:8])[0]])
    return header


def damaged(folder: Path, copied: Path, ending: str) -> Path:
    """A copy of a folder in which eight values of a tensor have the other sign."""
    shutil.copytree(folder, copied)
    file = copied / "model.safetensors"
    data = bytearray(file.read_bytes())
    begin = 8 + struct.unpack("<Q", data[:8])[0]
    start = begin + next(t["data_offsets"][0] for n, t in tensors_of(folder).items() if n.endswith(ending))
    values = np.frombuffer(data, np.float32, 8, start)
    data[start : start + 32] = (-values - 1).tobytes()
    file.write_bytes(data)
    return copied


@pytest.mark.oracle
@pytest.mark.parametrize("name", FAMILIES)
def test_a_folder_agrees_with_transformers(
    name: str, folders: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = folders(name)
    assert call(folder, "--json", "-n", 8) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["passed"]
    assert result["logits"]["largest_relative_error"] < 1e-5
    assert result["logits"]["same_best_token"] == 1
    assert abs(result["logits"]["kl_divergence"]) < 1e-9
    assert [layer["number"] for layer in result["layers"]] == [0, 1, 2]
    assert result["greedy"]["ours"] == result["greedy"]["theirs"]
    routed = [layer["alike"] for layer in result["layers"]]
    dense = 3 if name == "llama" else json.loads((folder / "config.json").read_text()).get("first_k_dense_replace", 0)
    assert routed == [None] * dense + [1.0] * (3 - dense)
    assert any("experts.gate_up_proj" in n for n in tensors_of(folder)) == name.endswith("fused")
    assert call(folder) == 0
    out = capsys.readouterr().out
    assert "agrees: every error is within the tolerance of 1.0e-04 (F32)" in out
    assert max(map(len, out.splitlines())) <= 80


@pytest.mark.oracle
@pytest.mark.parametrize(
    ("name", "ending", "layer"),
    [
        ("llama", "layers.1.mlp.down_proj.weight", 1),
        ("qwen3moe", "layers.2.mlp.gate.weight", 2),
        ("qwen3moe fused", "layers.0.mlp.experts.down_proj", 0),
        ("deepseek-v3", "layers.1.self_attn.kv_b_proj.weight", 1),
        ("llama", "model.norm.weight", None),
    ],
)
def test_a_damaged_weight_ends_with_1_and_names_its_layer(
    name: str,
    ending: str,
    layer: int | None,
    folders: Callable[[str], Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = folders(name)
    broken = damaged(folder, tmp_path / "broken", ending)
    assert call(broken, folder) == 1
    where = "in the logits" if layer is None else f"from layer {layer} on"
    assert f"differs {where}: error" in capsys.readouterr().out
    assert call(broken, folder, "--json") == 1
    assert json.loads(capsys.readouterr().out)["first_layer_beyond"] == layer
    assert call(broken, folder, "--tolerance", 10) == 0


@pytest.mark.oracle
@pytest.mark.parametrize("name", FAMILIES)
def test_never_more_than_a_layer_is_in_memory(name: str, folders: Callable[[str], Path]) -> None:
    from localmoe.evaluation.transformers_model import StreamedModel

    streamed = StreamedModel(folders(name))
    model = streamed._model
    held: list[int] = []

    def count(*_: object) -> None:
        held.append(sum(w.numel() for w in model.parameters() if not w.is_meta))

    for layer in streamed._layers.values():
        layer.self_attn.register_forward_hook(count)
    first = streamed.run(list(range(20)))
    assert held == [sum(w.numel() for w in layer.parameters()) for layer in streamed._layers.values()]
    assert all(w.is_meta for w in model.parameters())
    assert np.array_equal(streamed.run(list(range(20))).logits, first.logits)


@pytest.mark.oracle
def test_experts_in_mxfp4_are_unpacked_by_transformers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """On the reference device, which rounds no inputs to 8 bits."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    from test_oracle import random_model

    sizes = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 96}
    config = transformers.GptOssConfig(**gpt_oss(Random(3), "yarn, not truncated") | sizes)
    save_as_mxfp4(random_model(transformers, config, 0), torch.Generator().manual_seed(3), tmp_path)
    assert call(tmp_path, "--device", "reference", "--tolerance", 1e-5, "--tokens", 40, "-n", 4, "--json") == 0
    assert json.loads(capsys.readouterr().out)["formats"] == ["F32", "MXFP4"]


@pytest.mark.oracle
def test_float8_weights_are_scaled_by_transformers_and_by_localmoe(
    folders: Callable[[str], Path], tmp_path: Path
) -> None:
    """DeepSeek's blocks with a scale each, against the same folder in float32; we agree to what floats must."""
    torch = pytest.importorskip("torch")
    from safetensors.torch import load_file, save_file

    from localmoe.evaluation.transformers_model import StreamedModel

    folder = folders("llama")
    config = json.loads((folder / "config.json").read_text())
    stored, packed = load_file(folder / "model.safetensors"), {}
    for name in [name for name in stored if name.endswith("_proj.weight")]:
        rows, columns = stored[name].shape
        blocks = stored[name].view(rows // 4, 4, columns // 4, 4)
        scale = blocks.abs().amax(dim=(1, 3), keepdim=True) / 448
        small = (blocks / scale).to(torch.float8_e4m3fn)
        stored[name] = (small.float() * scale).reshape(rows, columns)
        packed |= {name: small.reshape(rows, columns), f"{name}_scale_inv": scale.reshape(rows // 4, columns // 4)}
    said = {"quant_method": "fp8", "weight_block_size": [4, 4], "activation_scheme": "dynamic"}
    for kind, tensors, settings in (("f32", stored, {}), ("fp8", stored | packed, {"quantization_config": said})):
        (tmp_path / kind).mkdir()
        save_file(tensors, tmp_path / kind / "model.safetensors")
        (tmp_path / kind / "config.json").write_text(json.dumps(config | settings))
    found = [StreamedModel(tmp_path / kind).run(list(range(20))).logits for kind in ("f32", "fp8")]
    assert np.array_equal(*found)
    assert len(packed) == 2 * 7 * 3
    assert call(tmp_path / "fp8", "--tokens", 40, "-n", 4) == 0


@pytest.mark.oracle
def test_a_folder_of_another_model_is_refused(
    folders: Callable[[str], Path], capsys: pytest.CaptureFixture[str], path: Path
) -> None:
    assert call(path, folders("llama")) == 2
    assert "not the same model" in capsys.readouterr().err


@pytest.fixture
def broken_folder(folders: Callable[[str], Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(folders("llama"), tmp_path / "folder"))


@pytest.mark.oracle
@pytest.mark.parametrize(
    ("change", "error", "said"),
    [
        ({"model_type": "unheard_of"}, UnsupportedError, "transformers cannot run it"),
        ({"quantization_config": {"quant_method": "awq"}}, UnsupportedError, "weights quantised by 'awq'"),
        ({"hidden_size": 17}, (UnsupportedError, FileFormatError), "transformers"),
        ({"num_hidden_layers": 4}, FileFormatError, "finds no weights for 'model.layers.3.self_attn.q_proj.weight'"),
    ],
)
def test_a_folder_that_transformers_cannot_run_is_refused(
    change: dict[str, Any], error: Any, said: str, broken_folder: Path
) -> None:
    from localmoe.evaluation.transformers_model import StreamedModel

    config = json.loads((broken_folder / "config.json").read_text())
    (broken_folder / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(error, match=said):
        StreamedModel(broken_folder).run([1, 2, 3])


def test_a_text_of_one_token_is_refused(conformance: Path, tmp_path: Path) -> None:
    model = Model(conformance / "models" / "stories260K" / "stories260K-f32.gguf", context=64)
    with pytest.raises(SettingError, match="at least 2"):
        passage_ids(model, "", 10)
    model.close()


@pytest.mark.oracle
@pytest.mark.parametrize(("format", "largest"), [("f32", 1e-5), ("f16", 2e-3), ("q8_0", 0.03), ("q4_0", 0.3)])
def test_a_gguf_file_is_compared_with_its_folder(
    format: str, largest: float, conformance: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stories = conformance / "models" / "stories260K"
    assert call(stories / f"stories260K-{format}.gguf", stories / "hf", "--json") == 0
    result = json.loads(capsys.readouterr().out)
    assert largest / 50 < result["layers"][-1]["error"] < largest
    assert call(stories / f"stories260K-{format}.gguf", stories / "hf", "--tolerance", 1e-9) == 1
