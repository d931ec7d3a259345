"""Folders and files become GGUF files: the same logits and token ids, the formats asked for, nothing half-written."""

from __future__ import annotations

import gzip
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from families import logits, relative_error
from gguf_writing import Tensor, Typed, write_gguf
from tiny_models import qwen3moe, vocabulary
from tokenizers import Tokenizer as Engine
from tokenizers import decoders, models, normalizers, pre_tokenizers

import localmoe
from localmoe import cli, inspection
from localmoe.arch.table import FAMILIES
from localmoe.conversion import convert as conversion
from localmoe.conversion import gguf_file
from localmoe.conversion.convert import convert
from localmoe.errors import FileFormatError, SettingError, UnsupportedError
from localmoe.formats import FORMATS
from localmoe.kernels.quantise import quantise
from localmoe.kernels.reference_weights import values
from localmoe.loader.gguf import open_gguf
from localmoe.loader.locate import open_source
from localmoe.network import Network
from localmoe.quantisation.gguf_form import PAIRED
from localmoe.quantisation.quantiser import Quantiser
from localmoe.tokenizer import Tokenizer

IDS = list(range(3, 43))
FOLDERS = (
    "llama llama3-rope mistral-swa mixtral qwen2 qwen2-moe qwen3 qwen3-moe olmoe gemma2 phi3 deepseek-v2 "
    "deepseek-v2-lite deepseek-v3-yarn"
).split()
# q and k are permuted, or kv_b is cut and transposed, so that sums of products run in another order.
REORDERED = ("llama", "mistral", "mixtral", "deepseek")


def reference(path: Path) -> np.ndarray:
    return logits(Network(open_source(path)), IDS)


