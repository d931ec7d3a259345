"""Tokenizers made up for a template: bytes, and as control tokens whatever the template writes that looks like one."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from tiny_models import byte_alphabet

from localmoe.tokenizer import Tokenizer

MARKERS = re.compile(
    r"<\|[^|<>\s'\"+~{}]{1,60}\|>|<\uff5c[^\uff5c<>'\"]{1,60}\uff5c>|</?[|]?[A-Za-z_][A-Za-z0-9_:]{0,30}[|]?>|"
    r"\[/?[A-Z][A-Za-z_]{1,30}\]|\[gMASK\]"
)


def byte_tokenizer(control: Iterable[str], *, normal: Iterable[str] = (), **keys: Any) -> Tokenizer:
    """Bytes, then `control` tokens, then `normal` ones; `keys` are those of tokenizer.ggml, `bos` and `eos` by text."""
    control, normal = list(dict.fromkeys(control)), list(normal)
    tokens = [*byte_alphabet(), *control, *normal]
    ids = {f"{name}_token_id": tokens.index(keys.pop(name)) for name in ("bos", "eos") if name in keys}
    values = {
        "model": "gpt2",
        "pre": "gpt-2",
        "tokens": tokens,
        "token_type": [1] * 256 + [3] * len(control) + [4] * len(normal),
        "merges": [],
        "add_bos_token": False,
        **ids,
        **keys,
    }
    return Tokenizer.from_gguf({f"tokenizer.ggml.{name}": value for name, value in values.items()})


def fitting_tokenizer(source: str, text: str = "", **keys: Any) -> Tokenizer:
    """A vocabulary with all markers of a template's source and of a `text` that it rendered."""
    named = {"bos": "<BOS>", "eos": "<EOS>", **keys}
    return byte_tokenizer([named["bos"], named["eos"], *MARKERS.findall(source), *MARKERS.findall(text)], **named)
