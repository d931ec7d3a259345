"""What a test that agreed with independent software says of it, and how such claims add up; knows no family.

A test hands `claim(…)` to pytest's `record_property` under the name "verified"; `conftest.py` collects them where
$LOCALMOE_RECORD names a file, from which docs/make_models.py makes docs/models.md.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from localmoe.network import Network

NAME = "verified"
Claim = dict[str, Any]


def claim(network: Network, witness: str, of: str, error: float) -> Claim:
    """`of` is what of the witness was compared; `error` in parts of the largest right value."""
    formats = sorted({weight.format.name for weight in network.source.tensors.values() if len(weight.shape) > 1})
    return {
        "architecture": network.metadata.architecture, "form": network.source.kind, "formats": formats,
        "witness": witness, "of": of, "error": error, "cases": 1,
    }  # fmt: skip


def added_up(claims: Iterable[Claim]) -> list[Claim]:
    """One for each architecture, form, witness and part of it: the largest error, all formats, the number of cases."""
    found: dict[tuple[str, ...], Claim] = {}
    for one in claims:
        kept = found.setdefault(key(one), {**one, "error": 0.0, "cases": 0, "formats": []})
        kept["error"] = max(kept["error"], one["error"])
        kept["cases"] += one["cases"]
        kept["formats"] = sorted({*kept["formats"], *one["formats"]})
    return [found[name] for name in sorted(found)]


def key(one: Claim) -> tuple[str, ...]:
    return one["architecture"], one["witness"], one["of"], one["form"]


def write(path: Path, claims: Iterable[Claim]) -> None:
    """Claims of an earlier run stay where this one has none of their kind."""
    new = added_up(claims)
    old = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
    known = {key(one) for one in new}
    kept = sorted([*new, *(one for one in old if key(one) not in known)], key=key)
    lines = ",\n".join(json.dumps({**one, "error": float(f"{one['error']:.1e}")}) for one in kept)
    path.write_text(f"[\n{lines}\n]\n", encoding="utf-8")
