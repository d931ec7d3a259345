"""Experts of published folders that no kernel reads as they lie: made one by one, with the bits of a whole copy, in
slots of any size; opening makes none, and what does not fit is refused with numbers."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from contextlib import closing
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf_writing import safetensors_bytes
from test_folder_formats import (
    AWQ,
    DEEPSEEK,
    FP8,
    GPTQ,
    INT4,
    Scheme,
    Stored,
    awq,
    compressed,
    float8,
    gptq,
    packed,
    plain,
    two_folders,
    write,
)
from test_slots import expert_ops, opened, room, said

import localmoe.experts.residence
import localmoe.loader.cuts
from localmoe.errors import SettingError, UnsupportedError
from localmoe.experts.loading import Loading
from localmoe.experts.making import Making, Spare, makings
from localmoe.experts.pieces import pieces
from localmoe.experts.reading import BLOCK
from localmoe.formats import Bytes, MadeSlabs, Step
from localmoe.inspection import report
from localmoe.loader.huggingface import open_folder
from localmoe.loader.safetensors import read_shards
from localmoe.memory import resident
from localmoe.model import Model

D, F, E, V, LAYERS = 64, 96, 6, 250, 2
SIZES: dict[str, Any] = {
    "num_hidden_layers": LAYERS, "hidden_size": D, "intermediate_size": F, "vocab_size": V, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "rms_norm_eps": 1e-5, "max_position_embeddings": 300,
    "num_local_experts": E, "num_experts_per_tok": 2, "tie_word_embeddings": False, "rope_theta": 10000.0,
}  # fmt: skip
GPT_OSS = {**SIZES, "model_type": "gpt_oss", "sliding_window": 8}
LLAMA4 = {
    **SIZES, "model_type": "llama4_text", "intermediate_size_mlp": F, "num_experts_per_tok": 1,
    "attention_chunk_size": 32,
}  # fmt: skip
LATENT = {
    **DEEPSEEK, "vocab_size": V, "max_position_embeddings": 300, "moe_intermediate_size": 96, "intermediate_size": 192,
    "kv_lora_rank": 64, "q_lora_rank": 64, "num_attention_heads": 4, "n_routed_experts": 8,
    "num_nextn_predict_layers": 0,
}  # fmt: skip


def stored(shapes_of: dict[str, tuple[int, ...]], dtype: str) -> Stored:
    random = np.random.default_rng(5)
    found: Stored = {}
    for name, shape in shapes_of.items():
        if name.endswith("_blocks"):
            found[name] = ("U8", shape, random.integers(0, 256, shape, np.uint8).tobytes())
        elif name.endswith("_scales"):
            found[name] = ("U8", shape, random.integers(121, 125, shape, np.uint8).tobytes())
        else:
            noise = random.standard_normal(shape) / max(shape[-1], 8) ** 0.5
            found[name] = plain(1 + noise if "norm" in name else noise, dtype)
    return found


def common(i: int, width: int = D) -> dict[str, tuple[int, ...]]:
    at, sizes = f"model.layers.{i}", {"q": (64, width), "k": (32, width), "v": (32, width), "o": (width, 64)}
    norms = {f"{at}.{name}_layernorm.weight": (width,) for name in ("input", "post_attention")}
    return {f"{at}.self_attn.{n}_proj.weight": shape for n, shape in sizes.items()} | norms


def ends(width: int = D) -> dict[str, tuple[int, ...]]:
    return {"model.embed_tokens.weight": (V, width), "model.norm.weight": (width,), "lm_head.weight": (V, width)}


def gpt_oss_shapes(mxfp4: bool, D: int = D, F: int = F, E: int = E) -> dict[str, tuple[int, ...]]:
    found = ends(D)
    for i in range(LAYERS):
        found |= common(i, D)
        at, mlp = f"model.layers.{i}.self_attn", f"model.layers.{i}.mlp"
        found |= {f"{at}.{n}_proj.bias": (s,) for n, s in (("q", 64), ("k", 32), ("v", 32), ("o", D))}
        found |= {f"{at}.sinks": (4,), f"{mlp}.router.weight": (E, D), f"{mlp}.router.bias": (E,)}
        for name, rows, columns in (("gate_up_proj", 2 * F, D), ("down_proj", D, F)):
            found[f"{mlp}.experts.{name}_bias"] = (E, rows)
            if mxfp4:
                found[f"{mlp}.experts.{name}_blocks"] = (E, rows, columns // 32, 16)
                found[f"{mlp}.experts.{name}_scales"] = (E, rows, columns // 32)
            else:
                found[f"{mlp}.experts.{name}"] = (E, columns, rows)
    return found


OPENAIS = {"quantization_config": {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}}


def gpt_oss(folder: Path, mxfp4: bool) -> Path:
    return write(folder, stored(gpt_oss_shapes(mxfp4), "BF16"), GPT_OSS | (OPENAIS if mxfp4 else {}))


def llama4(folder: Path) -> Path:
    found = ends()
    for i in range(LAYERS):
        found |= common(i)
        at, shared = f"model.layers.{i}.feed_forward", {"gate": (F, D), "up": (F, D), "down": (D, F)}
        found |= {f"{at}.shared_expert.{n}_proj.weight": shape for n, shape in shared.items()}
        found |= {f"{at}.router.weight": (E, D)}
        found |= {f"{at}.experts.gate_up_proj": (E, D, 2 * F), f"{at}.experts.down_proj": (E, F, D)}
    return write(folder, stored(found, "BF16"), LLAMA4)


def latent(scheme: Scheme, quantization: dict[str, Any]) -> Callable[[Path], Path]:
    def folder(path: Path) -> Path:
        path.mkdir(parents=True)
        two_folders(path, LATENT, scheme, quantization)
        return path / "small"

    return folder


GROUPED = compressed({**INT4, "group_size": 32}, "pack-quantized")
TILES = {**FP8, "weight_block_size": [128, 128]}
FOLDERS: dict[str, Callable[[Path], Path]] = {
    "gpt-oss, MXFP4": lambda path: gpt_oss(path, True),
    "gpt-oss, BF16": lambda path: gpt_oss(path, False),
    "llama4": llama4,
    "gptq": latent(gptq(32), {**GPTQ, "group_size": 32}),
    "gptq, zeros": latent(gptq(32, True, order=False), {**GPTQ, "group_size": 32, "sym": False}),
    "awq": latent(awq(32), {**AWQ, "group_size": 32}),
    "packed": latent(packed(32), GROUPED),
    "packed, zeros": latent(
        packed(32, True), compressed({**INT4, "group_size": 32, "symmetric": False}, "pack-quantized")
    ),
    "fp8": latent(float8((128, 128), "weight_scale_inv", "F32", lambda rows: ()), TILES),
}
MADE = [name for name in FOLDERS if name != "fp8"]


@pytest.fixture(scope="module", params=FOLDERS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return FOLDERS[request.param](tmp_path_factory.mktemp("made") / "folder")


@pytest.fixture(params=MADE)
def made_folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return FOLDERS[request.param](tmp_path / "folder")


@pytest.fixture
def mxfp4(tmp_path: Path) -> Path:
    return gpt_oss(tmp_path / "folder", True)


@pytest.fixture
def makes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows with every expert that is made whole, in memory of its own."""
    found: list[int] = []
    whole = MadeSlabs.__getitem__

    def counted(slabs: MadeSlabs, index: int) -> Bytes:
        found.extend([index] * (slabs.count > 1))
        return whole(slabs, index)

    monkeypatch.setattr(MadeSlabs, "__getitem__", counted)
    return found


