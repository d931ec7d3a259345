"""Mistral's tekken.json: a list of byte strings by rank becomes pieces and merges; knows no engine.

Source: mistral_common's Tekkenizer. Special tokens come first; a token's id is its rank plus their number. Of all
neighbours those whose union has the lowest rank are merged first, as in tiktoken.
"""

from __future__ import annotations

from base64 import b64decode
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from localmoe.errors import FileFormatError
from localmoe.pretokenizers import byte_alphabet

LONGEST_TOKEN = 1024
TOKEN_LIMIT = 1 << 21
# Where the file does not name them (before version 7 of the tokenizer).
SPECIAL = (
    "<unk> <s> </s> [INST] [/INST] [AVAILABLE_TOOLS] [/AVAILABLE_TOOLS] [TOOL_RESULTS] [/TOOL_RESULTS] [TOOL_CALLS] "
    "[IMG] <pad> [IMG_BREAK] [IMG_END] [PREFIX] [MIDDLE] [SUFFIX] [SYSTEM_PROMPT] [/SYSTEM_PROMPT] [TOOL_CONTENT]"
).split()


@dataclass(frozen=True, slots=True)
class Tekken:
    """`pieces` by token id, ordinary ones in GPT-2's byte alphabet; the first `special` are control tokens."""

    pieces: list[str]
    special: int
    merges: list[tuple[str, str]]
    pattern: str


def read_tekken(found: Mapping[str, Any], name: str) -> Tekken:
    """Raises FileFormatError naming what is broken; KeyError, TypeError or ValueError where the JSON is another."""
    config = found["config"]
    size, special, pattern = config["default_vocab_size"], config["default_num_special_tokens"], config["pattern"]
    if type(size) is not int or type(special) is not int or not 0 <= special < size <= TOKEN_LIMIT:
        raise FileFormatError(f"{name}: {special} special tokens of {size}, expected fewer than all")
    ranked = found["vocab"][: size - special]
    tokens = [b64decode(entry["token_bytes"], validate=True) for entry in ranked]
    if any(entry["rank"] != rank for rank, entry in enumerate(ranked)):
        raise FileFormatError(f"{name}: the ranks of its tokens are not 0, 1, 2 and so on")
    if (longest := max(map(len, tokens), default=0)) > LONGEST_TOKEN:
        raise FileFormatError(f"{name}: a token of {longest} bytes, expected at most {LONGEST_TOKEN}")
    named = [f"<SPECIAL_{id}>" for id in range(special)]
    listed = found.get("special_tokens") or [{"rank": id, "token_str": text} for id, text in enumerate(SPECIAL)]
    for entry in listed:
        if 0 <= entry["rank"] < special:
            named[entry["rank"]] = str(entry["token_str"])
    letter = {byte[0]: character for character, byte in byte_alphabet().items()}
    spelt = {token: "".join(letter[byte] for byte in token) for token in tokens}
    return Tekken([*named, *(spelt[token] for token in tokens)], special, _merges(spelt), str(pattern))


def _merges(spelt: Mapping[bytes, str]) -> list[tuple[str, str]]:
    """Every pair of tokens that makes a third one, by its rank, then by those of left and right."""
    rank = {token: number for number, token in enumerate(spelt)}
    merges: list[tuple[str, str]] = []
    for token in spelt:
        halves = [(token[:cut], token[cut:]) for cut in range(1, len(token))]
        pairs = sorted((rank[a], rank[b], spelt[a], spelt[b]) for a, b in halves if a in rank and b in rank)
        merges += [(a, b) for _, _, a, b in pairs]
    return merges
