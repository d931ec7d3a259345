"""Random settings of transformers' config classes for Mixture-of-Experts families; see `oracle_cases`."""

from __future__ import annotations

from oracle_cases import Case

MIXTURES: dict[str, Case] = {}