def byte_level(path: Path, *, special: tuple[str, ...] = ("<pad>", "<s>", "</s>"), **changes: Any) -> None:
    """A tokenizer.json of the 256 bytes, cut as GPT-2 cuts."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    engine = Engine(models.BPE({piece: i for i, piece in enumerate([*special, *alphabet])}, []))
    engine.pre_tokenizer = changes.get("cut", pre_tokenizers.ByteLevel(add_prefix_space=False))
    engine.decoder = decoders.ByteLevel()
    if "normalise" in changes:
        engine.normalizer = changes["normalise"]
    engine.add_special_tokens(list(special))
    engine.save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "</s>"}))


@pytest.fixture
def folder(conformance: Path, tmp_path: Path) -> Path:
    """The golden Qwen3 mixture with a vocabulary of bytes, a template and recommended sampling."""
    made = tmp_path / "folder"
    shutil.copytree(conformance / "logits" / "qwen3-moe", made, copy_function=shutil.copyfile)
    byte_level(made)
    (made / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    sampling = {"do_sample": True, "temperature": 0.5, "top_k": 7, "eos_token_id": 2}
    (made / "generation_config.json").write_text(json.dumps(sampling))
    return made


# Folders


@pytest.mark.parametrize("name", FOLDERS)
def test_a_folder_and_the_file_made_of_it_have_the_same_logits(name: str, conformance: Path, tmp_path: Path) -> None:
    source, path = conformance / "logits" / name, tmp_path / "model.gguf"
    convert(source, path, "f32")
    found, right = reference(path), reference(source)
    if name.startswith(REORDERED):
        assert relative_error(found, right) <= 1e-5
    else:
        assert (found == right).all()


def test_stories260k_tells_its_story_from_a_file_made_of_its_folder(conformance: Path, tmp_path: Path) -> None:
    source = conformance / "models" / "stories260K"
    written = convert(source / "hf", tmp_path / "model.gguf", "f32")
    assert "no tokenizer" in written.summary, "the folder has none"
    assert relative_error(reference(tmp_path / "model.gguf"), reference(source / "stories260K-f32.gguf")) <= 1e-5


def test_rows_are_permuted_for_exactly_the_families_whose_files_are() -> None:
    """A family that asks whether q and k are permuted must be known to the conversion."""
    package = Path(localmoe.__file__).parent / "arch"
    asking = {name for name, module in FAMILIES.items() if "rope_permuted" in (package / f"{module}.py").read_text()}
    assert asking == PAIRED


def test_the_files_keys_say_what_the_folder_says(folder: Path, tmp_path: Path) -> None:
    written = convert(folder, tmp_path / "model.gguf", "q8_0")
    found = open_gguf(tmp_path / "model.gguf").metadata
    assert (found["general.architecture"], found["general.type"], found["general.file_type"]) == (
        "qwen3moe",
        "model",
        7,
    )
    assert (found["general.sampling.temp"], found["general.sampling.top_k"]) == (0.5, 7)
    assert found["tokenizer.chat_template"].startswith("{% for m in messages %}")
    assert (found["tokenizer.ggml.model"], found["tokenizer.ggml.pre"]) == ("gpt2", "gpt-2")
    rows = open_gguf(tmp_path / "model.gguf").tensors["token_embd.weight"].rows
    assert found["tokenizer.ggml.tokens"][-1] == f"[PAD{rows - 1}]"
    assert len(found["tokenizer.ggml.tokens"]) == len(found["tokenizer.ggml.token_type"]) == rows
    assert written.nbytes == (tmp_path / "model.gguf").stat().st_size
    assert re.fullmatch(r".*model\.gguf: .* kB, \d+\.\d\d bits per weight, .* s \(\d+ M weights/s\)", written.summary)


def test_norms_and_routers_are_float32_and_matrices_as_the_type_says(folder: Path, tmp_path: Path) -> None:
    convert(folder, tmp_path / "model.gguf", "q8_0")
    for name, weight in open_gguf(tmp_path / "model.gguf").tensors.items():
        floats = "norm" in name or "gate_inp" in name
        assert weight.format.name == ("F32" if floats else "Q8_0"), name
    original = open_source(folder).tensors["blk.0.ffn_down_exps.weight"]
    expected = quantise(values(original).reshape(-1, original.columns), FORMATS["Q8_0"])
    made = open_gguf(tmp_path / "model.gguf").tensors["blk.0.ffn_down_exps.weight"]
    assert (np.concatenate(made.slabs) == expected.reshape(-1)).all()


def test_threads_change_no_byte(folder: Path, tmp_path: Path) -> None:
    for threads in (1, 3):
        convert(folder, tmp_path / f"{threads}.gguf", "q4_K_M", threads=threads)
    assert (tmp_path / "1.gguf").read_bytes() == (tmp_path / "3.gguf").read_bytes()


def test_progress_counts_weights_to_the_end_with_their_rate(folder: Path, tmp_path: Path) -> None:
    heard: list[tuple[str, int, int]] = []
    written = convert(folder, tmp_path / "m.gguf", "q8_0", progress=lambda *news: heard.append(news))
    steps = [(done, total) for what, done, total in heard if re.fullmatch(r"writing q8_0, \d+ M weights/s", what)]
    assert steps == sorted(steps)
    assert steps[-1] == (written.weights, written.weights)


def test_weights_that_are_not_finite_are_refused_and_nothing_is_left(folder: Path, tmp_path: Path) -> None:
    file = folder / "model.safetensors"
    data = bytearray(file.read_bytes())
    entry = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["model.layers.1.self_attn.v_proj.weight"]
    at = 8 + int.from_bytes(data[:8], "little") + entry["data_offsets"][0]
    assert entry["dtype"] == "F32"
    data[at : at + 4] = np.float32(np.nan).tobytes()
    file.write_bytes(data)
    with pytest.raises(FileFormatError, match=r"'blk.1.attn_v.weight' holds nan in row 0; Q8_0 can hold finite values"):
        convert(folder, tmp_path / "model.gguf", "q8_0")
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_what_a_family_refuses_is_refused_before_anything_is_written(folder: Path, tmp_path: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "moe_intermediate_size": 7}))
    with pytest.raises(FileFormatError, match=r"'blk.0.ffn_gate_exps.weight' has shape"):
        convert(folder, tmp_path / "model.gguf", "q8_0")
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


# Tokenizers


def written_keys(folder: Path, tmp_path: Path) -> Tokenizer:
    convert(folder, tmp_path / "model.gguf", "f32", force=True)
    return Tokenizer.from_gguf(open_gguf(tmp_path / "model.gguf").metadata)


def with_tokenizer(conformance: Path, tmp_path: Path, name: str) -> Path:
    """A folder with a real tokenizer and a model of one layer for as many tokens."""
    source, made = conformance / "tokenizers" / name, tmp_path / name
    made.mkdir()
    for file in source.iterdir():
        target = made / file.name.removeprefix("gpt2_").removesuffix(".gz")
        if file.is_file():
            target.write_bytes(gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes())
    if name == "gpt2":
        (made / "tokenizer_config.json").write_text(
            '{"tokenizer_class": "GPT2Tokenizer", "bos_token": "<|endoftext|>"}'
        )
    rows = Tokenizer.from_folder(made).vocabulary_size + 5
    small_model(made, rows)
    return made


def small_model(path: Path, rows: int) -> None:
    from gguf_writing import safetensors_bytes

    shapes = {"model.embed_tokens.weight": (rows, 8), "model.norm.weight": (8,), "lm_head.weight": (rows, 8)}
    at = "model.layers.0."
    shapes |= {f"{at}self_attn.{part}_proj.weight": (8, 8) for part in "qkvo"}
    shapes |= {f"{at}mlp.{part}_proj.weight": (8, 8) for part in ("gate", "up", "down")}
    shapes |= {f"{at}{part}_layernorm.weight": (8,) for part in ("input", "post_attention")}
    tensors = {name: ("F32", shape, bytes(4 * int(np.prod(shape)))) for name, shape in shapes.items()}
    (path / "model.safetensors").write_bytes(safetensors_bytes(tensors))
    config = {
        "model_type": "llama", "num_hidden_layers": 1, "hidden_size": 8, "intermediate_size": 8, "vocab_size": rows,
        "num_attention_heads": 2, "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "tie_word_embeddings": False,
    }  # fmt: skip
    (path / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("name", "pre"), [("qwen2", "qwen2"), ("gpt2", "gpt-2"), ("deepseek-r1", "deepseek-v3"), ("llama2-spm", "default")]
)
def test_real_tokenizers_give_the_same_ids_from_the_file(
    name: str, pre: str, conformance: Path, tmp_path: Path
) -> None:
    source = with_tokenizer(conformance, tmp_path, name)
    written, theirs = written_keys(source, tmp_path), Tokenizer.from_folder(source)
    golden = json.loads((conformance / "tokenizers" / "golden_libllama.json").read_text())["texts"]
    blocks = (conformance / "tokenizers" / "ggml-vocab" / "ggml-vocab-llama-bpe.gguf.inp").read_text()
    for text in [*golden, *blocks.split("\n__ggml_vocab_test__\n")]:
        assert written.encode(text) == theirs.encode(text)
        assert written.encode(text, special=False, bos=False) == theirs.encode(text, special=False, bos=False)
    assert open_gguf(tmp_path / "model.gguf").metadata["tokenizer.ggml.pre"] == pre
    assert (written.bos, written.eos, written.add_bos) == (theirs.bos, theirs.eos, theirs.add_bos)
    assert written.stop >= theirs.stop


def test_a_sentencepiece_vocabulary_in_tokenizer_json_keeps_its_ids(conformance: Path, tmp_path: Path) -> None:
    """Merges by list, as transformers saves Llama's tokenizer, become scores."""
    source = with_tokenizer(conformance, tmp_path, "llama2-spm")
    engine = Tokenizer.from_folder(source).vocabulary.engine
    steps = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    engine.decoder = decoders.Sequence(steps)
    engine.save(str(source / "tokenizer.json"))
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "add_bos_token": True}
    (source / "tokenizer_config.json").write_text(json.dumps(names))
    written, theirs = written_keys(source, tmp_path), Tokenizer.from_folder(source)
    found = open_gguf(tmp_path / "model.gguf").metadata
    assert (found["tokenizer.ggml.model"], found["tokenizer.ggml.unknown_token_id"]) == ("llama", 0)
    assert found["tokenizer.ggml.token_type"][:4].tolist() == [2, 3, 3, 6]
    for text in json.loads((conformance / "tokenizers" / "golden_libllama.json").read_text())["texts"]:
        assert written.encode(text) == theirs.encode(text)
        assert written.decode(written.encode(text)) == theirs.decode(theirs.encode(text))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"cut": pre_tokenizers.ByteLevel(add_prefix_space=True)}, "with a space before all text"),
        ({"cut": pre_tokenizers.Sequence([pre_tokenizers.Whitespace(), pre_tokenizers.ByteLevel(False, True, False)])},
         "pre-tokenizer is none of those that GGUF files have names for: .*llama-bpe"),
        ({"normalise": normalizers.Lowercase()}, "normalizer Lowercase has no form"),
    ],
)  # fmt: skip
def test_a_tokenizer_that_a_file_cannot_hold_is_refused(
    changes: dict[str, Any], message: str, folder: Path, tmp_path: Path
) -> None:
    byte_level(folder, **changes)
    with pytest.raises(UnsupportedError, match=message):
        convert(folder, tmp_path / "model.gguf", "f32")


