"""Claims about finding models: each layout under its own names, each file once, and nothing hostile hangs or raises."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from gguf_writing import Tensor, write_gguf, write_sparse
from tiny_models import deepseek2, qwen3moe

from localmoe.discovery.catalogue import HEADER, Catalogue, record
from localmoe.discovery.description import Described, describe
from localmoe.discovery.folders import Found, Walk, label, models_below
from localmoe.discovery.names import looks_like_path, resolve
from localmoe.discovery.places import Place, models_folder, usual_places
from localmoe.discovery.search import find_models, search
from localmoe.errors import FileFormatError

HEX = "a1" * 32


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty home folder, a current folder in it, and none of the variables that name other ones."""
    for name in os.environ:
        if name.startswith(("XDG_", "HF_", "HUGGINGFACE_", "OLLAMA_", "LLAMA_", "LOCALMOE_MODELS")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    return tmp_path


def put(path: Path, text: str | bytes = b"GGUF") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def found_in(*places: Place) -> dict[str, Found]:
    return {found.name: found for found in find_models(places)}


def folder(path: Path, depth: int = 3) -> Place:
    return Place("models", path, "folder", depth)


def manifest(root: Path, where: str, digest: str = f"sha256:{HEX}", **more: Any) -> Path:
    layers = [
        {"mediaType": "application/vnd.ollama.image.template", "digest": "sha256:" + "b2" * 32, "size": 7},
        {"mediaType": "application/vnd.ollama.image.model", "digest": digest, "size": 4, **more},
    ]
    return put(root / "manifests" / where, json.dumps({"schemaVersion": 2, "layers": layers}))


# places


def test_the_usual_places_are_those_of_the_programs(home: Path) -> None:
    paths = {place.title: place.path for place in usual_places()}
    assert paths["models folder"] == home / ".local/share/localmoe/models" == models_folder()
    assert paths["Hugging Face"] == home / ".cache/huggingface/hub"
    assert paths["llama.cpp"] == home / ".cache/llama.cpp"
    assert [p.path for p in usual_places() if p.layout == "ollama"] == [
        home / ".ollama/models",
        Path("/usr/share/ollama/.ollama/models"),
    ]
    assert [p.path for p in usual_places() if p.layout == "published"] == [
        home / ".lmstudio/models",
        home / ".cache/lm-studio/models",
    ]


def test_variables_name_other_places(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("LOCALMOE_MODELS", "HF_HOME", "OLLAMA_MODELS", "LLAMA_CACHE"):
        monkeypatch.setenv(name, f"/{name}")
    paths = [str(place.path) for place in usual_places()]
    assert {"/LOCALMOE_MODELS", "/HF_HOME/hub", "/OLLAMA_MODELS", "/LLAMA_CACHE"} <= set(paths)
    monkeypatch.setenv("HF_HUB_CACHE", "/hub")
    assert Path("/hub") in [place.path for place in usual_places()]


def test_lm_studio_may_have_moved(home: Path) -> None:
    put(home / ".lmstudio-home-pointer", f"{home}/studio\n")
    put(home / "studio/settings.json", json.dumps({"downloadsFolder": f"{home}/elsewhere"}))
    put(home / ".lmstudio/settings.json", '{"downloadsFolder": ["no", "text"]}')
    paths = [place.path for place in usual_places() if place.layout == "published"]
    assert paths[:2] == [home / "elsewhere", home / "studio/models"]


# layouts


def test_files_and_folders_go_by_their_names(tmp_path: Path) -> None:
    put(tmp_path / "a.gguf")
    put(tmp_path / "deep/er/b.GGUF")
    put(tmp_path / "one/two/three/c.gguf")
    put(tmp_path / ".hidden/d.gguf")
    put(tmp_path / "hf/config.json", "{}")
    put(tmp_path / "hf/model.safetensors", bytes(10))
    put(tmp_path / "mistral/params.json", "{}")
    put(tmp_path / "mistral/consolidated.safetensors", bytes(10))
    put(tmp_path / "adapter/adapter_config.json", "{}")
    put(tmp_path / "adapter/adapter_model.safetensors", bytes(10))
    found = found_in(folder(tmp_path))
    assert sorted(found) == ["a", "b", "hf", "mistral"]
    assert found["hf"].path == tmp_path / "hf" and found["hf"].nbytes == 10


def test_what_is_no_model_by_its_name_is_left_out(tmp_path: Path) -> None:
    for name in (
        "mmproj-model-f16.gguf", "x.mmproj.gguf", "imatrix.gguf", "x.imatrix.gguf", "ggml-vocab-llama-bpe.gguf",
        "x.gguf.part", "x.gguf.incomplete", "x.gguf.etag", "readme.txt",
    ):  # fmt: skip
        put(tmp_path / name)
    put(tmp_path / "empty.gguf", b"")
    assert find_models([folder(tmp_path)]) == []


def test_a_split_model_is_one_and_says_what_is_missing(tmp_path: Path) -> None:
    for number in (1, 2, 3):
        put(tmp_path / f"whole-{number:05}-of-00003.gguf", bytes(number))
    put(tmp_path / "half-00002-of-00003.gguf", bytes(5))
    found = found_in(folder(tmp_path))
    assert (found["whole"].nbytes, found["whole"].note) == (6, "")
    assert found["whole"].path.name == "whole-00001-of-00003.gguf"
    assert found["half"].note == "2 of 3 parts are missing"


def test_the_hubs_cache(home: Path) -> None:
    hub = home / ".cache/huggingface/hub"
    repository = hub / "models--bart--Tiny-GGUF"
    blob = put(repository / "blobs" / HEX)
    put(repository / "blobs" / f"{HEX}.incomplete", bytes(9))
    put(repository / "refs/main", "new\n")
    for revision in ("old", "new"):
        (repository / "snapshots" / revision).mkdir(parents=True)
    (repository / "snapshots/new/Tiny-Q4_K_M.gguf").symlink_to(f"../../blobs/{HEX}")
    (repository / "snapshots/new/gone-Q8_0.gguf").symlink_to("../../blobs/none")
    put(repository / "snapshots/old/Tiny-Q4_K_M.gguf", b"older")
    put(repository / "snapshots/old/Q8_0/Tiny-Q8_0-00001-of-00002.gguf", bytes(3))
    put(hub / "models--org--whole/snapshots/r/config.json", "{}")
    put(hub / "models--org--whole/snapshots/r/model.safetensors", bytes(8))
    put(hub / "models--org--whole/snapshots/r/vision/config.json", "{}")
    put(hub / "models--org--whole/snapshots/r/vision/model.safetensors", bytes(8))
    put(hub / "models--gpt2/snapshots/r/gpt2.gguf", bytes(6))
    put(hub / "datasets--org--text/snapshots/r/x.gguf")
    found = {f.name: f for f in find_models() if f.origin == "Hugging Face"}
    assert sorted(found) == [
        "bart/Tiny-GGUF:Q4_K_M",
        "bart/Tiny-GGUF:Q8_0",
        "gpt2:gpt2",
        "org/whole",
        "org/whole/vision",
    ]
    assert found["bart/Tiny-GGUF:Q4_K_M"].path.resolve() == blob
    assert found["bart/Tiny-GGUF:Q8_0"].note == "1 of 2 parts are missing"


def test_ollamas_manifests(home: Path) -> None:
    root = home / ".ollama/models"
    blob = put(root / f"blobs/sha256-{HEX}")
    other = put(root / f"blobs/sha256:{'c3' * 32}", bytes(2))
    manifest(root, "registry.ollama.ai/library/llama3.2/3b")
    manifest(root, "registry.ollama.ai/library/llama3.2/latest")
    manifest(root, "registry.ollama.ai/someone/mine/latest", f"sha256-{'c3' * 32}")
    manifest(root, "hf.co/bart/Tiny-GGUF/Q4_K_M", f"sha256-{'d4' * 32}")
    put(root / f"blobs/sha256-{'d4' * 32}", bytes(4))
    (found, mine) = [f for f in find_models() if f.path in (blob, other)]
    assert found.name == "llama3.2:3b"
    assert {"llama3.2", "llama3.2:latest", "library/llama3.2:3b"} <= found.names
    assert mine.name == "someone/mine:latest" and mine.note == "2 of 4 bytes are there"
    assert resolve("llama3.2") == resolve("llama3.2:3b") == resolve("llama3.2:latest") == blob
    assert resolve("hf.co/bart/Tiny-GGUF:Q4_K_M").name == f"sha256-{'d4' * 32}"


def test_lm_studio_and_llama_cpp(home: Path) -> None:
    put(home / ".lmstudio/models/pub/Repo-GGUF/Model-IQ2_XXS.gguf", b"1")
    put(home / ".cache/llama.cpp/org_Model-GGUF_Model-Q8_0.gguf", b"2")
    put(home / ".cache/llama.cpp/org_Model-GGUF_mmproj-Model.gguf", b"3")
    put(home / ".cache/llama.cpp/manifest=org=Model-GGUF=latest.json", "{}")
    put(home / ".cache/llama.cpp/models--new--Model/snapshots/r/Model-Q6_K.gguf", b"4")
    names = [found.name for found in find_models()]
    assert names[-3:] == ["pub/Repo-GGUF:IQ2_XXS", "org/Model-GGUF:Q8_0", "new/Model:Q6_K"]


def test_the_same_file_is_listed_once_and_goes_by_both_names(tmp_path: Path) -> None:
    own = put(tmp_path / "a/own.gguf")
    (tmp_path / "b").mkdir()
    (tmp_path / "b/linked.gguf").symlink_to(own)
    os.link(own, tmp_path / "b/hard.gguf")
    places = [folder(tmp_path / "a"), folder(tmp_path / "b")]
    (found,) = find_models(places)
    assert found.name == "own"
    assert resolve("linked", places) == resolve("hard.gguf", places) == own


@pytest.mark.parametrize(
    ("stem", "found"),
    [
        ("Llama-3.2-3B-Instruct-Q4_K_M", "Q4_K_M"), ("model.IQ2_XXS", "IQ2_XXS"), ("Qwen3-UD-Q4_K_XL", "UD-Q4_K_XL"),
        ("gpt-oss-20b-mxfp4", "MXFP4"), ("tiny-f16", "F16"), ("llama-7b", ""), ("deepseek-v3", ""),
    ],
)  # fmt: skip
def test_a_files_name_says_its_quantisation(stem: str, found: str) -> None:
    assert label(stem) == found


# hostile folders


def test_circles_of_links_end(tmp_path: Path) -> None:
    put(tmp_path / "a/model.gguf")
    (tmp_path / "b").mkdir()
    for number in range(3):
        (tmp_path / f"a/again{number}").symlink_to(tmp_path)
        (tmp_path / f"b/again{number}").symlink_to(tmp_path / "a")
    (tmp_path / "a/self").symlink_to(tmp_path / "a/self")
    (tmp_path / "self.gguf").symlink_to(tmp_path / "self.gguf")
    walk = Walk([], 100)
    assert [model.name for model in models_below(walk, tmp_path, "models", 50)] == ["model"]
    assert (walk.notes, walk.left) == ([], 100 - 3 - 5 - 3)  # entries of three folders, each entered once


def test_pipes_and_devices_are_not_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    os.mkfifo(tmp_path / "pipe.gguf")
    (tmp_path / "null.gguf").symlink_to("/dev/zero")
    (tmp_path / "folder.gguf").mkdir()
    root = tmp_path / "ollama"
    manifest(root, "registry.ollama.ai/library/m/latest")
    (root / "blobs").mkdir()
    os.mkfifo(root / f"blobs/sha256-{HEX}")
    (root / "manifests/registry.ollama.ai/library/p").mkdir()
    os.mkfifo(root / "manifests/registry.ollama.ai/library/p/latest")
    assert find_models([folder(tmp_path), Place("ollama", root, "ollama")]) == []


@pytest.mark.parametrize(
    "text",
    [
        "not JSON", "[1]", '{"layers": 3}', '{"layers": [3, null]}', "{}",
        '{"layers": [{"mediaType": 1, "digest": 2}]}', '{"layers": ' + "[" * 100_000, "\xff\xfe",
    ],
)  # fmt: skip
def test_a_manifest_that_is_none_is_passed_over(tmp_path: Path, text: str) -> None:
    put(tmp_path / "manifests/registry.ollama.ai/library/m/latest", text)
    put(tmp_path / f"blobs/sha256-{HEX}")
    assert find_models([Place("ollama", tmp_path, "ollama")]) == []


@pytest.mark.parametrize(
    "digest", ["sha256:../../secret", "../secret.gguf", "/etc/passwd", f"sha256:{HEX}/../x", f"sha256:{HEX}\n", "", HEX]
)
def test_a_digest_leads_nowhere_else(tmp_path: Path, digest: str) -> None:
    put(tmp_path / "secret.gguf")
    manifest(tmp_path / "ollama", "registry.ollama.ai/library/m/latest", digest)
    put(tmp_path / f"ollama/blobs/sha256-{HEX}")
    assert find_models([Place("ollama", tmp_path / "ollama", "ollama")]) == []


def test_huge_json_is_not_read(tmp_path: Path) -> None:
    path = manifest(tmp_path, "registry.ollama.ai/library/m/latest")
    put(tmp_path / f"blobs/sha256-{HEX}")
    path.write_text(path.read_text() + " " * (1 << 20))
    assert find_models([Place("ollama", tmp_path, "ollama")]) == []


def test_thousands_of_files_are_not_all_looked_at(tmp_path: Path) -> None:
    for number in range(300):
        put(tmp_path / f"{number:03}.gguf")
    found = search([Place("models", tmp_path, "folder", entries=100)])
    assert len(found.models) == 100
    assert found.notes == [f"{tmp_path}: not searched to its end: too many files"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_a_folder_that_cannot_be_read_is_noted(tmp_path: Path) -> None:
    put(tmp_path / "good.gguf")
    (tmp_path / "closed").mkdir(mode=0)
    found = search([folder(tmp_path)])
    assert [model.name for model in found.models] == ["good"]
    assert found.notes == [f"{tmp_path}/closed: cannot be read (Permission denied)"]


def test_names_with_control_characters_are_found_and_not_completed(tmp_path: Path) -> None:
    put(tmp_path / "bad\x1b[2Jname.gguf")
    put(tmp_path / os.fsdecode(b"bytes\xff.gguf"), b"x")
    put(tmp_path / "good.gguf", b"y")
    catalogue = Catalogue([folder(tmp_path)])
    assert len(catalogue.search().models) == 3
    assert catalogue.names() == ["good"]


def test_places_that_are_files_or_not_there_hold_nothing(tmp_path: Path) -> None:
    for layout in ("folder", "published", "Hugging Face", "ollama", "llama.cpp"):
        for path in (tmp_path / "none", put(tmp_path / "file"), Path("bad\0name")):
            assert find_models([Place("x", path, layout)]) == []  # type: ignore[arg-type]


# names


@pytest.fixture
def three(tmp_path: Path) -> list[Place]:
    for name in ("Alpha-7B-Q4_K_M.gguf", "Alpha-7B-Q8_0.gguf", "beta.gguf"):
        put(tmp_path / "store" / name, name)
    return [folder(tmp_path / "store")]


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("beta", "beta.gguf"),
        ("beta.gguf", "beta.gguf"),
        ("BETA", "beta.gguf"),
        ("be", "beta.gguf"),
        ("alpha-7b-q4_k_m", "Alpha-7B-Q4_K_M.gguf"),
        ("q8", "Alpha-7B-Q8_0.gguf"),
    ],
)
def test_a_name_its_beginning_or_a_part_of_it(three: list[Place], name: str, file: str) -> None:
    assert resolve(name, three).name == file


def test_a_whole_name_goes_before_the_beginning_of_another(three: list[Place]) -> None:
    put(three[0].path / "Beta-2.gguf", "2")
    assert resolve("BETA", three).name == "beta.gguf"
    with pytest.raises(FileFormatError, match="2 models"):
        resolve("bet", three)


def test_what_exists_wins(three: list[Place], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    put(tmp_path / "beta", "a file of that name")
    assert resolve("beta", three) == Path("beta")
    os.mkfifo(tmp_path / "be")
    assert resolve("be", three) == Path("be")


def test_several_or_none_are_told_with_their_names(three: list[Place]) -> None:
    with pytest.raises(FileFormatError, match="'alpha' may be any of 2 models: 'Alpha-7B-Q4_K_M', 'Alpha-7B-Q8_0'"):
        resolve("alpha", three)
    with pytest.raises(FileFormatError, match=r"'betta' is neither a file nor a model .* the nearest are 'beta'$"):
        resolve("betta", three)
    with pytest.raises(FileFormatError, match="the nearest are 'Alpha-7B-Q"):
        resolve("alfa-7b", three)
    with pytest.raises(FileFormatError, match="`localmoe models` lists"):
        resolve("zzzz", three)


def test_two_models_of_one_name_are_told_by_their_paths(tmp_path: Path) -> None:
    put(tmp_path / "a/same.gguf", "1")
    put(tmp_path / "b/same.gguf", "2")
    with pytest.raises(FileFormatError, match=r"a/same\.gguf', .*b/same\.gguf'"):
        resolve("same", [folder(tmp_path)])
    assert Catalogue([folder(tmp_path)]).names() == [f"{tmp_path}/a/same.gguf", f"{tmp_path}/b/same.gguf"]
    deep = tmp_path / ("long" * 40)
    put(deep / "a/same.gguf", "1")
    put(deep / "b/same.gguf", "2")
    with pytest.raises(FileFormatError, match=r"'….*a/same\.gguf', '….*b/same\.gguf'"):
        resolve("same", [folder(deep)])


def test_a_path_that_leads_nowhere_is_left_to_opening_unless_its_name_is_known(three: list[Place]) -> None:
    assert resolve("gamma.gguf", three) == Path("gamma.gguf")
    assert resolve("./dir/", three) == Path("dir")
    with pytest.raises(
        FileFormatError, match=r"^dir/beta\.gguf: no such file; '.*store/beta\.gguf' is a model of that"
    ):
        resolve("dir/beta.gguf", three)


@pytest.mark.parametrize("name", ["", " ", "a\0b", "\x1b[2J", "x" * 5000, "\udcff"])
def test_no_name_is_too_strange(three: list[Place], name: str) -> None:
    told = ""
    try:
        resolve(name, three)
    except FileFormatError as error:
        told = str(error)
    assert len(told) < 300 and (told.isprintable() or not told)


def test_the_hubs_names(tmp_path: Path) -> None:
    put(tmp_path / "models--org--Name-GGUF/snapshots/r/Name-Q4_0.gguf", "1")
    places = [Place("hub", tmp_path, "Hugging Face")]
    for name in ("org/Name-GGUF", "org/name-gguf:q4_0", "Name-GGUF", "Name-GGUF:Q4_0", "Name-Q4_0.gguf", "Name-Q4_0"):
        assert resolve(name, places).name == "Name-Q4_0.gguf"
    put(tmp_path / "models--org--Name-GGUF/snapshots/r/Name-Q8_0.gguf", "2")
    assert resolve("org/Name-GGUF:Q8_0", places).name == "Name-Q8_0.gguf"
    with pytest.raises(FileFormatError, match="'org/Name-GGUF:Q4_0', 'org/Name-GGUF:Q8_0'"):
        resolve("org/Name-GGUF", places)


def test_names_that_are_paths() -> None:
    assert all(map(looks_like_path, ("a.gguf", "./a", "~/a", "/a", "a/", "a.json", "a/b/c", "A.GGUF")))
    assert not any(map(looks_like_path, ("a", "org/name", "llama3.2:3b", "hf.co/org/name:Q4_0", "org/name:Q4")))


# descriptions


def described(path: Path) -> Described:
    (found,) = [f for f in find_models([folder(path.parent)]) if f.path == path]
    return describe(found)


def test_a_model_is_described_from_its_header(tmp_path: Path) -> None:
    entry = described(qwen3moe(tmp_path / "m.gguf", format="Q8_0"))
    assert (entry.kind, entry.architecture, entry.quantisation, entry.why) == ("model", "qwen3moe", "Q8_0", "")
    assert (entry.parameters, entry.active) == (132_736, 132_736 - 2 * 4 * 3 * 32 * 64)
    assert entry.needs and entry.least and entry.least < entry.needs


def test_the_files_own_word_for_its_quantisation_goes_first(tmp_path: Path) -> None:
    assert described(deepseek2(tmp_path / "m.gguf", **{"general.file_type": 15})).quantisation == "Q4_K_M"
    assert described(deepseek2(tmp_path / "n.gguf", **{"general.file_type": 999})).quantisation == "F32"


def test_whether_it_fits(tmp_path: Path) -> None:
    entry = described(qwen3moe(tmp_path / "m.gguf"))
    assert entry.needs and entry.least
    assert entry.fits(2 * entry.needs) == "fits"
    assert entry.fits((entry.needs + entry.least) // 2 * 10 // 9) == "slots"
    assert entry.fits(entry.least) == entry.fits(1000) == "too large"
    assert entry.verdict(1000).startswith("does not fit: ")


@pytest.mark.parametrize(
    ("keys", "kind"),
    [
        ({"general.type": "adapter", "general.architecture": "llama"}, "adapter"),
        ({"general.type": "imatrix"}, "importance matrix"),
        ({"general.type": "mmproj", "general.architecture": "clip"}, "projector"),
        ({"general.architecture": "clip"}, "projector"),
        ({"general.architecture": "bert"}, "embedding"),
        ({"general.architecture": "qwen3", "qwen3.pooling_type": 3}, "embedding"),
        ({"general.architecture": "mamba"}, "unsupported"),
        ({"general.architecture": "llama"}, "broken"),
        ({"general.architecture": 7}, "broken"),
        ({}, "broken"),
    ],
)
def test_what_is_no_model_is_told_apart(tmp_path: Path, keys: dict[str, Any], kind: str) -> None:
    entry = described(write_gguf(tmp_path / "m.gguf", keys, [Tensor("x.weight", (4, 32))]))
    assert entry.kind == kind
    assert entry.verdict(1 << 40)


def test_a_vocabulary_alone_and_broken_files(tmp_path: Path) -> None:
    assert described(write_gguf(tmp_path / "v.gguf", {"general.architecture": "llama"})).kind == "vocabulary"
    whole = qwen3moe(tmp_path / "whole.gguf").read_bytes()
    for number, cut in enumerate((1, 4, 20, 100, 1000, len(whole) - 1)):
        entry = described(put(tmp_path / f"cut{number}.gguf", whole[:cut]))
        assert entry.kind == "broken" and entry.why and "\n" not in entry.why
    assert described(put(tmp_path / "text.gguf", "hello")).kind == "broken"


def test_an_unknown_architecture_is_counted_and_an_enormous_one_costs_nothing(tmp_path: Path) -> None:
    tensors = [Tensor("a.weight", (1 << 14, 1 << 14), "Q8_0"), Tensor("b.weight", (32, 32))]
    path = write_sparse(tmp_path / "m.gguf", {"general.architecture": "mamba"}, tensors)
    entry = described(path)
    assert (entry.kind, entry.parameters, entry.quantisation) == ("unsupported", (1 << 28) + 1024, "Q8_0")
    assert "architecture 'mamba' is not supported" in entry.why


def test_a_folder_is_described(tmp_path: Path) -> None:
    put(tmp_path / "hf/config.json", '{"model_type": "t5"}')
    put(tmp_path / "hf/model.safetensors", bytes(8))
    (found,) = find_models([folder(tmp_path)])
    assert describe(found).kind in ("unsupported", "broken")


# the list


@pytest.fixture
def listed_models(tmp_path: Path) -> Catalogue:
    qwen3moe(tmp_path / "whole.gguf", format="Q8_0")
    put(tmp_path / "text.gguf", "hello")
    write_gguf(tmp_path / "vectors.gguf", {"general.architecture": "bert"}, [Tensor("x.weight", (4, 32))])
    return Catalogue([folder(tmp_path)])


def test_rows_for_a_wide_and_a_narrow_screen(listed_models: Catalogue, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("localmoe.discovery.catalogue.available_nbytes", lambda: 1 << 40)
    header, rows, remarks = listed_models.rows(80)
    assert header == HEADER
    assert rows == [("whole", "151 kB", "Q8_0", "132,736/83,584", "fits"), ("text", "5 B", "", "", "broken")]
    assert remarks[0].startswith("text: ") and remarks[1:] == ["left out: 1 of kind embedding"]
    header, rows, _ = listed_models.rows(40)
    assert header == ()
    assert rows == [("whole",), ("  151 kB, Q8_0, 132,736/83,584, fits",), ("text",), ("  5 B, broken",)]


def test_it_is_looked_for_again_after_some_seconds(tmp_path: Path) -> None:
    now = [0.0]
    catalogue = Catalogue([folder(tmp_path)], lambda: now[0])
    assert catalogue.names() == []
    put(tmp_path / "new.gguf")
    assert catalogue.names() == []
    now[0] = 6.0
    assert catalogue.names() == ["new"]


def test_a_header_is_read_again_only_when_the_file_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = qwen3moe(tmp_path / "m.gguf")
    calls: list[Path] = []
    monkeypatch.setattr(
        "localmoe.discovery.catalogue.describe", lambda found: calls.append(found.path) or describe(found)
    )
    now = [0.0]
    catalogue = Catalogue([folder(tmp_path)], lambda: now[0])
    catalogue.described()
    catalogue.described()
    assert len(calls) == 1
    os.utime(path, ns=(1, 1))
    assert len(catalogue.described()) == 1 and len(calls) == 2


def test_a_record_for_programs_is_json(listed_models: Catalogue) -> None:
    text = json.dumps([record(d, listed_models.title(d.found), 1 << 40) for d in listed_models.described()])
    whole = {entry["name"]: entry for entry in json.loads(text)}["whole"]
    assert (whole["kind"], whole["memory"], whole["parameters"], whole["why"]) == ("model", "fits", 132_736, None)
