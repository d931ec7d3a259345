"""A folder's tokenizer as the `tokenizer.ggml` keys of a GGUF file, tried on difficult text before it is believed.

Names of keys and kinds of tokens are llama.cpp's (its conversion/base.py and gguf-py's vocab.py).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from localmoe.errors import LocalMoeError, UnsupportedError
from localmoe.loader.source import listed, shown
from localmoe.pretokenizers import PRETOKENIZERS, Pretokenizer
from localmoe.tokenizer import END_OF_TURN, Tokenizer
from localmoe.vocabulary import Kind, byte_level_bpe

KEY = "tokenizer.ggml."
UNMERGED = 10**6  # behind every rank
# Text on which pre-tokenizers differ: contractions in both cases, digits, spaces and line ends before and between
# words, marks, scripts with and without case, signs beside letters, code.
PROBES = (
    "Hello world! It's I'LL we'Ve CamelCase ALLCAPS iPhone mixedUP",
    "1 12 123 1234 12345 3.14 1,000,000 \u0665\u0666\u0667 \u00bd x2y 007abc",
    " a  b   c    d     e\tf\t\tg \t h\n\n i\r\n j\n  k   \n\n\n   l  ",
    "...!!! ?! -- (a) [b]{c} <d>/* e */ #f @g $h %i ^j &k *l +m =n ~o `p` |q| \\r \"s\" /t/\n//u\n",
    "\u00e9t\u00e9 na\u00efve e\u0301te\u0301 \u0131\u0307 Stra\u00dfe \u01c5 \u00aa\u00ba \u2019s l\u2019eau",
    "\u041f\u0440\u0438\u0432\u0435\u0442 \u041c\u0418\u0420 \u03b1\u03b2\u03b3 \u0394\u03a9 \u05e9\u05dc\u05d5\u05dd",
    "\u4f60\u597d\uff0c\u4e16\u754c\u3002",
    "\u3053\u3093\u306b\u3061\u306f\u30ab\u30bf\u30ab\u30ca \uc548\ub155 \u0e2a\u0e27\u0e31",
    "\u0928\u092e\u0938\u094d\u0924\u0947 \u0627\u0644\u0639\u0631\u0628\u064a\u0629 ",
    "\U0001f600\U0001f468\u200d\U0001f469 \u2764\ufe0f \u00a0nbsp\u3000wide",
    "def f(x):\n    return x**2  # caf\u00e9\n\n\tfor i in range(10):\n\t\tprint(f'{i:03d}')\r\n",
    "A.B.C. e.g. U.S.A's don't 'twas 'S 'T 're'd word's! 'quoted' \"It's\"",
    "\u2581 \u2581\u2581a <0x41> http://x.y/z?a=1&b=2 user@mail.com v1.2.3-rc4 $1,234.56 50% #1",
)  # fmt: skip


def tokenizer_keys(tokenizer: Tokenizer, folder: Path, rows: int, architecture: str) -> dict[str, Any]:
    """The keys for a model whose embedding has `rows` rows; ids beyond the vocabulary become unused tokens.

    Raises UnsupportedError for a tokenizer that a GGUF file cannot hold: its pre-tokenizer is not in the table of
    `pretokenizers`, or the file's tokens would be others than the folder's.
    """
    vocabulary = tokenizer.vocabulary
    state, pieces = json.loads(vocabulary.engine.to_str()), vocabulary.pieces
    if len(pieces) > rows:
        raise UnsupportedError(f"{folder}: {len(pieces)} tokens, and the model has rows for {rows}")
    if state["model"]["type"] != "BPE":
        raise UnsupportedError(
            f"{folder}: a tokenizer of type {state['model']['type']}; GGUF files are written for BPE"
        )
    merges = [tuple(pair) if isinstance(pair, list) else tuple(pair.split(" ", 1)) for pair in state["model"]["merges"]]
    tokens = [piece or f"[PAD{id}]" for id, piece in enumerate(pieces)]
    kinds = [int(kind if piece else Kind.UNUSED) for piece, kind in zip(pieces, vocabulary.kinds, strict=True)]
    tokens += [f"[PAD{id}]" for id in range(len(tokens), rows)]
    kinds += [int(Kind.UNUSED)] * (rows - len(kinds))
    unknown = next((id for id, piece in enumerate(pieces) if piece and piece == state["model"].get("unk_token")), None)
    keys: dict[str, Any] = {}
    if vocabulary.byte_level:
        keys = {"model": "gpt2", "pre": _pretokenizer(tokenizer, state, folder, architecture)}
        keys |= {"tokens": tokens, "token_type": kinds, "merges": [" ".join(pair) for pair in merges]}
    else:
        if unknown is not None:
            kinds[unknown] = int(Kind.UNKNOWN)
        keys = {"model": "llama", "pre": "default", "tokens": tokens, "scores": _scores(tokens, merges)}
        keys |= {"token_type": kinds, "add_space_prefix": vocabulary.space_prefix}
    keys |= _special(tokenizer, unknown)
    named = {KEY + name: value for name, value in keys.items()}
    _require_same(tokenizer, named, folder)
    return named


def _scores(tokens: list[str], merges: list[tuple[str, ...]]) -> list[float]:
    """Scores that put the pieces in the order of the merges: SentencePiece's rule is "best score first". What no merge
    makes, single characters but for special tokens, never competes."""
    ranks: dict[str, int] = {}
    for rank, pair in enumerate(merges):
        ranks.setdefault("".join(pair), rank)
    return [float(-ranks.get(token, UNMERGED if len(token) > 1 else 0)) for token in tokens]


def _special(tokenizer: Tokenizer, unknown: int | None) -> dict[str, Any]:
    """Ids of special tokens. What ends a turn beside EOS is named as EOT and EOM where llama.cpp would not know it."""
    ids = {"bos": tokenizer.bos, "eos": tokenizer.eos, "unknown": unknown}
    pieces = tokenizer.vocabulary.pieces
    further = sorted(tokenizer.stop - {tokenizer.eos}, key=lambda id: (pieces[id] in END_OF_TURN, id))
    ids |= dict(zip(("eot", "eom"), further, strict=False))
    flags = {"add_bos_token": tokenizer.add_bos, "add_eos_token": tokenizer.add_eos}
    return {f"{name}_token_id": id for name, id in ids.items() if id is not None} | flags


def _pretokenizer(tokenizer: Tokenizer, state: Mapping[str, Any], folder: Path, architecture: str) -> str:
    """The name under which the table has the folder's pre-tokenizer: one that cuts every probe in the same places."""
    steps = state.get("pre_tokenizer") or {}
    if any(step.get("add_prefix_space") for step in steps.get("pretokenizers", [steps])):
        raise UnsupportedError(
            f"{folder}: a byte-level tokenizer with a space before all text has no form in GGUF files"
        )
    normaliser = state.get("normalizer") or {}
    used = [step.get("type") for step in normaliser.get("normalizers", [normaliser]) if step]
    if set(used) - {"NFC", None}:
        raise UnsupportedError(f"{folder}: normalizer {listed([str(kind) for kind in used])} has no form in GGUF files")
    nfc, whole = "NFC" in used, bool(state["model"].get("ignore_merges"))
    theirs = [_cuts(tokenizer.vocabulary.engine, probe) for probe in PROBES]
    named = list(_first_names(architecture))
    cutting = [(kind, name) for kind, name in named if kind.whole_words == whole and _like(kind, theirs)]
    # llama.cpp normalises nothing: a name with the same normaliser goes first, one without it will do.
    cutting.sort(key=lambda pair: pair[0].nfc != nfc)
    if not cutting:
        known = ", ".join(name for _, name in named)
        raise UnsupportedError(f"{folder}: its pre-tokenizer is none of those that GGUF files have names for: {known}")
    return cutting[0][1]


