"""Random settings of transformers' config classes for dense families; see `oracle_cases`."""

from __future__ import annotations

from oracle_cases import Case

DENSE: dict[str, Case] = {}