def test_more_tokens_than_rows_are_refused(folder: Path, tmp_path: Path) -> None:
    byte_level(folder, special=("<s>", "</s>", *(f"<{i}>" for i in range(200))))
    with pytest.raises(UnsupportedError, match=r"458 tokens, and the model has rows for \d+"):
        convert(folder, tmp_path / "model.gguf", "f32")


def test_every_token_that_ends_a_turn_still_does(folder: Path, tmp_path: Path) -> None:
    byte_level(folder, special=("<pad>", "<s>", "</s>", "<over>", "<out>"))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 3, 4]}))
    assert written_keys(folder, tmp_path).stop == {2, 3, 4}
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 3, 4, 9]}))
    with pytest.raises(UnsupportedError, match="more tokens end a turn than a GGUF file can name"):
        convert(folder, tmp_path / "model.gguf", "f32", force=True)


# Files


def test_a_file_becomes_one_of_another_type_with_its_keys_bit_by_bit(tmp_path: Path) -> None:
    own = {"general.name": "x", "some.bytes": Typed(9, [1, 2, 255], 0), "other.int8": Typed(1, -3), "f": Typed(12, 0.1)}
    source = qwen3moe(tmp_path / "a.gguf", **vocabulary(), **own)
    convert(source, tmp_path / "b.gguf", "q8_0")
    before, after = (gguf_file.stored_values(tmp_path / name) for name in ("a.gguf", "b.gguf"))
    assert {key: after[key] for key in before} == before
    assert open_gguf(tmp_path / "b.gguf").metadata["general.file_type"] == 7
    kept = open_gguf(source).tensors
    for name, weight in open_gguf(tmp_path / "b.gguf").tensors.items():
        delicate = "norm" in name or "gate_inp" in name
        assert weight.format.name == ("F32" if delicate else "Q8_0")
        if delicate:
            assert (weight.slabs[0] == kept[name].slabs[0]).all()
    assert relative_error(reference(tmp_path / "b.gguf"), reference(source)) < 0.1