def _first_names(architecture: str) -> Iterator[tuple[Pretokenizer, str]]:
    """Each pre-tokenizer of the table once, under its first name, or the architecture's own if it has one."""
    names: dict[int, list[str]] = {}
    for name, kind in PRETOKENIZERS.items():
        names.setdefault(id(kind), []).append(name)
    for group in names.values():
        own = architecture if architecture in group else group[0]
        if own != "default":
            yield PRETOKENIZERS[own], own


def _like(kind: Pretokenizer, theirs: list[list[tuple[int, int]]]) -> bool:
    engine = byte_level_bpe([], [], [], kind).engine
    return all(_cuts(engine, probe) == cuts for probe, cuts in zip(PROBES, theirs, strict=True))


def _cuts(engine: Any, text: str) -> list[tuple[int, int]]:
    return [place for _, place in engine.pre_tokenizer.pre_tokenize_str(text)]


def _require_same(tokenizer: Tokenizer, keys: Mapping[str, Any], folder: Path) -> None:
    """The keys are read back, and every probe must become the same ids; so must what ends a turn."""
    try:
        written = Tokenizer.from_gguf(keys)
    except LocalMoeError as error:
        raise UnsupportedError(f"{folder}: the tokenizer has no form in GGUF files: {error}") from error
    vocabulary = tokenizer.vocabulary
    special = [piece for piece, kind in zip(vocabulary.pieces, vocabulary.kinds, strict=True) if kind == Kind.CONTROL]
    mixed = ("", "a", *PROBES, *(f"{piece} a {piece}b" for piece in special[:64]))
    for text in mixed:
        if written.encode(text) != tokenizer.encode(text):
            raise UnsupportedError(f"{folder}: in a GGUF file the tokenizer would cut {shown(text)} otherwise")
    if not written.stop >= tokenizer.stop:
        lost = listed([shown(tokenizer.token(id)) for id in sorted(tokenizer.stop - written.stop)])
        raise UnsupportedError(f"{folder}: more tokens end a turn than a GGUF file can name: {lost}")
