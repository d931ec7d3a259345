"""docs/models.md says what the tests verified: how claims add up, and what the page and its check say of gaps."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from verified import added_up, write

from localmoe.arch.table import FAMILIES

CLAIM = {
    "architecture": "llama", "form": "folder", "formats": ["F16"], "witness": "transformers", "of": "Llama",
    "error": 1e-6, "cases": 1,
}  # fmt: skip


@pytest.fixture(scope="module")
def page() -> ModuleType:
    script = Path(__file__).resolve().parent.parent / "docs" / "make_models.py"
    spec = importlib.util.spec_from_file_location("make_models", script)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def notes() -> dict[str, Any]:
    return {"models": dict.fromkeys(FAMILIES, "some"), "stand_ins": {}, "differs": {"llama": "It does."}}


def test_claims_of_one_kind_add_up_to_the_largest_error_and_all_formats() -> None:
    (one,) = added_up([CLAIM, {**CLAIM, "error": 3e-6, "formats": ["BF16"]}])
    assert (one["error"], one["formats"], one["cases"]) == (3e-6, ["BF16", "F16"], 2)
    assert len(added_up([CLAIM, {**CLAIM, "form": "gguf"}, {**CLAIM, "witness": "llama.cpp"}])) == 3


def test_a_run_replaces_its_own_kinds_and_leaves_the_others(tmp_path: Path) -> None:
    path = tmp_path / "models.json"
    write(path, [CLAIM, {**CLAIM, "witness": "llama.cpp", "error": 0.25}])
    write(path, [{**CLAIM, "error": 2.04e-6}, {**CLAIM, "error": 1e-7}])
    found = {one["witness"]: (one["error"], one["cases"]) for one in json.loads(path.read_text())}
    assert found == {"llama.cpp": (0.25, 1), "transformers": (2.0e-6, 2)}


def test_a_family_without_a_record_shows_as_not_verified_and_is_a_trouble(page: ModuleType) -> None:
    made = page.text([CLAIM], notes())
    assert "| `llama` | some | transformers: Llama | folder (F16) | 1 | 1.0e-06 |" in made
    assert "| `qwen2` | some | not verified |" in made
    assert "- `llama`: It does." in made
    found = page.troubles([CLAIM], notes())
    assert "docs/models.json: qwen2 is not verified: run make models" in found
    assert len(found) == len(FAMILIES) - 1


def test_a_record_or_a_note_of_no_family_and_a_family_without_a_note_are_troubles(page: ModuleType) -> None:
    claims = [{**CLAIM, "architecture": name} for name in (*FAMILIES, "unheard-of")]
    written = notes()
    del written["models"]["gpt2"]
    written["differs"]["nobody"] = "?"
    assert page.troubles(claims, written) == [
        "docs/models.json: unheard-of is no family",
        "docs/families.toml: [models] lacks gpt2",
        "docs/families.toml: nobody is no family",
    ]