def test_quantised_weights_are_quantised_again_only_where_that_is_allowed(tmp_path: Path) -> None:
    source = qwen3moe(tmp_path / "a.gguf", format="Q8_0")
    with pytest.raises(UnsupportedError, match=r"'token_embd.weight' is Q8_0 already; as Q4_0 .*--allow-requantize"):
        convert(source, tmp_path / "b.gguf", "q4_0")
    convert(source, tmp_path / "same.gguf", "q8_0")
    convert(source, tmp_path / "b.gguf", "f16", allow_requantize=True)
    assert open_gguf(tmp_path / "b.gguf").tensors["output.weight"].format.name == "F16"


def test_tables_of_whole_numbers_are_copied(tmp_path: Path) -> None:
    tables = [Tensor("a.weight", (2, 32), "I32", bytes(range(256))), Tensor("b.weight", (1, 32), "F32")]
    source = write_gguf(tmp_path / "a.gguf", {"general.architecture": "none"}, tables)
    convert(source, tmp_path / "b.gguf", "q8_0")
    found = open_gguf(tmp_path / "b.gguf").tensors
    assert (found["a.weight"].format.name, found["b.weight"].format.name) == ("I32", "Q8_0")
    assert found["a.weight"].slabs[0].tobytes() == bytes(range(256))


def test_parts_of_a_split_file_become_one(tmp_path: Path) -> None:
    whole = qwen3moe(tmp_path / "a.gguf")
    tensors = [
        Tensor(name, weight.shape, "F32", b"".join(s.tobytes() for s in weight.slabs))
        for name, weight in open_gguf(whole).tensors.items()
    ]
    metadata = {key: value for key, value in open_gguf(whole).metadata.items() if not isinstance(value, np.ndarray)}
    for number, part in enumerate((tensors[:9], tensors[9:])):
        place = {
            "split.no": Typed(2, number),
            "split.count": Typed(2, 2),
            "split.tensors.count": Typed(5, len(tensors)),
        }
        keys = (metadata if number == 0 else {}) | place
        write_gguf(tmp_path / f"m-{number + 1:05}-of-00002.gguf", keys, part)
    convert(tmp_path / "m-00002-of-00002.gguf", tmp_path / "one.gguf", "f32")
    assert not [key for key in gguf_file.stored_values(tmp_path / "one.gguf") if key.startswith("split")]
    assert (reference(tmp_path / "one.gguf") == reference(whole)).all()


# Places


def test_a_file_that_is_there_is_overwritten_only_with_force(tmp_path: Path) -> None:
    source, target = qwen3moe(tmp_path / "a.gguf"), tmp_path / "b.gguf"
    target.write_text("mine")
    with pytest.raises(SettingError, match=r"b\.gguf: is there already; --force overwrites it"):
        convert(source, target, "f32")
    assert target.read_text() == "mine"
    convert(source, target, "f32", force=True)
    assert (reference(target) == reference(source)).all()