@pytest.mark.parametrize("band", [100, 2 << 20])
def test_slots_of_any_size_say_the_bits_of_a_whole_copy(
    folder: Path, band: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(localmoe.loader.cuts, "BAND_NBYTES", band)
    with closing(opened(folder, "mmap", threads=1)) as model:
        expected = said(model)
    with closing(opened(folder, "off")) as model:
        assert said(model) == expected
    for share, threads in ((0.0, 1), (0.5, 2), (1.0, 2)):
        with closing(opened(folder, "slots", threads=threads, share=share)) as model:
            assert said(model) == expected, share
            assert model.residency_mode == "slots"
            assert model.counts().chosen > 0


def test_the_mode_changes_in_the_middle_and_copies_are_let_go(mxfp4: Path, makes: list[int]) -> None:
    with closing(opened(mxfp4, "mmap")) as model:
        expected = [model.forward([i], i) for i in range(6)]
    turns = [None, Loading("slots", expert_cache=room(mxfp4, 0.0)), None, Loading("mmap"), None, Loading("slots")]
    with closing(opened(mxfp4, "mmap")) as model:
        slabs = [weight.slabs for op in expert_ops(model) for weight in op.matrices]
        found = []
        for i, turn in enumerate(turns):
            if turn:
                model.change_loading(turn)
                missing = [s.missing_nbytes for s in slabs if isinstance(s, MadeSlabs)]
                assert all(missing) if turn.mode == "slots" else not any(missing), turn.mode
            found.append(model.forward([i], i))
    assert np.concatenate(found).tobytes() == np.concatenate(expected).tobytes()


def test_opening_inspecting_and_running_in_slots_make_no_whole_copy(made_folder: Path, makes: list[int]) -> None:
    report(made_folder)
    assert not makes
    with closing(opened(made_folder, "slots")) as model:
        said(model)
    assert not makes
    with closing(opened(made_folder, "mmap")) as model:
        assert len(makes) >= sum(len(w.slabs) for op in expert_ops(model) for w in op.matrices)


def sparse(folder: Path, shapes: dict[str, tuple[int, ...]], config: dict[str, Any]) -> Path:
    """A folder whose tensors are holes in a file: zeros that the disk does not hold."""
    sizes = {"U8": 1, "BF16": 2}
    header: dict[str, Any] = {}
    end = 0
    for name, shape in shapes.items():
        dtype = "U8" if name.endswith(("_blocks", "_scales")) else "BF16"
        start, end = end, end + sizes[dtype] * prod(shape)
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}
    write(folder, {}, config)
    text = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    return folder


