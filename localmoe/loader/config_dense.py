"""config.json and tensors of dense families under GGUF's keys and names; see `config_json.Family`."""

from __future__ import annotations

from localmoe.loader.config_json import Family

DENSE: dict[str, Family] = {}