@pytest.mark.parametrize("force", [False, True])
def test_the_model_itself_is_never_overwritten(force: bool, tmp_path: Path) -> None:
    source = qwen3moe(tmp_path / "a.gguf")
    (tmp_path / "same.gguf").symlink_to(source)
    for target in (source, tmp_path / "same.gguf"):
        with pytest.raises(SettingError, match="is the model itself"):
            convert(source, target, "f32", force=force)


def test_impossible_places_are_refused(tmp_path: Path) -> None:
    source = qwen3moe(tmp_path / "a.gguf")
    with pytest.raises(SettingError, match="is a folder; name the file"):
        convert(source, tmp_path, "f32", force=True)
    with pytest.raises(SettingError, match=f"there is no folder {tmp_path / 'none'}"):
        convert(source, tmp_path / "none" / "b.gguf", "f32")
    (tmp_path / "b.gguf.part").touch()
    with pytest.raises(SettingError, match=r"b\.gguf\.part: is there already, of a conversion that runs or was killed"):
        convert(source, tmp_path / "b.gguf", "f32")


def test_too_little_space_is_noticed_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = qwen3moe(tmp_path / "a.gguf")
    monkeypatch.setattr(gguf_file.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 1000))
    with pytest.raises(SettingError, match=r"too little space on the disk: \d+ kB are needed, 1 kB are free"):
        convert(source, tmp_path / "b.gguf", "f32")
    assert [path.name for path in tmp_path.iterdir()] == ["a.gguf"]


@pytest.mark.parametrize("trouble", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_full_disk_and_an_interrupt_leave_nothing_behind(
    trouble: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = qwen3moe(tmp_path / "a.gguf")
    monkeypatch.setattr(conversion, "write_padding", raising(trouble))
    with pytest.raises(type(trouble)):
        convert(source, tmp_path / "b.gguf", "q8_0")
    assert [path.name for path in tmp_path.iterdir()] == ["a.gguf"]


def raising(trouble: BaseException) -> Callable[..., None]:
    def function(*arguments: object) -> None:
        raise trouble

    return function


# On loading


@pytest.mark.parametrize("type", ["q8_0", "q4_K_M", "f32"])
def test_quantising_on_load_gives_the_files_own_bits(type: str, folder: Path, tmp_path: Path) -> None:
    convert(folder, tmp_path / "model.gguf", type)
    file = localmoe.load(tmp_path / "model.gguf", kv_format="f32", threads=2)
    loaded = localmoe.load(folder, kv_format="f32", threads=2, quantize=type)
    assert set(loaded.source.tensors) == set(file.source.tensors)
    for name, weight in file.source.tensors.items():
        other = loaded.source.tensors[name]
        assert (other.format, other.shape) == (weight.format, weight.shape)
        assert all((a == b).all() for a, b in zip(weight.slabs, other.slabs, strict=True)), name
    assert (loaded.logits(IDS) == file.logits(IDS)).all()
    assert loaded.tokenizer.encode("Hello") == file.tokenizer.encode("Hello")
    assert sum(weight.nbytes for weight in file.source.tensors.values()) == loaded.source.nbytes
    for model in (file, loaded):
        model.close()


def test_a_gguf_file_is_not_quantised_on_load(tmp_path: Path) -> None:
    with pytest.raises(SettingError, match="--quantize is for folders; of a GGUF file, localmoe convert"):
        localmoe.load(qwen3moe(tmp_path / "a.gguf"), quantize="q8_0")


def test_inspect_says_what_quantising_would_give_and_reads_no_matrix(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Quantiser, "pieces", raising(AssertionError("a matrix was encoded")))
    sections = dict(inspection.report(folder, quantize="q8_0"))
    plain = dict(inspection.report(folder))
    assert next(name for name, _ in sections["formats"]) == "Q8_0"
    assert sections["parameters"] == plain["parameters"]


def test_the_command_says_size_bits_and_seconds_and_errors_in_one_line(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def call(*words: str) -> int:
        with pytest.raises(SystemExit) as ended:
            cli.main(list(words))
        return int(ended.value.code or 0)

    target = str(tmp_path / "model.gguf")
    assert call("convert", str(folder), target, "--type", "q8_0") == 0
    assert re.search(r"model\.gguf:.*bitsperweight", re.sub(r"\s", "", capsys.readouterr().out)), "wrapped anywhere"
    assert call("convert", str(folder), target, "--type", "q8_0") == 2
    assert capsys.readouterr().err.startswith(f"localmoe: {target}: is there already")
    assert call("convert", str(folder), target, "--type", "nonsense") == 2
    assert "possible are f32, f16" in capsys.readouterr().err
