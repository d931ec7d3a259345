"""Fresh models of every family that transformers knows, as folders and as the GGUF files made of them: the same logits.

Belongs to `make oracle`, as it needs torch and transformers to make the folders.
"""

from __future__ import annotations

from pathlib import Path
from random import Random
from typing import Any

import pytest
from families import logits, relative_error
from oracle_cases import VOCABULARY
from test_oracle import ALL, TOKENS, random_model, transformers

from localmoe.conversion.convert import convert
from localmoe.errors import UnsupportedError
from localmoe.loader.locate import open_source
from localmoe.network import Network

pytestmark = pytest.mark.oracle
__all__ = ["transformers"]  # the fixture

RUNS = [(name, rope) for name, case in ALL.items() for rope in case.ropes]
# What a GGUF file of the family cannot say, and how that is told.
REFUSED = {("smollm3", "llama3"): "rope_type llama3 has no form in a GGUF file of smollm3"}


@pytest.mark.parametrize(("name", "rope"), RUNS, ids=[f"{name}-{rope}" for name, rope in RUNS])
def test_a_folder_and_the_file_made_of_it_have_the_same_logits(
    name: str, rope: str, transformers: Any, tmp_path: Path
) -> None:
    case, r = ALL[name], Random(f"{name} {rope}")
    config = getattr(transformers, f"{case.kind}Config")(**case.settings(r, rope))
    random_model(transformers, config, 0).save_pretrained(tmp_path / "folder")
    if (name, rope) in REFUSED:
        with pytest.raises(UnsupportedError, match=REFUSED[name, rope]):
            convert(tmp_path / "folder", tmp_path / "model.gguf", "f32")
        return
    convert(tmp_path / "folder", tmp_path / "model.gguf", "f32")
    ids = [r.randrange(VOCABULARY) for _ in range(TOKENS)]
    found, right = (logits(Network(open_source(tmp_path / form)), ids) for form in ("model.gguf", "folder"))
    assert relative_error(found, right) <= 1e-5
