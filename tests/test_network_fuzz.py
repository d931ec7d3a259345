"""Metadata that contradicts itself or the tensors ends as one clear error before anything large is allocated."""

from __future__ import annotations

import math
import tracemalloc
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from registry import MODELS, written

from localmoe.errors import LocalMoeError
from localmoe.loader.locate import bundled, open_source
from localmoe.loader.source import Source
from localmoe.network import Network

INTEGERS = (0, 1, 2, 3, 5, 7, 255, 65537, 2**31 - 1, 2**31, 2**63, -1)
FLOATS = (0.0, -1.0, 1e-30, 1e30, math.inf, math.nan)
OTHERS = (True, "", "yarn", "x" * 1000, [], [1, 2, 3], np.arange(9), None)


def mutations(source: Source) -> list[tuple[str, object]]:
    """Every key of the architecture with every value of its own kind, and some of other kinds."""
    prefix = str(source.metadata["general.architecture"]) + "."
    found: list[tuple[str, object]] = []
    for key, value in source.metadata.items():
        if key.startswith(prefix):
            same = FLOATS if isinstance(value, float) else INTEGERS
            found += [(key, other) for other in (*same, *OTHERS)]
    return found


def assert_refused_or_sound(source: Source, key: str, value: object) -> bool:
    """True when the file was refused; any exception but LocalMoeError is the failure this test is for."""
    tracemalloc.start()
    try:
        Network(replace(source, metadata={**source.metadata, key: value}))
    except LocalMoeError as error:
        message = str(error)
        if len(message.splitlines()) != 1 or len(message) > 600:
            pytest.fail(f"{key} = {value!r}: {message}")
        return True
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 64 << 20, (key, value, peak)
    return False


def run_all(source: Source, step: int) -> None:
    cases = mutations(source)[::step]
    refused = sum(assert_refused_or_sound(source, key, value) for key, value in cases)
    assert refused > len(cases) // 3, "mutations should mostly be refused: is the metadata read at all?"


def test_mutated_metadata_of_the_bundled_model_is_refused_or_sound() -> None:
    run_all(open_source(bundled()), 5)


@pytest.mark.parametrize("folder", ["deepseek-v3-yarn", "mixtral", "llama3-rope", "qwen2-moe", "qwen3-moe", "olmoe"])
def test_mutated_metadata_of_a_folder_is_refused_or_sound(conformance: Path, folder: str) -> None:
    run_all(open_source(conformance / "logits" / folder), 3)


@pytest.mark.parametrize("name", MODELS)
def test_mutated_metadata_of_every_family_is_refused_or_sound(name: str, tmp_path: Path) -> None:
    run_all(open_source(written(MODELS[name](), tmp_path / "tiny.gguf")), 13)


@pytest.mark.conformance
@pytest.mark.parametrize("name", MODELS)
def test_every_mutation_of_every_family(name: str, tmp_path: Path) -> None:
    run_all(open_source(written(MODELS[name](), tmp_path / "tiny.gguf")), 1)


@pytest.mark.conformance
def test_every_mutation_of_every_folder(conformance: Path) -> None:
    run_all(open_source(bundled()), 1)
    for folder in sorted((conformance / "logits").iterdir()):
        run_all(open_source(folder), 1)