@pytest.mark.skipif(sys.platform != "linux", reason="files with holes")
def test_a_folder_far_larger_than_memory_runs_in_slots_and_is_refused_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wide, experts = 4096, 1024
    config = GPT_OSS | OPENAIS | {"hidden_size": wide, "intermediate_size": wide, "num_local_experts": experts}
    folder = sparse(tmp_path / "folder", gpt_oss_shapes(True, wide, wide, experts), config)
    before = resident().anonymous
    with closing(Model(folder, context=64, loading=Loading("slots", expert_cache=4 * 30_000_000))) as model:
        assert sum(w.nbytes for w in model.network.tensors.values()) > 50e9
        model.forward([1], 0)
        assert resident().anonymous - before < 1e9
    monkeypatch.setattr(localmoe.experts.residence, "available_nbytes", lambda: 8_000_000_000)
    for mode in ("mmap", "off"):
        with pytest.raises(SettingError, match=r"take 54\.\d+ GB of memory, and 8\.00 GB are free; --lazy slots"):
            Model(folder, context=64, loading=Loading(mode))
    with closing(Model(folder, context=64, loading=Loading("auto"))) as model:
        assert model.residency_mode == "slots"


@pytest.mark.parametrize("name", ["gpt-oss, MXFP4", "gpt-oss, BF16", "llama4"])
def test_gate_and_up_of_the_same_bytes_are_read_once(name: str, tmp_path: Path) -> None:
    reader: Any = object()
    with closing(opened(FOLDERS[name](tmp_path / "folder"), "slots")) as model:
        wanted = [(weight, 2, np.zeros(weight.slab_nbytes, np.uint8)) for weight in expert_ops(model)[1].matrices]
        both, down = makings(wanted, lambda weight, view: (reader, view.ctypes.data, view.size))
    assert (len(both.made), len(down.made)) == (2, 1)
    for _, _, slab in wanted:
        assert not slab.any()
    for making in (both, down):
        for step, slab in making.made:
            step.make(step.views, slab)
    for weight, matrix, slab in wanted:
        assert slab.tobytes() == weight.slabs[matrix].tobytes()


def test_places_that_lie_close_together_are_one_read() -> None:
    class Recorded:
        def __init__(self) -> None:
            self.reads: list[tuple[int, int]] = []

        def read(self, buffer: memoryview, offset: int) -> None:
            self.reads.append((offset, len(buffer)))
            buffer[:] = bytes((offset + i) % 251 for i in range(len(buffer)))

    one, other = Recorded(), Recorded()
    places = ((one, 5000, 10), (other, 100, 7), (one, 90, 3), (one, 5_000_001, 20))
    slab = np.zeros(40, np.uint8)

    def make(views: Sequence[Bytes], out: Bytes) -> None:
        out[:] = np.concatenate(list(views))

    Making(places, [(Step((), make), slab)]).fill(Spare())  # type: ignore[arg-type]
    assert one.reads == [(0, 2 * BLOCK), (5_000_001 // BLOCK * BLOCK, BLOCK)]
    assert other.reads == [(0, BLOCK)]
    expected = [(offset + i) % 251 for _, offset, nbytes in places for i in range(nbytes)]
    assert slab.tolist() == expected


def test_an_expert_with_other_zeros_than_the_first_is_told_when_it_is_read(tmp_path: Path) -> None:
    folder = FOLDERS["gptq"](tmp_path / "folder")
    entries = read_shards(folder)
    tensors = {name: (e.dtype, e.shape, e.bytes.tobytes()) for name, e in entries.items()}
    for name in [f"model.layers.1.mlp.experts.{i}.down_proj.qzeros" for i in range(1, 8)]:
        dtype, shape, data = tensors[name]
        tensors[name] = (dtype, shape, bytes(len(data)))
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").write_bytes(safetensors_bytes(tensors))
    with pytest.raises(UnsupportedError, match=r"down_proj\.qweight' has other zeros than 8"):
        Model(folder, context=64, loading=Loading("mmap"))
    with (
        closing(opened(folder, "slots")) as model,
        pytest.raises(UnsupportedError, match=r"down_proj\.qweight' has other zeros than 8"),
    ):
        said(model)


def test_what_is_made_fits_the_weight_and_is_made_once_for_all_who_hold_it(made_folder: Path) -> None:
    for weight in open_folder(made_folder).tensors.values():
        if isinstance(weight.slabs, MadeSlabs):
            held = weight.slabs[0]
            assert held is weight.slabs[0]
            assert held.size * len(weight.slabs) == weight.nbytes
            assert weight.nbytes * weight.format.elements == weight.elements * weight.format.nbytes


def test_a_disk_is_probed_by_what_is_read_most(made_folder: Path) -> None:
    source = open_folder(made_folder)
    weights = [w for w in source.tensors.values() if isinstance(w.slabs, MadeSlabs) and len(w.shape) == 3]
    found = pieces(weights, source.files)
    assert len(found) == sum(len(weight.slabs) for weight in weights)
    assert min(piece.nbytes for piece in found) >= 0.4 * min(weight.slab_nbytes for weight in weights)
